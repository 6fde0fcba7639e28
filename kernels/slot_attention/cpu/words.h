// Products of matrices in words of 32 bits, which are one float or, where a processor multiplies them, two bfloat16.
//
// A left operand has its words along the summed index, a right one has a row per word of the summed index. So a matrix
// is needed in up to three forms, all made here of its rows:
//   rows         [n][dim / G]   the left operand of a sum over features; G elements of a word
//   interleaved  [n / G][dim]   the right operand of a sum over rows
//   transposed   of rows: the right operand of a sum over features; of interleaved: the left one of a sum over rows
#pragma once

#include "common/cpu/simd.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

MNEMOS_INLINE vec broadcast(const float* word) {
  int32_t bits;
  std::memcpy(&bits, word, sizeof bits);
  return (vec)(bits - ivec{});
}

// A word is a float.
struct Floats {
  static constexpr int G = 1;

  // 2^x to 1e-7; 0 below the normal numbers.
  static MNEMOS_INLINE vec exp2(vec x) {
    const vec magic = splat(12582912.0f);
    const vec bounded = x < -126.0f ? splat(-126.0f) : x;
    const vec shifted = bounded + magic;
    const vec f = bounded - (shifted - magic);
    vec y = splat(1.5403530393381609e-4f);
    y = y * f + 1.3333558146428443e-3f;
    y = y * f + 9.6181291076284772e-3f;
    y = y * f + 5.5504108664821580e-2f;
    y = y * f + 2.4022650695910072e-1f;
    y = y * f + 6.9314718055994531e-1f;
    y = y * f + 1.0f;
    const vec scaled = (vec)((ivec)y + ((ivec)shifted << 23));
    return x < -126.0f ? vec{} : scaled;
  }

  static MNEMOS_INLINE vec multiply_add(vec sum, vec a, vec b) { return sum + a * b; }

  template <class T>
  static MNEMOS_INLINE void load_row(const T* from, int dim, float* to) {
    for (int i = 0; i < dim; i += VL) store(to + i, load(from + i));
  }

  static MNEMOS_INLINE void round_row(const float* from, int dim, float* to) { load_row(from, dim, to); }

  static const float* interleaved(const float* rows, int, int, float*) { return rows; }

  // Two neighbouring rows of a vector each.
  static MNEMOS_INLINE void put_interleaved(float* to, int ld, int row, vec a, vec b) {
    store(to + (ptrdiff_t)row * ld, a);
    store(to + (ptrdiff_t)(row + 1) * ld, b);
  }

  static MNEMOS_INLINE void put_rows(float* to, int ld, int row, int column, vec a, vec b) {
    store(to + (ptrdiff_t)row * ld + column, a);
    store(to + (ptrdiff_t)(row + 1) * ld + column, b);
  }
};

#if defined(MNEMOS_BF16)
// A word is two bfloat16; sums are in float32.
struct Pairs {
  static constexpr int G = 2;

  // 2^x to 5e-5, of what is rounded to 4e-3 next: Taylor's polynomial on [-0.5, 0.5].
  static MNEMOS_INLINE vec exp2(vec x) {
    const vec f = (vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 0);
    vec y = splat(9.6181291076284772e-3f);
    y = y * f + 5.5504108664821580e-2f;
    y = y * f + 2.4022650695910072e-1f;
    y = y * f + 6.9314718055994531e-1f;
    y = y * f + 1.0f;
    return (vec)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)(x - f));
  }

  static MNEMOS_INLINE vec multiply_add(vec sum, vec a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static MNEMOS_INLINE void load_row(const Bfloat16* from, int dim, float* to) {
    std::memcpy(to, from, (size_t)dim * sizeof(Bfloat16));
  }

  static MNEMOS_INLINE void round_row(const float* from, int dim, float* to) {
    for (int i = 0; i < dim; i += VL) store(reinterpret_cast<Bfloat16*>(to) + i, load(from + i));
  }

  static const float* interleaved(const float* rows, int count, int dim, float* scratch) {
    for (int r = 0; r < count; r += 2) {
      const auto* low = reinterpret_cast<const Bfloat16*>(rows + (ptrdiff_t)r * (dim / 2));
      const auto* high = reinterpret_cast<const Bfloat16*>(rows + (ptrdiff_t)(r + 1) * (dim / 2));
      for (int i = 0; i < dim; i += VL) {
        const uvec a = __builtin_convertvector(*reinterpret_cast<const hvec_u*>(low + i), uvec);
        const uvec b = __builtin_convertvector(*reinterpret_cast<const hvec_u*>(high + i), uvec);
        store(scratch + (ptrdiff_t)(r / 2) * dim + i, (vec)(a | (b << 16)));
      }
    }
    return scratch;
  }

  static MNEMOS_INLINE uvec bits(vec x) {
    return __builtin_convertvector((hvec)_mm512_cvtneps_pbh((__m512)x), uvec);
  }

  static MNEMOS_INLINE void put_interleaved(float* to, int ld, int row, vec a, vec b) {
    store(to + (ptrdiff_t)(row / 2) * ld, (vec)(bits(a) | (bits(b) << 16)));
  }

  static MNEMOS_INLINE void put_rows(float* to, int ld, int row, int column, vec a, vec b) {
    auto* out = reinterpret_cast<uint16_t*>(to + (ptrdiff_t)row * (ld / 2)) + column;
    *reinterpret_cast<hvec_u*>(out) = (hvec)_mm512_cvtneps_pbh((__m512)a);
    *reinterpret_cast<hvec_u*>(out + ld) = (hvec)_mm512_cvtneps_pbh((__m512)b);
  }
};
#endif

// Words [rows][columns] to [columns][rows]; rows is a multiple of VL.
inline void transpose_words(const float* from, int rows, int columns, float* to) {
  int i = 0;
  for (; i + VL <= columns; i += VL) {
    for (int j = 0; j < rows; j += VL) {
      vec square[VL];
      MNEMOS_UNROLL
      for (int r = 0; r < VL; ++r) square[r] = load(from + (ptrdiff_t)(j + r) * columns + i);
      transpose(square);
      MNEMOS_UNROLL
      for (int r = 0; r < VL; ++r) store(to + (ptrdiff_t)(i + r) * rows + j, square[r]);
    }
  }
  for (; i < columns; ++i)
    for (int j = 0; j < rows; ++j) std::memcpy(to + (ptrdiff_t)i * rows + j, from + (ptrdiff_t)j * columns + i, 4);
}

template <class P, int R, int N>
MNEMOS_INLINE void multiply_tile(
    const float* a, int lda, const float* b, int ldb, int k, float* c, int ldc, bool add) {
  vec sum[R][N];
  MNEMOS_UNROLL
  for (int r = 0; r < R; ++r) {
    MNEMOS_UNROLL
    for (int n = 0; n < N; ++n) sum[r][n] = add ? load(c + (ptrdiff_t)r * ldc + n * VL) : vec{};
  }
  MNEMOS_UNROLL_4
  for (int i = 0; i < k; ++i) {
    vec row[N];
    MNEMOS_UNROLL
    for (int n = 0; n < N; ++n) row[n] = load(b + (ptrdiff_t)i * ldb + n * VL);
    MNEMOS_UNROLL
    for (int r = 0; r < R; ++r) {
      const vec x = broadcast(a + (ptrdiff_t)r * lda + i);
      MNEMOS_UNROLL
      for (int n = 0; n < N; ++n) sum[r][n] = P::multiply_add(sum[r][n], x, row[n]);
    }
  }
  store_tile(sum, c, ldc);
}

template <class P, int N>
inline void multiply_panel(
    int m, const float* a, int lda, const float* b, int ldb, int k, float* c, int ldc, bool add) {
  int r = 0;
  for (; r + MR <= m; r += MR)
    multiply_tile<P, MR, N>(a + (ptrdiff_t)r * lda, lda, b, ldb, k, c + (ptrdiff_t)r * ldc, ldc, add);
  for (; r + 2 <= m; r += 2)
    multiply_tile<P, 2, N>(a + (ptrdiff_t)r * lda, lda, b, ldb, k, c + (ptrdiff_t)r * ldc, ldc, add);
  if (r < m) multiply_tile<P, 1, N>(a + (ptrdiff_t)r * lda, lda, b, ldb, k, c + (ptrdiff_t)r * ldc, ldc, add);
}

// c [m][n] = a b, or that added to it, with k words summed; n is a multiple of VL.
template <class P>
inline void product(
    int m, int n, int k, const float* a, int lda, const float* b, int ldb, float* c, int ldc, bool add) {
  int column = 0;
  for (; column + NV * VL <= n; column += NV * VL)
    multiply_panel<P, NV>(m, a, lda, b + column, ldb, k, c + column, ldc, add);
  for (; column < n; column += VL) multiply_panel<P, 1>(m, a, lda, b + column, ldb, k, c + column, ldc, add);
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
