// Vectors of VL floats by the compilers' vector extensions, and the register tiles that all products are made of.
//
// Included by one source file per instruction set, which defines before:
//   MNEMOS_ISA          a namespace of its own: the same function is compiled several times
//   MNEMOS_VL           floats per vector register
//   MNEMOS_NV           vectors side by side in a register tile
//   MNEMOS_MR           rows of a register tile; MR * NV accumulators have to cover the latency of the units
// and has included every standard header before it switched the instruction set, so that no inline function of the
// standard library is compiled for a CPU that the program may not run on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define MNEMOS_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define MNEMOS_UNROLL _Pragma("clang loop unroll(full)")
#define MNEMOS_UNROLL_4 _Pragma("clang loop unroll_count(4)")
#else
#define MNEMOS_UNROLL _Pragma("GCC unroll 64")
#define MNEMOS_UNROLL_4 _Pragma("GCC unroll 4")
#endif

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

constexpr int VL = MNEMOS_VL;
constexpr int NV = MNEMOS_NV;
constexpr int MR = MNEMOS_MR;

typedef float vec __attribute__((vector_size(VL * 4)));
typedef int32_t ivec __attribute__((vector_size(VL * 4)));
typedef uint32_t uvec __attribute__((vector_size(VL * 4)));
typedef uint16_t hvec __attribute__((vector_size(VL * 2)));
typedef float vec_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint16_t hvec_u __attribute__((vector_size(VL * 2), aligned(2), may_alias));

MNEMOS_INLINE vec load(const float* p) { return *reinterpret_cast<const vec_u*>(p); }
MNEMOS_INLINE void store(float* p, vec x) { *reinterpret_cast<vec_u*>(p) = x; }
MNEMOS_INLINE vec splat(float x) { return x - vec{}; }

struct Bfloat16 {
  uint16_t bits;
};

MNEMOS_INLINE vec load(const Bfloat16* p) {
  return (vec)(__builtin_convertvector(*reinterpret_cast<const hvec_u*>(p), uvec) << 16);
}

MNEMOS_INLINE void store(Bfloat16* p, vec x) {
  const uvec bits = (uvec)x;
  // To nearest, ties to even. A NaN would round to infinity.
  const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uvec quiet = (bits >> 16) | 0x40;
  const uvec is_nan = (uvec)(x != x);
  *reinterpret_cast<hvec_u*>(p) = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), hvec);
}

// Lane numbers from `first` on.
MNEMOS_INLINE ivec lanes(int first) {
  ivec x = {};
  MNEMOS_UNROLL
  for (int i = 0; i < VL; ++i) x[i] = first + i;
  return x;
}

MNEMOS_INLINE float sum(vec x) {
  float total = 0;
  for (int i = 0; i < VL; ++i) total += x[i];
  return total;
}

// One step of a transposition: swaps, within pairs of rows that are H apart, the off-diagonal blocks of H x H lanes.
template <int H>
MNEMOS_INLINE void exchange(vec& a, vec& b) {
  ivec low = {}, high = {};
  MNEMOS_UNROLL
  for (int i = 0; i < VL; ++i) {
    low[i] = i & H ? VL + i - H : i;
    high[i] = i & H ? VL + i : i + H;
  }
#if defined(__clang__)
  vec c = {}, d = {};
  MNEMOS_UNROLL
  for (int i = 0; i < VL; ++i) {
    c[i] = i & H ? b[i & ~H] : a[i];
    d[i] = i & H ? b[i] : a[i | H];
  }
  a = c;
  b = d;
#else
  const vec c = __builtin_shuffle(a, b, low), d = __builtin_shuffle(a, b, high);
  a = c;
  b = d;
#endif
}

template <int H>
MNEMOS_INLINE void transpose_steps(vec (&x)[VL]) {
  MNEMOS_UNROLL
  for (int i = 0; i < VL; ++i)
    if (!(i & H)) exchange<H>(x[i], x[i + H]);
  if constexpr (H > 1) transpose_steps<H / 2>(x);
}

// Transposes a square of VL x VL in registers.
MNEMOS_INLINE void transpose(vec (&x)[VL]) { transpose_steps<VL / 2>(x); }

// acc[r][n] +- sum over i < k of a(i, r) b[i][n], for the vectors FROM <= n < TO (all of them where TO is 0). The left
// operand is broadcast element by element, so that it may lie either way; the right one is read a vector at a time.
// KMAJOR: a(i, r) = a[i * lda + r], otherwise a[r * lda + i].
template <bool KMAJOR, bool NEGATE, int FROM = 0, int TO = 0, int R, int N>
MNEMOS_INLINE void multiply(vec (&acc)[R][N], const float* a, int lda, const float* b, int ldb, int k) {
  constexpr int END = TO == 0 ? N : TO;
  MNEMOS_UNROLL_4
  for (int i = 0; i < k; ++i) {
    vec row[N];
    MNEMOS_UNROLL
    for (int n = FROM; n < END; ++n) row[n] = load(b + (ptrdiff_t)i * ldb + n * VL);
    MNEMOS_UNROLL
    for (int r = 0; r < R; ++r) {
      const vec x = splat(KMAJOR ? a[(ptrdiff_t)i * lda + r] : a[(ptrdiff_t)r * lda + i]);
      MNEMOS_UNROLL
      for (int n = FROM; n < END; ++n) acc[r][n] = NEGATE ? acc[r][n] - x * row[n] : acc[r][n] + x * row[n];
    }
  }
}

template <int R, int N>
MNEMOS_INLINE void clear(vec (&acc)[R][N]) {
  MNEMOS_UNROLL
  for (int r = 0; r < R; ++r) {
    MNEMOS_UNROLL
    for (int n = 0; n < N; ++n) acc[r][n] = vec{};
  }
}

template <int R, int N>
MNEMOS_INLINE void store_tile(const vec (&acc)[R][N], float* p, int ld) {
  MNEMOS_UNROLL
  for (int r = 0; r < R; ++r) {
    MNEMOS_UNROLL
    for (int n = 0; n < N; ++n) store(p + (ptrdiff_t)r * ld + n * VL, acc[r][n]);
  }
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
