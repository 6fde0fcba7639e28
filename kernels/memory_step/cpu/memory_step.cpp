// memory_step for CPU tensors: checks, and spans of columns for torch's threads.
#include "memory_step/arguments.h"
#include "common/cpu/isa.h"
#include "memory_step/cpu/kernels.h"

namespace mnemos::memory_step {
namespace {

// Elements of M that a thread gets at least: waking one takes some microseconds.
constexpr int64_t kGrain = 1 << 14;
// Columns of a span, where memories have as many: a cache line or several of each row, and at 128 rows a block of M
// that fits a first cache of 32 KB.
constexpr int kSpan = 64;

Kernel kernel() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
    case Isa::avx512:
      return step_avx512();
    case Isa::avx2:
      return step_avx2();
#endif
    default:
      return step_generic();
  }
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
  const Step p = checked(q, k, v, alpha, eta, theta, memory, momentum, out);
  const Kernel step = kernel();
  const int64_t spans = (p.value_dim + kSpan - 1) / kSpan;
  const int64_t grain = std::max<int64_t>(1, kGrain / (p.key_dim * std::clamp(p.value_dim, 1, kSpan)));
  torch::stable::parallel_for(0, p.memories * spans, grain, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int first = static_cast<int>(unit % spans) * kSpan;
      step(p, unit / spans, first, std::min(first + kSpan, p.value_dim));
    }
  });
}

}  // namespace
}  // namespace mnemos::memory_step

STABLE_TORCH_LIBRARY_IMPL(mnemos, CPU, m) {
  m.impl("memory_step", TORCH_BOX(&mnemos::memory_step::memory_step));
}
