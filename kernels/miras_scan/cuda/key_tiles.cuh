// The parts of gradients.cuh: products of rows of tokens with states and with [64, 64] matrices, as a block of it shares them.
#pragma once

#include "coefficients.cuh"

namespace mnemos::miras_scan {

// Whether a tile holds inputs rather than values. In float32 they are treated alike.
template <class Row, class In>
constexpr bool kIsInput = false;
template <class In>
constexpr bool kIsInput<In, In> = true;

template <class In, int KeyDim>
struct Gradients {
  static constexpr int kGroups = KeyDim / 16;                  // of key dimensions
  static constexpr int kHalves = 2;                            // of the tokens
  static constexpr int kTokenTiles = kChunk / 16 / kHalves;    // of a warp
  static constexpr int kWarps = kGroups * kHalves, kThreads = 32 * kWarps;
  static constexpr int kStride = input_stride(KeyDim);
  static constexpr int kValues = 32;  // columns of v at a time
  static constexpr int kInputStride = kValues + 8, kValueStride = kValues + 8;
  static constexpr int kSums = 6;
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr int kTiles =
      arena_bytes<In>(kChunk * kInputStride) + 2 * arena_bytes<float>(kChunk * kValueStride);
  static constexpr int kShared = 2 * arena_bytes<In>(kChunk * kStride) + 2 * arena_bytes<float>(kChunk * kDown) +
                                 kTiles + arena_bytes<float>(kGateFloats) + arena_bytes<float>(kCoefficientFloats) +
                                 arena_bytes<float>(kSums * kGroups * kChunk) + arena_bytes<float>(2 * kChunk) +
                                 arena_bytes<float>(3 * kWarps);
  static_assert(kTiles >= arena_bytes<float>(kChunk * kAlong) && kTiles >= arena_bytes<float>(kChunk * kDown));
};

// The place of this warp: its first key dimension and its first token.
template <int KeyDim>
MNEMOS_DEVICE int own_keys() {
  return static_cast<int>(threadIdx.x) / 32 % (KeyDim / 16) * 16;
}
template <class In, int KeyDim>
MNEMOS_DEVICE int own_tokens() {
  return static_cast<int>(threadIdx.x) / 32 / (KeyDim / 16) * Gradients<In, KeyDim>::kTokenTiles * 16;
}

// Some tokens by 16 key dimensions.
template <class In, int KeyDim>
struct KeyTiles {
  float tile[Gradients<In, KeyDim>::kTokenTiles][2][4];

  MNEMOS_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < Gradients<In, KeyDim>::kTokenTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) tile[m][n][e] = 0.0f;
      }
    }
  }
};

// product = rows A^T for this warp's key dimensions, where ``rows`` [64, value_dim] are an input or values (taken through
// the two buffers of ``tiles``) and A [key dim, value_dim] lies in global memory. One state at a time: two would need
// twice the registers, and half the blocks would fit.
template <class In, int KeyDim, class Row>
MNEMOS_DEVICE void read_state(KeyTiles<In, KeyDim>& product, unsigned char* tiles, const Row* source,
                              int64_t source_stride, int rows, const float* a, int value_dim) {
  using Sizes = Gradients<In, KeyDim>;
  using A = Arithmetic<In>;
  constexpr int kValues = Sizes::kValues, kTileStride = Sizes::kValueStride;
  constexpr int kBuffer = arena_bytes<float>(kChunk * kTileStride);
  static_assert(2 * kBuffer <= Sizes::kTiles);
  const int own = forget(own_keys<KeyDim>()), top = forget(own_tokens<In, KeyDim>());
  const auto tile_at = [&](int c) { return reinterpret_cast<Row*>(tiles + c / kValues % 2 * kBuffer); };
  const auto fetch = [&](int c) {
    copy_rows<kValues, Sizes::kThreads>(tile_at(c), kTileStride, source + c, source_stride, rows, value_dim - c);
    copy_commit();
  };
  product.clear();
  fetch(0);
  for (int c = 0; c < value_dim; c += kValues) {
    copy_wait<0>();
    // This tile has come, and nobody reads the other any more.
    __syncthreads();
    if (c + kValues < value_dim) fetch(c + kValues);
    const Row* tile = tile_at(c);
#pragma unroll 1
    for (int d = 0; d < kValues; d += 16) {
      if (c + d >= value_dim) break;
      RightWords words[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) words[n] = right_from_rows(a, value_dim, own + 8 * n, c + d);
      // An input meets values as an input; values meet values.
      if constexpr (kIsInput<Row, In>) {
        const auto first = A::against_input(words[0]), second = A::against_input(words[1]);
#pragma unroll
        for (int m = 0; m < Sizes::kTokenTiles; ++m) {
          const auto left = A::left_rows(tile, kTileStride, top + 16 * m, d);
          multiply(product.tile[m][0], left, first);
          multiply(product.tile[m][1], left, second);
        }
      } else {
        const auto first = A::against_value(words[0]), second = A::against_value(words[1]);
#pragma unroll
        for (int m = 0; m < Sizes::kTokenTiles; ++m) {
          const auto left = A::against_value(left_from_rows(tile, kTileStride, top + 16 * m, d));
          multiply(product.tile[m][0], left, first);
          multiply(product.tile[m][1], left, second);
        }
      }
    }
  }
  __syncthreads();
}

// sums[group of key dimensions, 64] = sign rowsum(product o rows of ``keys``), grad += sign weight product.
template <class In, int KeyDim>
MNEMOS_DEVICE void weigh(KeyTiles<In, KeyDim>& grad, float* sums, const KeyTiles<In, KeyDim>& product, const In* keys,
                         const float* weight, float sign) {
  constexpr int kStride = input_stride(KeyDim);
  const int own = forget(own_keys<KeyDim>()), top = forget(own_tokens<In, KeyDim>());
#pragma unroll
  for (int m = 0; m < Gradients<In, KeyDim>::kTokenTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = top + 16 * m + lane_row() + 8 * h;
      const float scale = sign * weight[t];
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float key[2];
        load_pair(key, keys + t * kStride + own + 8 * n + lane_column());
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float p = product.tile[m][n][2 * h + e];
          grad.tile[m][n][2 * h + e] += scale * p;
          sum += p * key[e];
        }
      }
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if ((lane_index() & 3) == 0) sums[own / 16 * kChunk + t] = sign * sum;
    }
  }
}

// grad += square rows, of what is in shared memory: ``square`` [64, 64], written for inputs, or its transpose. Of a
// lower triangle the blocks above the diagonal are not read.
enum class Square { kLower, kLowerTransposed, kFull };
template <Square Kind, class In, int KeyDim>
MNEMOS_DEVICE void add_square(KeyTiles<In, KeyDim>& grad, const uint32_t* square, const In* keys) {
  using A = Arithmetic<In>;
  const int own = forget(own_keys<KeyDim>()), top = forget(own_tokens<In, KeyDim>());
#pragma unroll 1
  for (int d = 0; d < kChunk; d += 16) {
    typename A::InputRight right[2];
    A::right_columns(right, keys, input_stride(KeyDim), d, own);
#pragma unroll
    for (int m = 0; m < Gradients<In, KeyDim>::kTokenTiles; ++m) {
      const int row = top + 16 * m;
      if (Kind == Square::kLower ? d > row : Kind == Square::kLowerTransposed && d < row) continue;
      const auto left = A::written_for_input(Kind == Square::kLowerTransposed
                                                 ? left_from_columns(square, kAlong, d, row)
                                                 : left_from_rows(square, kAlong, row, d));
      multiply(grad.tile[m][0], left, right[0]);
      multiply(grad.tile[m][1], left, right[1]);
    }
  }
}

template <class In, int KeyDim>
MNEMOS_DEVICE void store_rows(In* p, int stride, const KeyTiles<In, KeyDim>& x, int rows) {
  p += own_keys<KeyDim>() + lane_column();
#pragma unroll
  for (int m = 0; m < Gradients<In, KeyDim>::kTokenTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = own_tokens<In, KeyDim>() + 16 * m + lane_row() + 8 * h;
      if (t >= rows) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        Arithmetic<In>::store2(p + static_cast<int64_t>(t) * stride + 8 * n, x.tile[m][n][2 * h], x.tile[m][n][2 * h + 1]);
      }
    }
  }
}

}  // namespace mnemos::miras_scan
