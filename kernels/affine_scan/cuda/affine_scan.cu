// affine_scan on CUDA: arguments, memory and launches. The kernels are in affine_scan.cuh.

#include "affine_scan/arguments.h"
#include "affine_scan/cuda/affine_scan.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#include <limits>

namespace mnemos::affine_scan {
namespace {

class Launch {
 public:
  explicit Launch(const Tensor& x) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  void operator()(void (*kernel)(Scan, int64_t), int64_t threads, const Scan& p) const {
    const int64_t blocks = (threads + kBlock - 1) / kBlock;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "affine_scan: too many features for one launch");
    kernel<<<static_cast<uint32_t>(blocks), kBlock, 0, stream_>>>(p, threads);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  cudaStream_t stream_;
};

Scan sizes(const Sizes& n, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(n.interval == kTile, "affine_scan: interval must be ", kTile, " on CUDA");
  Scan p{};
  p.batch = n.batch;
  p.tokens = n.tokens;
  p.features = n.features;
  split(p, a.scalar_type() == ScalarType::BFloat16, b.scalar_type() == ScalarType::BFloat16);
  return p;
}

// The maps of the pieces and the states between them; the tensors must live until the launches are made.
struct Scratch {
  Tensor products, floats, flags;

  Scratch(Scan& p, const Tensor& like)
      : products(make(p, like, p.features, ScalarType::Double)),
        floats(make(p, like, 2 * p.features, ScalarType::Float)),
        flags(make(p, like, 1, ScalarType::Byte)) {
    p.products = static_cast<double*>(products.mutable_data_ptr());
    p.ends = static_cast<float*>(floats.mutable_data_ptr());
    p.starts = p.ends + p.batch * p.pieces * p.features;
    p.severed = static_cast<uint8_t*>(flags.mutable_data_ptr());
  }

  static Tensor make(const Scan& p, const Tensor& like, int64_t size, ScalarType type) {
    return torch::stable::new_empty(like, {p.pieces > 1 ? p.batch * p.pieces * size : 0}, type);
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& a,
    const Tensor& b,
    const Tensor& state,
    const std::optional<Tensor>& resets,
    int64_t interval,
    bool save) {
  const Sizes n = check_inputs(a, b, resets, interval);
  check(state, "state", {n.batch, n.features}, false, b);
  const torch::stable::accelerator::DeviceGuard guard(b.get_device_index());
  Tensor h = torch::stable::empty_like(b);
  Tensor after = empty(b, {n.batch, n.features});
  Tensor states = save ? empty(b, {n.batch, n.states(), n.features}) : empty(b, {0});
  if (b.numel() == 0) return {h, after, states};

  Scan p = sizes(n, a, b);
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.resets = bytes(resets);
  p.first = static_cast<const float*>(state.const_data_ptr());
  p.last = static_cast<float*>(after.mutable_data_ptr());
  p.states = save ? static_cast<float*>(states.mutable_data_ptr()) : nullptr;
  p.h = h.mutable_data_ptr();
  const Scratch scratch(p, b);
  run(p, false, a.scalar_type() == ScalarType::BFloat16, b.scalar_type() == ScalarType::BFloat16, Launch(b));
  return {h, after, states};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_h,
    const Tensor& grad_after,
    const Tensor& a,
    const Tensor& b,
    const std::optional<Tensor>& resets,
    const Tensor& states,
    int64_t interval) {
  const Sizes n = check_inputs(a, b, resets, interval);
  check_backward(n, grad_h, grad_after, b, states);
  const torch::stable::accelerator::DeviceGuard guard(b.get_device_index());
  Tensor grad_a = torch::stable::empty_like(a);
  Tensor grad_b = torch::stable::empty_like(b);
  Tensor grad_state = empty(b, {n.batch, n.features});
  if (b.numel() == 0) return {grad_a, grad_b, grad_state};

  Scan p = sizes(n, a, b);
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.grad_h = grad_h.const_data_ptr();
  p.resets = bytes(resets);
  p.first = static_cast<const float*>(grad_after.const_data_ptr());
  p.last = static_cast<float*>(grad_state.mutable_data_ptr());
  // Read alone: the forward pass wrote them.
  p.states = static_cast<float*>(const_cast<void*>(states.const_data_ptr()));
  p.grad_a = grad_a.mutable_data_ptr();
  p.grad_b = grad_b.mutable_data_ptr();
  const Scratch scratch(p, b);
  run(p, true, a.scalar_type() == ScalarType::BFloat16, b.scalar_type() == ScalarType::BFloat16, Launch(b));
  return {grad_a, grad_b, grad_state};
}

}  // namespace
}  // namespace mnemos::affine_scan

STABLE_TORCH_LIBRARY_IMPL(mnemos, CUDA, m) {
  m.impl("affine_scan", TORCH_BOX(&mnemos::affine_scan::forward));
  m.impl("affine_scan_backward", TORCH_BOX(&mnemos::affine_scan::backward));
}
