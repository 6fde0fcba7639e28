// The costs of all merges of two halves by register tiles, of which only the least of each row is kept.
#pragma once

#include "common/cpu/simd.h"
#include "store_slots/cpu/kernels.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

using store_slots::Half;
using store_slots::padded;

constexpr float kInfinity = __builtin_inff();

// Transposes the keys, and sums their squares in the order in which a product is summed: of equal keys the squared
// distance is 0 then, and not what rounding leaves.
MNEMOS_INLINE void pack(const Half& half, int dim) {
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

void run_nearest(const Half& first, const Half& second, int dim, float* cost, int32_t* partner) {
  static_assert(store_slots::kPadding % (NV * VL) == 0 && store_slots::kDimMultiple % VL == 0);
  pack(first, dim);
  pack(second, dim);
  const int rows = padded(first.count), columns = padded(second.count);
  for (int row = 0; row < first.count; row += MR) {
    // The last rows of a tile may be those of the padding, or of the tile before.
    const int top = row + MR <= rows ? row : rows - MR;
    vec least[MR];
    ivec at[MR];
    MNEMOS_UNROLL
    for (int r = 0; r < MR; ++r) least[r] = splat(kInfinity), at[r] = ivec{};
    for (int column = 0; column < columns; column += NV * VL) {
      vec products[MR][NV];
      clear(products);
      multiply<true, false>(products, first.packed + top, rows, second.packed + column, columns, dim);
      MNEMOS_UNROLL
      for (int n = 0; n < NV; ++n) {
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
          const ivec better = found < least[r];
          least[r] = better ? found : least[r];
          at[r] = better ? index : at[r];
        }
      }
    }
    for (int r = 0; r < MR; ++r) {
      if (top + r >= first.count) break;
      float best = kInfinity;
      int32_t which = 0;
      for (int i = 0; i < VL; ++i)
        if (least[r][i] < best || (least[r][i] == best && best < kInfinity && at[r][i] < which))
          best = least[r][i], which = at[r][i];
      cost[top + r] = best;
      partner[top + r] = which;
    }
  }
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
