// A block of columns of one memory: read, written and read again while it lies in the first cache.
//
// Columns of a memory do not meet. So a block's M is small enough to stay in the cache between the product that the
// residual needs and the update, and M and S cross the memory bus once in each direction.
#pragma once

#include "common/cpu/simd.h"
#include "memory_step/cpu/kernels.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

using memory_step::Step;

template <class T>
MNEMOS_INLINE void as_floats(const T* x, float* to, int count) {
  for (int i = 0; i < count; i += VL) store(to + i, load(x + i));
}

// N vectors of columns from `first` on.
template <int Dk, int N, class T, bool Momentum>
MNEMOS_INLINE void step_block(const Step& p, int64_t i, int first, const float* q, const float* k) {
  const int ld = p.value_dim;
  float* memory = p.memory + i * Dk * ld + first;
  float* momentum = p.momentum + i * Dk * ld + first;
  const T* v = static_cast<const T*>(p.v) + i * ld + first;

  // Several sums of each column: one alone would wait for each of its additions.
  constexpr int kSums = N >= 4 ? 2 : 4;
  vec sums[kSums][N] = {};
  MNEMOS_UNROLL_4
  for (int row = 0; row < Dk; row += kSums) {
    MNEMOS_UNROLL
    for (int j = 0; j < kSums; ++j) {
      const ptrdiff_t at = (ptrdiff_t)(row + j) * ld;
      const vec key = splat(k[row + j]);
      MNEMOS_UNROLL
      for (int n = 0; n < N; ++n) sums[j][n] += key * load(memory + at + n * VL);
      if constexpr (Momentum) {
        MNEMOS_UNROLL
        for (int n = 0; n < N * VL; n += 16) __builtin_prefetch(momentum + at + n, 1, 3);
      }
    }
  }
  vec step[N], y[N] = {};
  const vec theta = splat(-p.theta[i]), keep = splat(1 - p.alpha[i]), eta = splat(Momentum ? p.eta[i] : 0.0f);
  MNEMOS_UNROLL
  for (int n = 0; n < N; ++n) {
    vec residual = -load(v + n * VL);
    MNEMOS_UNROLL
    for (int j = 0; j < kSums; ++j) residual += sums[j][n];
    step[n] = theta * residual;
  }
  MNEMOS_UNROLL_4
  for (int row = 0; row < Dk; ++row) {
    const vec key = splat(k[row]), query = splat(q[row]);
    MNEMOS_UNROLL
    for (int n = 0; n < N; ++n) {
      const ptrdiff_t at = (ptrdiff_t)row * ld + n * VL;
      vec s = key * step[n];
      if constexpr (Momentum) s += eta * load(momentum + at);
      const vec m = keep * load(memory + at) + s;
      store(momentum + at, s);
      store(memory + at, m);
      y[n] += query * m;
    }
  }
  T* out = static_cast<T*>(p.out) + i * ld + first;
  MNEMOS_UNROLL
  for (int n = 0; n < N; ++n) store(out + n * VL, y[n]);
}

// The widest block that lies within a span of columns, and what is left in narrower ones.
template <int Dk, int N, class T, bool Momentum>
MNEMOS_INLINE void step_columns(const Step& p, int64_t i, int first, int end, const float* q, const float* k) {
  for (; first + N * VL <= end; first += N * VL) step_block<Dk, N, T, Momentum>(p, i, first, q, k);
  if constexpr (N * VL > memory_step::kValueMultiple)
    if (first < end) step_columns<Dk, N / 2, T, Momentum>(p, i, first, end, q, k);
}

template <int Dk, class T, bool Momentum>
void step_span(const Step& p, int64_t i, int first, int end) {
  float q[Dk], k[Dk];
  as_floats(static_cast<const T*>(p.q) + i * Dk, q, Dk);
  as_floats(static_cast<const T*>(p.k) + i * Dk, k, Dk);
  step_columns<Dk, NV, T, Momentum>(p, i, first, end, q, k);
}

template <int Dk, class T>
void step_of_type(const Step& p, int64_t i, int first, int end) {
  p.eta ? step_span<Dk, T, true>(p, i, first, end) : step_span<Dk, T, false>(p, i, first, end);
}

template <int Dk>
void step_of_dim(const Step& p, int64_t i, int first, int end) {
  p.bfloat16 ? step_of_type<Dk, Bfloat16>(p, i, first, end) : step_of_type<Dk, float>(p, i, first, end);
}

void run_step(const Step& p, int64_t i, int first, int end) {
  p.key_dim == 32   ? step_of_dim<32>(p, i, first, end)
  : p.key_dim == 64 ? step_of_dim<64>(p, i, first, end)
                    : step_of_dim<128>(p, i, first, end);
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
