// How a chunk's operands lie in scratch memory, and how they get there and back.
//
// Rows of a chunk are tokens; "transposed" has a row per feature and kChunk tokens side by side. What is as wide as the
// values is cut into panels of P columns, each contiguous, so that one panel of the state stays in the first cache
// while all tokens pass over it; the last panel may be a single vector wide.
#pragma once

#include "common/cpu/simd.h"
#include "miras_scan/cpu/scan.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

constexpr int C = kChunk;
constexpr int P = VL * NV;
static_assert(C % P == 0 && C % MR == 0 && 16 % VL == 0 && (P == 16 || P == 32), "tiles cover a chunk exactly");

MNEMOS_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix of so many rows and columns in panels.
struct Panels {
  float* base;
  int rows, columns;

  int width(int column) const { return columns - column / P * P < P ? VL : P; }
  float* at(int row, int column) const {
    const int first = column / P * P;
    return base + (ptrdiff_t)first * rows + (ptrdiff_t)row * width(column) + (column - first);
  }
};

// Hands out scratch memory piece by piece; counts only, where there is none yet.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* piece = base_ == nullptr ? nullptr : base_ + used_;
    // One cache line between the pieces keeps equal rows of two of them out of the same cache set.
    used_ += (floats + 15) / 16 * 16 + 16;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

// Tokens first .. first + VL of columns .. + VL, zero from token n on; into rows and transposed, where they are wanted.
template <typename T>
MNEMOS_INLINE void load_square(
    const T* source, ptrdiff_t stride, int first, int n, float* rows, int row_stride, float* transposed) {
  vec x[VL];
  MNEMOS_UNROLL
  for (int i = 0; i < VL; ++i) x[i] = first + i < n ? load(source + (first + i) * stride) : vec{};
  if (rows != nullptr) {
    MNEMOS_UNROLL
    for (int i = 0; i < VL; ++i) store(rows + (ptrdiff_t)(first + i) * row_stride, x[i]);
  }
  if (transposed != nullptr) {
    transpose(x);
    MNEMOS_UNROLL
    for (int i = 0; i < VL; ++i) store(transposed + (ptrdiff_t)i * C + first, x[i]);
  }
}

// n tokens of `columns` features: rows [C][columns] and transposed [columns][C], either may be null.
template <typename T>
void load_tokens(const T* source, ptrdiff_t stride, int n, int columns, float* rows, float* transposed) {
  for (int first = 0; first < C; first += VL)
    for (int c = 0; c < columns; c += VL)
      load_square(source + c, stride, first, n, rows == nullptr ? nullptr : rows + c, columns,
                  transposed == nullptr ? nullptr : transposed + (ptrdiff_t)c * C);
}

// The same with the rows in panels, from row `at` of them on.
template <typename T>
void load_panels(const T* source, ptrdiff_t stride, int n, const Panels& rows, int at, float* transposed) {
  for (int column = 0; column < rows.columns; column += rows.width(column)) {
    const int width = rows.width(column);
    float* panel = rows.at(at, column);
    for (int first = 0; first < C; first += VL)
      for (int c = 0; c < width; c += VL)
        load_square(source + column + c, stride, first, n, panel + c, width,
                    transposed == nullptr ? nullptr : transposed + (ptrdiff_t)(column + c) * C);
  }
}

// transposed [columns][C] to n tokens.
template <typename T>
void store_transposed(const float* transposed, int n, int columns, T* target, ptrdiff_t stride) {
  for (int first = 0; first < n; first += VL)
    for (int c = 0; c < columns; c += VL) {
      vec x[VL];
      MNEMOS_UNROLL
      for (int i = 0; i < VL; ++i) x[i] = load(transposed + (ptrdiff_t)(c + i) * C + first);
      transpose(x);
      MNEMOS_UNROLL
      for (int i = 0; i < VL; ++i)
        if (first + i < n) store(target + (first + i) * stride + c, x[i]);
    }
}

// C rows of panels, from row `at` on, to transposed [columns][C].
void transpose_panels(const Panels& rows, int at, float* transposed) {
  for (int column = 0; column < rows.columns; column += rows.width(column)) {
    const int width = rows.width(column);
    const float* panel = rows.at(at, column);
    for (int first = 0; first < C; first += VL)
      for (int c = 0; c < width; c += VL)
        load_square(panel + c, width, first, C, nullptr, 0, transposed + (ptrdiff_t)(column + c) * C);
  }
}

// n rows of panels, from row `at` on, times `sign`, to n rows of the caller's.
template <typename T>
void store_panels(const Panels& rows, int at, int n, float sign, T* target, ptrdiff_t stride) {
  for (int column = 0; column < rows.columns; column += rows.width(column)) {
    const int width = rows.width(column);
    const float* panel = rows.at(at, column);
    for (int r = 0; r < n; ++r)
      for (int c = 0; c < width; c += VL) store(target + r * stride + column + c, load(panel + r * width + c) * sign);
  }
}

// n rows of the caller's to rows of panels, from row `at` on.
void copy_to_panels(const float* source, ptrdiff_t stride, int n, const Panels& rows, int at) {
  for (int column = 0; column < rows.columns; column += rows.width(column)) {
    const int width = rows.width(column);
    float* panel = rows.at(at, column);
    for (int r = 0; r < n; ++r)
      for (int c = 0; c < width; c += VL) store(panel + r * width + c, load(source + r * stride + column + c));
  }
}

void clear_panels(const Panels& rows, int at, int n) {
  for (int column = 0; column < rows.columns; column += rows.width(column))
    memset(rows.at(at, column), 0, sizeof(float) * n * rows.width(column));
}

// out[j][t] = sign sum over k of a[k][j] b[k][t], a and b transposed: at least the columns t <= j (LOWER) or t >= j
// (UPPER). Nothing is written to vectors that hold no such column.
template <bool LOWER, bool UPPER>
void gram(const float* a, const float* b, int k, float* out, float sign) {
  for (int j = 0; j < C; j += MR) {
    int t = UPPER ? j / VL * VL : 0;
    const int end = LOWER ? round_up(j + MR, VL) : C;
    for (; t + P <= end; t += P) {
      vec acc[MR][NV];
      clear(acc);
      multiply<true, false>(acc, a + j, C, b + t, C, k);
      MNEMOS_UNROLL
      for (int r = 0; r < MR; ++r) {
        MNEMOS_UNROLL
        for (int i = 0; i < NV; ++i) acc[r][i] *= sign;
      }
      store_tile(acc, out + j * C + t, C);
    }
    for (; t < end; t += VL) {
      vec acc[MR][1];
      clear(acc);
      multiply<true, false>(acc, a + j, C, b + t, C, k);
      MNEMOS_UNROLL
      for (int r = 0; r < MR; ++r) acc[r][0] *= sign;
      store_tile(acc, out + j * C + t, C);
    }
  }
}

// out[i][t] = first[t] x[i][t] and out[n + i][t] = second[t] x[i][t], for rows i < n.
MNEMOS_INLINE void scale_lanes(const float* x, const float* first, const float* second, int n, float* out) {
  for (int t = 0; t < C; t += VL) {
    const vec f = load(first + t), s = load(second + t);
    for (int i = 0; i < n; ++i) {
      const vec y = load(x + (ptrdiff_t)i * C + t);
      store(out + (ptrdiff_t)i * C + t, y * f);
      store(out + (ptrdiff_t)(n + i) * C + t, y * s);
    }
  }
}

// a[t][i] = first[t] x[t][i] and b[t][i] = second[t] x[t][i], for i < n.
MNEMOS_INLINE void scale_rows(const float* x, const float* first, const float* second, int n, float* a, float* b) {
  for (int t = 0; t < C; ++t) {
    const vec f = splat(first[t]), s = splat(second[t]);
    for (int i = t * n; i < t * n + n; i += VL) {
      const vec y = load(x + i);
      store(a + i, y * f);
      store(b + i, y * s);
    }
  }
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
