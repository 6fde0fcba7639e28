// y = beta Q M + f Q S - ((Q K^T) o G) R for every chunk by itself: one block per (row, chunk, 64 columns of v).
//
// Each warp has 16 columns for all 64 tokens and reads its part of M, S and R straight from global memory, once, as
// right operands: an even and an odd column a lane, so that a lane ends with four neighbouring columns of y.
#pragma once

#include "tiles.cuh"

namespace mnemos::miras_scan {

template <class In>
struct OutputsArguments {
  Span span;
  const In* q;
  const float* pairs;         // -(Q K^T) o G, rounded; blocks of 16 on and below the diagonal
  const float* coefficients;
  const float* starts;        // as in StatesArguments
  int start_chunks;
  int start_first;
  const float* residuals;     // as in StatesArguments
  int residual_tokens;
  int residual_first;
  In* y;
};

template <class In, int KeyDim>
struct Outputs {
  static constexpr int kThreads = 128, kColumns = 64;
  static constexpr int kShared = arena_bytes<In>(kChunk * input_stride(KeyDim)) + arena_bytes<float>(kChunk * kAlong) +
                                 arena_bytes<float>(2 * kChunk);
};

// Rows depth .. depth + 15 of a [.., stride] matrix, two right operands: even columns of the 16 from ``p``, and odd ones.
// Rows from ``rows`` on are zero.
MNEMOS_DEVICE void right_column_pairs(RightWords (&result)[2], const float* p, int64_t stride, int depth, int rows) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = depth + lane_column() + (i & 1) + 8 * (i >> 1);
    Words2 pair{{0, 0}};
    if (row < rows) pair = load_vector<Words2>(p + row * stride + 2 * lane_row());
    result[0].w[i] = pair.x[0];
    result[1].w[i] = pair.x[1];
  }
}

template <class In, int KeyDim>
__global__ void __launch_bounds__(128) outputs_kernel(const OutputsArguments<In> x) {
  using Sizes = Outputs<In, KeyDim>;
  using A = Arithmetic<In>;
  constexpr int kThreads = Sizes::kThreads, kStride = input_stride(KeyDim);
  const Span& s = x.span;
  const int row = blockIdx.z, chunk = s.first + blockIdx.x, rows = chunk_rows(s, chunk);
  const int thread = threadIdx.x, warp = thread / 32;
  const int column = blockIdx.y * Sizes::kColumns + 16 * warp;
  const int64_t slot = chunk_slot(s, row, chunk), token = token_row(s, row, chunk * kChunk);

  Arena arena{shared_memory()};
  In* q = arena.take<In>(kChunk * kStride);
  float* pairs = arena.take<float>(kChunk * kAlong);
  float* weights = arena.take<float>(2 * kChunk);
  static_assert(kBeta == 0 && kMomentumInMemory == 1);
  copy_rows<KeyDim, kThreads>(q, kStride, x.q + token * KeyDim, static_cast<int64_t>(s.heads) * KeyDim, rows, KeyDim);
  copy_lower_blocks<kThreads>(pairs, kAlong, x.pairs + slot * kSquare);
  copy_floats<2 * kChunk, kThreads>(weights, x.coefficients + slot * kCoefficientFloats);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  if (column >= s.value_dim) return;

  const float* memory = x.starts +
                        (static_cast<int64_t>(row) * x.start_chunks + chunk - x.start_first) * 2 * KeyDim * s.value_dim +
                        column;
  const float* momentum = memory + static_cast<int64_t>(KeyDim) * s.value_dim;
  float sum[4][2][4] = {}, second[4][2][4] = {};
#pragma unroll 2
  for (int d = 0; d < KeyDim; d += 16) {
    RightWords words[2];
    right_column_pairs(words, memory, s.value_dim, d, KeyDim);
    const auto memory_even = A::against_input(words[0]), memory_odd = A::against_input(words[1]);
    right_column_pairs(words, momentum, s.value_dim, d, KeyDim);
    const auto momentum_even = A::against_input(words[0]), momentum_odd = A::against_input(words[1]);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const auto left = A::left_rows(q, kStride, 16 * m, d);
      multiply(sum[m][0], left, memory_even);
      multiply(sum[m][1], left, memory_odd);
      multiply(second[m][0], left, momentum_even);
      multiply(second[m][1], left, momentum_odd);
    }
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = 16 * m + lane_row() + 8 * h;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          sum[m][n][e] = weights[t] * sum[m][n][e] + weights[kChunk + t] * second[m][n][e];
        }
      }
    }
  }

  const float* residuals =
      x.residuals +
      (static_cast<int64_t>(row) * x.residual_tokens + chunk * kChunk - x.residual_first) * s.value_dim + column;
#pragma unroll
  for (int d = 0; d < kChunk; d += 16) {
    RightWords words[2];
    right_column_pairs(words, residuals, s.value_dim, d, rows);
    const auto even = A::against_value(words[0]), odd = A::against_value(words[1]);
#pragma unroll
    for (int m = d / 16; m < 4; ++m) {
      const auto left = A::written_for_value(left_from_rows(pairs, kAlong, 16 * m, d));
      multiply(sum[m][0], left, even);
      multiply(sum[m][1], left, odd);
    }
  }

  In* y = x.y + token * s.value_dim + column + 2 * lane_column();
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int t = 16 * m + lane_row() + 8 * h;
      if (t >= rows) continue;
      A::store4(y + static_cast<int64_t>(t) * s.heads * s.value_dim, sum[m][0][2 * h], sum[m][1][2 * h],
                sum[m][0][2 * h + 1], sum[m][1][2 * h + 1]);
    }
  }
}

}  // namespace mnemos::miras_scan
