// The costs of all merges of two halves by register tiles, of which only the least of each row is kept.
#pragma once

#include "common/cpu/simd.h"
#include "store_slots/cpu/kernels.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

using store_slots::Half;
using store_slots::Kernels;
using store_slots::padded;

constexpr float kInfinity = __builtin_inff();

// Transposes the keys, and sums their squares in the order in which a product is summed: of equal keys the squared
// distance is 0 then, and not what rounding leaves.
void pack(const Half& half, int dim) {
  const int columns = padded(half.count);
  for (int first = 0; first < columns; first += VL) {
    for (int i = 0; i < dim; i += VL) {
      vec square[VL];
      MNEMOS_UNROLL
      for (int r = 0; r < VL; ++r) square[r] = first + r < half.count ? load(half.keys[first + r] + i) : vec{};
      transpose(square);
      MNEMOS_UNROLL
      for (int r = 0; r < VL; ++r) store(half.packed + (ptrdiff_t)(i + r) * columns + first, square[r]);
    }
    vec sum = {};
    for (int i = 0; i < dim; ++i) {
      const vec x = load(half.packed + (ptrdiff_t)i * columns + first);
      sum += x * x;
    }
    const ivec here = lanes(first) < half.count - ivec{};
    store(half.squares + first, here ? sum : splat(kInfinity));
  }
}

// The least cost of each lane of MR rows so far, and whose it is.
struct Least {
  vec cost[MR];
  ivec at[MR];
};

// Against N vectors of keys, from `column` on.
template <int N>
MNEMOS_INLINE void compare(const Half& first, const Half& second, int dim, int top, int column, Least& least) {
  const int rows = padded(first.count), columns = padded(second.count);
  vec products[MR][N];
  clear(products);
  multiply<true, false>(products, first.packed + top, rows, second.packed + column, columns, dim);
  MNEMOS_UNROLL
  for (int n = 0; n < N; ++n) {
    const int j = column + n * VL;
    const vec squares = load(second.squares + j), weights = load(second.inverse_weights + j);
    const vec roots = load(second.inverse_roots + j);
    const ivec index = lanes(j);
    MNEMOS_UNROLL
    for (int r = 0; r < MR; ++r) {
      const int i = top + r;
      const vec apart = splat(first.squares[i]) + squares - (products[r][n] + products[r][n]);
      const vec root = splat(first.inverse_roots[i]);
      // w u / (w + u) for weights w and u, over the root of the younger's age.
      const vec found = (apart < 0 ? vec{} : apart) * (root > roots ? root : roots) /
                        (splat(first.inverse_weights[i]) + weights);
      const ivec better = found < least.cost[r];
      least.cost[r] = better ? found : least.cost[r];
      least.at[r] = better ? index : least.at[r];
    }
  }
}

void nearest(const Half& first, const Half& second, int dim, int begin, int end, float* cost, int32_t* partner) {
  static_assert(store_slots::kPadding % (NV * VL / 2) == 0 && NV % 2 == 0 && store_slots::kDimMultiple % VL == 0);
  const int rows = padded(first.count), columns = padded(second.count);
  for (int row = begin; row < end; row += MR) {
    // The last rows of a tile may be those of the padding, or of the tile before.
    const int top = row + MR <= rows ? row : rows - MR;
    Least least;
    MNEMOS_UNROLL
    for (int r = 0; r < MR; ++r) least.cost[r] = splat(kInfinity), least.at[r] = ivec{};
    int column = 0;
    for (; column + NV * VL <= columns; column += NV * VL) compare<NV>(first, second, dim, top, column, least);
    if (column < columns) compare<NV / 2>(first, second, dim, top, column, least);
    for (int r = row - top; r < MR && top + r < end; ++r) {
      float best = kInfinity;
      int32_t which = 0;
      for (int i = 0; i < VL; ++i)
        if (least.cost[r][i] < best || (least.cost[r][i] == best && best < kInfinity && least.at[r][i] < which))
          best = least.cost[r][i], which = least.at[r][i];
      cost[top + r] = best;
      partner[top + r] = which;
    }
  }
}

void narrow(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += VL) store(reinterpret_cast<Bfloat16*>(to + i), load(from + i));
}

constexpr Kernels kKernels = {pack, nearest, narrow};

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
