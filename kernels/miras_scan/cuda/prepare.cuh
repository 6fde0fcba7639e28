// What a chunk needs that does not depend on the state: one block per (row, chunk), where a row is a batch entry and head.
//
//   forward    (I + T)^-1, T = (K K^T) o G^-, strictly lower;  -(Q K^T) o G, which multiplies the residuals in y
//   backward   (I + T)^-T;  -((Q K^T) o G)^T dY, which is the gradient of the residuals through y
//   both       the coefficients
#pragma once

#include "coefficients.cuh"

namespace mnemos::miras_scan {

template <class In>
struct PrepareArguments {
  Span span;
  Gates gates;
  const In* q;
  const In* k;
  const In* grad_y;    // backward
  float* inverse;      // [rows, chunks, 64, 64]
  float* pairs;        // [rows, chunks, 64, 64], blocks of 16 on and below the diagonal; forward
  float* update;       // [rows, chunks, 64, value_dim]; backward
  float* coefficients; // [rows, chunks, 8, 64]
};

template <class In, int KeyDim, bool Backward>
struct Prepare {
  static constexpr int kThreads = 128, kWarps = 4;
  static constexpr int kStride = input_stride(KeyDim);
  static constexpr int kValues = 64;  // columns of dY at a time
  static constexpr int kValueStride = input_stride(kValues);
  // Q and K are read before the inverse is made and dY is loaded.
  static constexpr int kInputs = 2 * arena_bytes<In>(kChunk * kStride);
  static constexpr int kLater =
      arena_bytes<float>(kChunk * kDown) + (Backward ? arena_bytes<In>(kChunk * kValueStride) : 0);
  static constexpr int kShared = (kInputs > kLater ? kInputs : kLater) + 2 * arena_bytes<float>(kChunk * kDown) +
                                 arena_bytes<float>(kGateFloats) + arena_bytes<float>(kCoefficientFloats);
};

// (I + T)^-1 of strictly lower T by blocks of 16: those on the diagonal by substitution, a warp each, then the block
// diagonals below, the farther from the diagonal the later. Blocks above the diagonal are left with what was in between.
MNEMOS_DEVICE void invert(float* inverse, const float* lower) {
  constexpr int kThreads = 128;
  const int thread = threadIdx.x;
  const int lane = lane_index();
  if (lane < 16) {
    const int first = thread / 32 * 16;
    float x[16];
#pragma unroll
    for (int r = 0; r < 16; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < r; ++i) sum += lower[(first + r) * kDown + first + i] * x[i];
      x[r] = (r == lane ? 1.0f : 0.0f) - sum;
    }
#pragma unroll
    for (int r = 0; r < 16; ++r) inverse[(first + r) * kDown + first + lane] = x[r];
  }
  __syncthreads();

  for (int distance = 1; distance < 4; ++distance) {
    const int tasks = (4 - distance) * 64;  // four columns of a block's row each
    for (int step = 0; step < 2; ++step) {
      for (int task = thread; task < tasks; task += kThreads) {
        const int column = task / 64 * 16, row = column + distance * 16;
        const int r = task % 64 / 4, c = task % 4 * 4;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        // First T times what is above the block in its column, kept in the mirrored block; then the diagonal's times that.
        const float* left = step == 0 ? lower + (row + r) * kDown + column : inverse + (row + r) * kDown + row;
        const float* right = step == 0 ? inverse + column * kDown + column + c : inverse + column * kDown + row + c;
        const int depth = step == 0 ? distance * 16 : 16;
#pragma unroll 8
        for (int i = 0; i < depth; ++i) {
          const Words4 x = load_vector<Words4>(right + i * kDown);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[e] += left[i] * as_float(x.x[e]);
        }
        const float sign = step == 0 ? 1.0f : -1.0f;
        float* to = step == 0 ? inverse + (column + r) * kDown + row + c : inverse + (row + r) * kDown + column + c;
        store_vector(to, Words4{{as_bits(sign * sum[0]), as_bits(sign * sum[1]), as_bits(sign * sum[2]),
                                 as_bits(sign * sum[3])}});
      }
      __syncthreads();
    }
  }
}

template <class In, int KeyDim, bool Backward>
__global__ void __launch_bounds__(128) prepare_kernel(const PrepareArguments<In> x) {
  using Sizes = Prepare<In, KeyDim, Backward>;
  using A = Arithmetic<In>;
  constexpr int kThreads = Sizes::kThreads, kStride = Sizes::kStride;
  const Span& s = x.span;
  const int row = blockIdx.y, chunk = s.first + blockIdx.x;
  const int rows = chunk_rows(s, chunk), last = rows - 1;
  const int64_t slot = chunk_slot(s, row, chunk);
  const int thread = threadIdx.x, warp = thread / 32;

  Arena arena{shared_memory()};
  float* update = arena.take<float>(kChunk * kDown);
  float* lower = arena.take<float>(kChunk * kDown);
  float* gates = arena.take<float>(kGateFloats);
  float* coefficients = arena.take<float>(kCoefficientFloats);
  Arena later = arena;
  In* k = arena.take<In>(kChunk * kStride);
  In* q = arena.take<In>(kChunk * kStride);
  float* inverse = later.take<float>(kChunk * kDown);

  const int64_t stride = static_cast<int64_t>(s.heads) * KeyDim;
  const int64_t origin = token_row(s, row, chunk * kChunk) * KeyDim;
  copy_rows<KeyDim, kThreads>(k, kStride, x.k + origin, stride, rows, KeyDim);
  copy_rows<KeyDim, kThreads>(q, kStride, x.q + origin, stride, rows, KeyDim);
  copy_commit();
  load_gates(gates, x.gates, s, row, chunk);
  __syncthreads();
  update_columns<false>(update, nullptr, coefficients, gates, last);
  if (thread == kChunk) state_weights(coefficients, gates, last);
  copy_wait<0>();
  __syncthreads();

  constexpr int kBlocks = (kLowerBlocks + Sizes::kWarps - 1) / Sizes::kWarps;
  float pairs[kBlocks][2][4];
#pragma unroll
  for (int u = 0; u < kBlocks; ++u) {
    const int block = warp + u * Sizes::kWarps;
    if (block >= kLowerBlocks) continue;
    const int top = 16 * lower_row(block), left = 16 * lower_column(block);
    float keys[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[u][n][e] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < KeyDim; d += 16) {
      typename A::InputRight right[2];
      A::right_rows(right, k, kStride, left, d);
      const auto from_k = A::left_rows(k, kStride, top, d);
      const auto from_q = A::left_rows(q, kStride, top, d);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply(keys[n], from_k, right[n]);
        multiply(pairs[u][n], from_q, right[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = top + lane_row() + 8 * (e >> 1), j = left + 8 * n + lane_column() + (e & 1);
        const float before = j < t ? gates[kKeep * kChunk + t] * update[(t - 1) * kDown + j] : 0.0f;
        lower[t * kDown + j] = keys[n][e] * before;
        pairs[u][n][e] *= -update[t * kDown + j];
      }
    }
  }
  __syncthreads();

#pragma unroll
  for (int u = 0; u < kBlocks; ++u) {
    const int block = warp + u * Sizes::kWarps;
    if (block >= kLowerBlocks) continue;
    const int top = 16 * lower_row(block) + lane_row(), left = 16 * lower_column(block) + lane_column();
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int t = top + 8 * h, j = left + 8 * n;
        const float first = pairs[u][n][2 * h], second = pairs[u][n][2 * h + 1];
        if constexpr (Backward) {
          store_vector(update + t * kDown + j, Words2{{A::word_for_input(first), A::word_for_input(second)}});
        } else {
          store_vector(x.pairs + slot * kSquare + t * kChunk + j,
                       Words2{{A::word_for_value(first), A::word_for_value(second)}});
        }
      }
    }
  }
  invert(inverse, lower);

  for (int i = thread; i < kSquare / 4; i += kThreads) {
    const int t = i / (kChunk / 4), j = i % (kChunk / 4) * 4;
    uint32_t out[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = j + e;
      float value = 0.0f;
      if (Backward ? t <= column : column <= t) value = inverse[Backward ? column * kDown + t : t * kDown + column];
      out[e] = A::word_for_value(value);
    }
    store_vector(x.inverse + slot * kSquare + t * kChunk + j, Words4{{out[0], out[1], out[2], out[3]}});
  }
  for (int i = thread; i < kCoefficientFloats; i += kThreads) {
    x.coefficients[slot * kCoefficientFloats + i] = coefficients[i];
  }

  if constexpr (Backward) {
    In* grad_y = later.take<In>(kChunk * Sizes::kValueStride);
    const int64_t value_stride = static_cast<int64_t>(s.heads) * s.value_dim;
    const In* source = x.grad_y + token_row(s, row, chunk * kChunk) * s.value_dim;
    for (int c = 0; c < s.value_dim; c += Sizes::kValues) {
      const int columns = s.value_dim - c < Sizes::kValues ? s.value_dim - c : Sizes::kValues;
      copy_rows<Sizes::kValues, kThreads>(grad_y, Sizes::kValueStride, source + c, value_stride, rows, columns);
      copy_commit();
      copy_wait<0>();
      __syncthreads();
      float sum[8][4] = {};
      for (int d = 16 * warp; d < kChunk; d += 16) {
        const auto left = A::written_for_input(left_from_columns(update, kDown, d, 16 * warp));
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          typename A::InputRight right[2];
          A::right_columns(right, grad_y, Sizes::kValueStride, d, 8 * n);
          multiply(sum[n], left, right[0]);
          multiply(sum[n + 1], left, right[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int column = 8 * n + lane_column();
        if (column >= columns) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int t = 16 * warp + lane_row() + 8 * h;
          store_vector(x.update + (slot * kChunk + t) * s.value_dim + c + column,
                       Words2{{as_bits(sum[n][2 * h]), as_bits(sum[n][2 * h + 1])}});
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace mnemos::miras_scan
