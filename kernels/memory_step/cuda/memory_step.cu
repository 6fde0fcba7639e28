// memory_step on CUDA: checks and the launch. The device code is in memory_step.cuh.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <limits>

#include "memory_step/arguments.h"
#include "memory_step/cuda/memory_step.cuh"

namespace mnemos::memory_step {
namespace {

template <int Dk, class T, bool Momentum>
__global__ void __launch_bounds__(kThreads) step_kernel(const Step p) {
  __shared__ Sums sums;
  Thread<Dk, T, Momentum> thread(p, blockIdx.x, threadIdx.x);
  thread.recall(p, sums);
  __syncthreads();
  thread.write(p, sums);
  __syncthreads();
  thread.read(p, sums);
}

void memory_step(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& alpha,
    const std::optional<Tensor>& eta,
    const Tensor& theta,
    const Tensor& memory,
    const Tensor& momentum,
    const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Step p = checked(q, k, v, alpha, eta, theta, memory, momentum, out);
  const int64_t count = blocks(p);
  if (count == 0) return;
  STD_TORCH_CHECK(count <= std::numeric_limits<int32_t>::max(), "memory_step: too many memories for one launch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  with_kernel(p, [&]<int Dk, class T, bool Momentum>() {
    step_kernel<Dk, T, Momentum><<<static_cast<uint32_t>(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace
}  // namespace mnemos::memory_step

STABLE_TORCH_LIBRARY_IMPL(mnemos, CUDA, m) {
  m.impl("memory_step", TORCH_BOX(&mnemos::memory_step::memory_step));
}
