// mnemos::miras_scan on CUDA.
#include "arguments.cuh"

namespace mnemos::miras_scan {
namespace {

template <class In>
const In* inputs(const Tensor& x) {
  return static_cast<const In*>(x.const_data_ptr());
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Results forward(const Tensor& q_given, const Tensor& k_given, const Tensor& v_given, const Tensor& alpha,
                const Tensor& eta, const Tensor& theta, const Tensor& memory, const Tensor& momentum,
                const std::optional<Tensor>& resets, int64_t interval, bool save) {
  const Arguments x(q_given, k_given, v_given, alpha, eta, theta, resets, interval);
  x.check_state(memory, "memory");
  x.check_state(momentum, "momentum");
  const torch::stable::accelerator::DeviceGuard guard(q_given.get_device_index());
  const Tensor q = aligned(q_given), k = aligned(k_given), v = aligned(v_given);

  Tensor y = torch::stable::empty_like(v);
  Tensor memory_after = x.make(x.state()), momentum_after = x.make(x.state());
  Tensor residuals = x.make(save ? x.residuals() : std::vector<int64_t>{0});
  Tensor states = x.make(save ? x.states() : std::vector<int64_t>{0});
  const auto run = [&]<class In>(In) {
    ForwardCall<In> call{x.shape(),
                         inputs<In>(q),
                         inputs<In>(k),
                         inputs<In>(v),
                         x.gates(),
                         Arguments::floats(memory),
                         Arguments::floats(momentum),
                         x.interval(),
                         save,
                         static_cast<In*>(y.mutable_data_ptr()),
                         Arguments::mutable_floats(memory_after),
                         Arguments::mutable_floats(momentum_after),
                         save ? Arguments::mutable_floats(residuals) : nullptr,
                         save ? Arguments::mutable_floats(states) : nullptr};
    run_forward<In>(call, kWorkspace, Scratch(x), x.stream());
  };
  if (!x.empty()) x.bf16() ? run(bfloat16{}) : run(float{});
  return {y, memory_after, momentum_after, residuals, states};
}

}  // namespace
}  // namespace mnemos::miras_scan

STABLE_TORCH_LIBRARY_IMPL(mnemos, CUDA, m) { m.impl("miras_scan", TORCH_BOX(&mnemos::miras_scan::forward)); }
