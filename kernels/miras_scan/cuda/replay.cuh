// States before every chunk from those kept every few chunks, for the backward pass: one block per (row, kept state,
// slice of 16 columns of v). The residuals are known, so that only the update is done again, in the same order.
#pragma once

#include "states.cuh"

namespace mnemos::miras_scan {

template <class In>
struct ReplayArguments {
  Span span;
  const In* k;
  const float* coefficients;
  const float* residuals;  // [rows, tokens, value_dim]
  const float* kept;       // [rows, kept_chunks, 2, key dim, value_dim]
  int kept_every;          // chunks; the span starts at a multiple of it
  int kept_chunks;
  float* starts;
};

template <class In, int KeyDim>
struct Replay {
  static constexpr int kThreads = SliceShape<KeyDim>::kThreads;
  static constexpr int kShared = arena_bytes<In>(kChunk * input_stride(KeyDim)) +
                                 arena_bytes<float>(kCoefficientFloats) + 2 * arena_bytes<float>(kSlice * kAlong);
};

template <class In, int KeyDim>
__global__ void __launch_bounds__(SliceShape<KeyDim>::kThreads, 1) replay_kernel(const ReplayArguments<In> x) {
  using A = Arithmetic<In>;
  constexpr int kThreads = SliceShape<KeyDim>::kThreads;
  const Span& s = x.span;
  const int column = blockIdx.x * kSlice, begin = blockIdx.y * x.kept_every, row = blockIdx.z;
  const int end = begin + x.kept_every < s.chunks ? begin + x.kept_every : s.chunks;
  const int64_t state_size = static_cast<int64_t>(KeyDim) * s.value_dim;

  Arena arena{shared_memory()};
  In* k = arena.take<In>(kChunk * input_stride(KeyDim));
  float* coefficients = arena.take<float>(kCoefficientFloats);
  uint32_t* for_memory = arena.take<uint32_t>(kSlice * kAlong);
  uint32_t* for_momentum = arena.take<uint32_t>(kSlice * kAlong);

  const float* kept =
      x.kept + (static_cast<int64_t>(row) * x.kept_chunks + (s.first + begin) / x.kept_every) * 2 * state_size + column;
  SliceState<KeyDim> memory, momentum;
  memory.load(kept, s.value_dim);
  momentum.load(kept + state_size, s.value_dim);
  for (int i = begin; i < end; ++i) {
    const int chunk = s.first + i, rows = chunk_rows(s, chunk);
    const int64_t slot = chunk_slot(s, row, chunk);
    float* start = x.starts + slot * 2 * state_size + column;
    memory.store(start, s.value_dim);
    momentum.store(start + state_size, s.value_dim);
    if (i + 1 == end) break;

    copy_rows<KeyDim, kThreads>(k, input_stride(KeyDim), x.k + token_row(s, row, chunk * kChunk) * KeyDim,
                                static_cast<int64_t>(s.heads) * KeyDim, rows, KeyDim);
    copy_floats<kCoefficientFloats, kThreads>(coefficients, x.coefficients + slot * kCoefficientFloats);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    const float* residuals = x.residuals + (static_cast<int64_t>(row) * s.tokens + chunk * kChunk) * s.value_dim + column;
    for (int j = threadIdx.x; j < kSlice * kChunk; j += kThreads) {
      const int t = j / kSlice, c = j % kSlice;
      const float r = t < rows ? residuals[static_cast<int64_t>(t) * s.value_dim + c] : 0.0f;
      for_memory[c * kAlong + t] = A::word_for_input(-coefficients[kUpdateMemory * kChunk + t] * r);
      for_momentum[c * kAlong + t] = A::word_for_input(-coefficients[kUpdateMomentum * kChunk + t] * r);
    }
    __syncthreads();
    SliceUpdate<In, KeyDim> chunk_update;
    chunk_update.add(for_memory, for_momentum, k);
    advance_slice<In, KeyDim>(memory, momentum, coefficients + kEnd * kChunk, chunk_update);
    __syncthreads();
  }
}

}  // namespace mnemos::miras_scan
