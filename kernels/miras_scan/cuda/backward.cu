// mnemos::miras_scan_backward on CUDA.
#include "arguments.cuh"

namespace mnemos::miras_scan {
namespace {

template <class In>
const In* inputs(const Tensor& x) {
  return static_cast<const In*>(x.const_data_ptr());
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results backward(const Tensor& grad_y_given, const Tensor& grad_memory, const Tensor& grad_momentum,
                 const Tensor& q_given, const Tensor& k_given, const Tensor& v_given, const Tensor& alpha,
                 const Tensor& eta, const Tensor& theta, const std::optional<Tensor>& resets, const Tensor& residuals,
                 const Tensor& states, int64_t interval) {
  const Arguments x(q_given, k_given, v_given, alpha, eta, theta, resets, interval);
  x.check_input(grad_y_given, "grad_y", v_given.size(3));
  x.check_state(grad_memory, "grad_memory");
  x.check_state(grad_momentum, "grad_momentum");
  x.check_floats(residuals, "residuals", x.residuals());
  x.check_floats(states, "states", x.states());
  const torch::stable::accelerator::DeviceGuard guard(q_given.get_device_index());
  const Tensor q = aligned(q_given), k = aligned(k_given), grad_y = aligned(grad_y_given);
  const Tensor residuals_aligned = aligned(residuals), states_aligned = aligned(states);

  Tensor grad_q = torch::stable::empty_like(q), grad_k = torch::stable::empty_like(k);
  Tensor grad_v = torch::stable::empty_like(grad_y);
  Tensor grad_alpha = torch::stable::empty_like(alpha), grad_eta = torch::stable::empty_like(eta);
  Tensor grad_theta = torch::stable::empty_like(theta);
  Tensor grad_memory_before = x.make(x.state()), grad_momentum_before = x.make(x.state());
  const auto run = [&]<class In>(In) {
    BackwardCall<In> call{x.shape(),
                          inputs<In>(grad_y),
                          Arguments::floats(grad_memory),
                          Arguments::floats(grad_momentum),
                          inputs<In>(q),
                          inputs<In>(k),
                          x.gates(),
                          Arguments::floats(residuals_aligned),
                          Arguments::floats(states_aligned),
                          x.interval(),
                          static_cast<In*>(grad_q.mutable_data_ptr()),
                          static_cast<In*>(grad_k.mutable_data_ptr()),
                          static_cast<In*>(grad_v.mutable_data_ptr()),
                          Arguments::mutable_floats(grad_alpha),
                          Arguments::mutable_floats(grad_eta),
                          Arguments::mutable_floats(grad_theta),
                          Arguments::mutable_floats(grad_memory_before),
                          Arguments::mutable_floats(grad_momentum_before)};
    run_backward<In>(call, kWorkspace, Scratch(x), x.stream());
  };
  if (!x.empty()) x.bf16() ? run(bfloat16{}) : run(float{});
  return {grad_q, grad_k, grad_v, grad_alpha, grad_eta, grad_theta, grad_memory_before, grad_momentum_before};
}

}  // namespace
}  // namespace mnemos::miras_scan

STABLE_TORCH_LIBRARY_IMPL(mnemos, CUDA, m) { m.impl("miras_scan_backward", TORCH_BOX(&mnemos::miras_scan::backward)); }
