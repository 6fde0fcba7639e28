// The recurrence of the backward pass, from the last chunk to the first: one block per (row, slice of 16 columns of v)
// carries that slice of dM and dS, the gradients of the states after a chunk.
//
//   U = -((Q K^T) o G)^T dY - G_C (K dM) - E_C (K dS)        gradient of R; its first term comes from prepare.cuh
//   L = (I + T)^-T U                                         gradient of the right-hand side of the triangular system
//   dM' = beta_C dM + Q^T (beta dY) + K^T (beta^- L)
//   dS' = f_C dM + m_C dS + Q^T (f dY) + K^T (f^- L)
#pragma once

#include "states.cuh"

namespace mnemos::miras_scan {

template <class In>
struct AdjointArguments {
  Span span;
  const In* q;
  const In* k;
  const In* grad_y;
  const float* inverse;       // transposed
  const float* coefficients;
  const float* grad_memory;   // after the span, [rows, key dim, value_dim], as grad_momentum
  const float* grad_momentum;
  float* grad_memory_before;  // may be the same
  float* grad_momentum_before;
  float* update;  // [rows, chunks, 64, value_dim]: the first term of U, replaced by L
  float* after;   // (dM, dS) after every chunk of the span, [rows, chunks, 2, key dim, value_dim]
};

template <class In, int KeyDim>
struct Adjoint {
  static constexpr int kThreads = SliceShape<KeyDim>::kThreads, kWarps = SliceShape<KeyDim>::kWarps;
  // Two stages of float32 inputs would not fit the 163 KB of sm_80.
  static constexpr int kStages = sizeof(In) == 2 ? 2 : 1;
  static constexpr int kValueStride = input_stride(kSlice);
  static constexpr int kUpdateStride = kSlice + 4;
  static constexpr int kStage = 2 * arena_bytes<In>(kChunk * input_stride(KeyDim)) +
                                arena_bytes<float>(kChunk * kAlong) + arena_bytes<In>(kChunk * kValueStride) +
                                arena_bytes<float>(kChunk * kUpdateStride) + arena_bytes<float>(kCoefficientFloats);
  static constexpr int kShared = kStages * kStage + (kWarps + 4) * arena_bytes<float>(kSlice * kAlong);
};

template <class In, int KeyDim>
__global__ void __launch_bounds__(SliceShape<KeyDim>::kThreads, 1) adjoint_kernel(const AdjointArguments<In> x) {
  using Sizes = Adjoint<In, KeyDim>;
  using Shape = SliceShape<KeyDim>;
  using A = Arithmetic<In>;
  constexpr int kThreads = Sizes::kThreads, kValueStride = Sizes::kValueStride;
  const Span& s = x.span;
  const int row = blockIdx.y, column = blockIdx.x * kSlice;
  const int thread = threadIdx.x, warp = thread / 32;
  const int64_t state_size = static_cast<int64_t>(KeyDim) * s.value_dim;

  Arena arena{shared_memory() + Sizes::kStages * Sizes::kStage};
  float* partial = arena.take<float>(Sizes::kWarps * kSlice * kAlong);
  uint32_t* from_y_memory = arena.take<uint32_t>(kSlice * kAlong);
  uint32_t* from_y_momentum = arena.take<uint32_t>(kSlice * kAlong);
  uint32_t* from_solve_memory = arena.take<uint32_t>(kSlice * kAlong);
  uint32_t* from_solve_momentum = arena.take<uint32_t>(kSlice * kAlong);

  struct Stage {
    In* k;
    In* q;
    float* inverse;
    In* grad_y;
    float* update;
    float* coefficients;
  };
  const auto stage = [](int i) {
    Arena part{shared_memory() + i % Sizes::kStages * Sizes::kStage};
    Stage result;
    result.k = part.take<In>(kChunk * input_stride(KeyDim));
    result.q = part.take<In>(kChunk * input_stride(KeyDim));
    result.inverse = part.take<float>(kChunk * kAlong);
    result.grad_y = part.take<In>(kChunk * kValueStride);
    result.update = part.take<float>(kChunk * Sizes::kUpdateStride);
    result.coefficients = part.take<float>(kCoefficientFloats);
    return result;
  };
  const auto fetch = [&](int i) {
    const Stage to = stage(i);
    const int chunk = s.first + i, rows = chunk_rows(s, chunk);
    const int64_t slot = chunk_slot(s, row, chunk), token = token_row(s, row, chunk * kChunk);
    const int64_t key_stride = static_cast<int64_t>(s.heads) * KeyDim;
    copy_rows<KeyDim, kThreads>(to.k, input_stride(KeyDim), x.k + token * KeyDim, key_stride, rows, KeyDim);
    copy_rows<KeyDim, kThreads>(to.q, input_stride(KeyDim), x.q + token * KeyDim, key_stride, rows, KeyDim);
    copy_rows<kChunk, kThreads>(to.inverse, kAlong, x.inverse + slot * kSquare, kChunk, kChunk, kChunk);
    copy_rows<kSlice, kThreads>(to.grad_y, kValueStride, x.grad_y + token * s.value_dim + column,
                                static_cast<int64_t>(s.heads) * s.value_dim, rows, kSlice);
    copy_rows<kSlice, kThreads>(to.update, Sizes::kUpdateStride, x.update + slot * kChunk * s.value_dim + column,
                                s.value_dim, kChunk, kSlice);
    copy_floats<kCoefficientFloats, kThreads>(to.coefficients, x.coefficients + slot * kCoefficientFloats);
    copy_commit();
  };

  fetch(s.chunks - 1);
  SliceState<KeyDim> memory, momentum;
  memory.load(x.grad_memory + row * state_size + column, s.value_dim);
  momentum.load(x.grad_momentum + row * state_size + column, s.value_dim);

  for (int i = s.chunks - 1; i >= 0; --i) {
    const Stage now = stage(i);
    const int64_t slot = chunk_slot(s, row, s.first + i);
    copy_wait<0>();
    __syncthreads();
    if (Sizes::kStages > 1 && i > 0) fetch(i - 1);

    float* after = x.after + slot * 2 * state_size + column;
    memory.store(after, s.value_dim);
    momentum.store(after + state_size, s.value_dim);

    const float* c = now.coefficients;
    read_slice<In, KeyDim>(partial + warp * kSlice * kAlong, memory, momentum, now.k, c + kUpdateMemory * kChunk,
                           c + kUpdateMomentum * kChunk);
    __syncthreads();

    for (int j = thread; j < kSlice * kChunk; j += kThreads) {
      const int v = j / kChunk, t = j % kChunk;
      float sum = now.update[t * Sizes::kUpdateStride + v];
#pragma unroll
      for (int w = 0; w < Sizes::kWarps; ++w) sum -= partial[(w * kSlice + v) * kAlong + t];
      partial[v * kAlong + t] = as_float(A::word_for_value(sum));
      const float grad_y = to_float(now.grad_y[t * kValueStride + v]);
      from_y_memory[v * kAlong + t] = A::word_for_input(c[kBeta * kChunk + t] * grad_y);
      from_y_momentum[v * kAlong + t] = A::word_for_input(c[kMomentumInMemory * kChunk + t] * grad_y);
    }
    __syncthreads();

    float solved[Shape::kTokens / 8][4];
    solve_slice<In, KeyDim, false>(solved, partial, now.inverse);
    float* update = x.update + slot * kChunk * s.value_dim + column;
#pragma unroll
    for (int n = 0; n < Shape::kTokens / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = warp * Shape::kTokens + 8 * n + lane_column() + (e & 1), v = lane_row() + 8 * (e >> 1);
        update[static_cast<int64_t>(t) * s.value_dim + v] = solved[n][e];
        from_solve_memory[v * kAlong + t] = A::word_for_input(c[kBetaBefore * kChunk + t] * solved[n][e]);
        from_solve_momentum[v * kAlong + t] = A::word_for_input(c[kMomentumInMemoryBefore * kChunk + t] * solved[n][e]);
      }
    }

    SliceUpdate<In, KeyDim> chunk_update;
    chunk_update.add(from_y_memory, from_y_momentum, now.q);
    __syncthreads();
    chunk_update.add(from_solve_memory, from_solve_momentum, now.k);
    // The transpose of advance_slice.
    const float* end = c + kEnd * kChunk;
#pragma unroll
    for (int n = 0; n < Shape::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float m = memory.tile[n][e], s = momentum.tile[n][e];
        momentum.tile[n][e] = end[2] * s + (end[1] * m + chunk_update.momentum.tile[n][e]);
        memory.tile[n][e] = end[0] * m + chunk_update.memory.tile[n][e];
      }
    }
    if (Sizes::kStages == 1 && i > 0) {
      __syncthreads();
      fetch(i - 1);
    }
  }
  memory.store(x.grad_memory_before + row * state_size + column, s.value_dim);
  momentum.store(x.grad_momentum_before + row * state_size + column, s.value_dim);
}

}  // namespace mnemos::miras_scan
