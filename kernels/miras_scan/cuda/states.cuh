// The recurrence over chunks: one block per (row, slice of 16 columns of v) carries that slice of M and S in registers.
//
//   R = (I + T)^-1 (beta^- K M + f^- K S - V)
//   M' = beta_C M + f_C S - (G_C K)^T R,   S' = m_C S - (E_C K)^T R
//
// The states are held transposed, columns of v by key dimensions, each warp with some of the key dimensions. As
// accumulators they are the left operand of the product with K^T as they stand; its sum over warps is all that passes
// through shared memory.
#pragma once

#include "tiles.cuh"

namespace mnemos::miras_scan {

// How many warps share the key dimensions of a slice, and what each has: groups of 16 dimensions, two tiles each.
template <int KeyDim>
struct SliceShape {
  static constexpr int kWarps = KeyDim >= 64 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kOwn = KeyDim / kWarps;
  static constexpr int kTiles = kOwn / 8;
  static constexpr int kTokens = kChunk / kWarps;  // of the triangular product
};

// A slice of M or S, transposed: [16 columns of v, the warp's key dimensions].
template <int KeyDim>
struct SliceState {
  float tile[SliceShape<KeyDim>::kTiles][4];

  // ``p`` points at the slice's first column in [KeyDim, value_dim].
  MNEMOS_DEVICE void load(const float* p, int value_dim) {
    visit([&](float& x, int64_t at) { x = p[at]; }, value_dim);
  }
  MNEMOS_DEVICE void store(float* p, int value_dim) {
    visit([&](float& x, int64_t at) { p[at] = x; }, value_dim);
  }

 private:
  template <class Function>
  MNEMOS_DEVICE void visit(Function function, int value_dim) {
    const int first = static_cast<int>(threadIdx.x) / 32 * SliceShape<KeyDim>::kOwn;
#pragma unroll
    for (int n = 0; n < SliceShape<KeyDim>::kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int d = first + 8 * n + lane_column() + (e & 1), c = lane_row() + 8 * (e >> 1);
        function(tile[n][e], static_cast<int64_t>(d) * value_dim + c);
      }
    }
  }
};

// partial[16, 64] of this warp = memory_weight o (M^T K^T) + momentum_weight o (S^T K^T), its key dimensions only.
template <class In, int KeyDim>
MNEMOS_DEVICE void read_slice(float* partial, const SliceState<KeyDim>& memory, const SliceState<KeyDim>& momentum,
                              const In* k, const float* memory_weight, const float* momentum_weight) {
  using A = Arithmetic<In>;
  using Shape = SliceShape<KeyDim>;
  constexpr int kGroups = Shape::kTiles / 2;
  const int first = static_cast<int>(threadIdx.x) / 32 * Shape::kOwn;
  decltype(A::against_input(LeftWords{})) left[2][kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    left[0][i] = A::against_input(left_words(memory.tile[2 * i], memory.tile[2 * i + 1]));
    left[1][i] = A::against_input(left_words(momentum.tile[2 * i], momentum.tile[2 * i + 1]));
  }
#pragma unroll
  for (int t = 0; t < kChunk; t += 16) {
    float read[2][2][4] = {};
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      typename A::InputRight right[2];
      A::right_rows(right, k, input_stride(KeyDim), t, first + 16 * i);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        multiply(read[0][n], left[0][i], right[n]);
        multiply(read[1][n], left[1][i], right[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int token = t + 8 * n + lane_column();
      const Words2 a = load_vector<Words2>(memory_weight + token), b = load_vector<Words2>(momentum_weight + token);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t sum[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sum[e] = as_bits(as_float(a.x[e]) * read[0][n][2 * h + e] + as_float(b.x[e]) * read[1][n][2 * h + e]);
        }
        store_vector(partial + (lane_row() + 8 * h) * kAlong + token, Words2{{sum[0], sum[1]}});
      }
    }
  }
}

// result [16, this warp's tokens] = u [16, 64] inverse^T, with the rows of ``inverse`` in shared memory. Of a lower
// triangle the blocks to the right are skipped, of an upper one those to the left.
template <class In, int KeyDim, bool Lower>
MNEMOS_DEVICE void solve_slice(float (&result)[SliceShape<KeyDim>::kTokens / 8][4], const float* u,
                               const float* inverse) {
  using A = Arithmetic<In>;
  constexpr int kTokens = SliceShape<KeyDim>::kTokens;
  const int first = static_cast<int>(threadIdx.x) / 32 * kTokens;
#pragma unroll
  for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) result[n][e] = 0.0f;
  }
#pragma unroll
  for (int d = 0; d < kChunk; d += 16) {
    if (Lower ? d >= first + kTokens : d + 16 <= first) continue;
    const auto left = A::written_for_value(left_from_rows(u, kAlong, 0, d));
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
      multiply(result[n], left, A::written_for_value(right_from_rows(inverse, kAlong, first + 8 * n, d)));
    }
  }
}

// What a chunk adds to a slice of both states.
//
// Tensor cores cut sums off instead of rounding them. Were the states their accumulators, every chunk would shrink them
// by about 1e-6, which over a long sequence is a forget rate of its own. The sum is small and starts at zero; it meets
// the states in an ordinary, rounded addition.
template <class In, int KeyDim>
struct SliceUpdate {
  SliceState<KeyDim> memory = {}, momentum = {};

  // += ``for_memory`` [16, 64] (and ``for_momentum``), written for inputs, times ``keys`` [64, KeyDim].
  MNEMOS_DEVICE void add(const uint32_t* for_memory, const uint32_t* for_momentum, const In* keys) {
    using A = Arithmetic<In>;
    const int first = static_cast<int>(threadIdx.x) / 32 * SliceShape<KeyDim>::kOwn;
#pragma unroll
    for (int t = 0; t < kChunk; t += 16) {
      const auto left_memory = A::written_for_input(left_from_rows(for_memory, kAlong, 0, t));
      const auto left_momentum = A::written_for_input(left_from_rows(for_momentum, kAlong, 0, t));
#pragma unroll
      for (int n = 0; n < SliceShape<KeyDim>::kTiles; n += 2) {
        typename A::InputRight right[2];
        A::right_columns(right, keys, input_stride(KeyDim), t, first + 8 * n);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply(memory.tile[n + i], left_memory, right[i]);
          multiply(momentum.tile[n + i], left_momentum, right[i]);
        }
      }
    }
  }
};

// M = end[0] M + end[1] S + update, S = end[2] S + update.
template <class In, int KeyDim>
MNEMOS_DEVICE void advance_slice(SliceState<KeyDim>& memory, SliceState<KeyDim>& momentum, const float* end,
                                 const SliceUpdate<In, KeyDim>& update) {
#pragma unroll
  for (int n = 0; n < SliceShape<KeyDim>::kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float m = memory.tile[n][e], s = momentum.tile[n][e];
      memory.tile[n][e] = end[0] * m + (end[1] * s + update.memory.tile[n][e]);
      momentum.tile[n][e] = end[2] * s + update.momentum.tile[n][e];
    }
  }
}

template <class In>
struct StatesArguments {
  Span span;
  const In* k;
  const In* v;
  const float* inverse;
  const float* coefficients;
  const float* memory;  // before the span, [rows, key dim, value_dim], as momentum
  const float* momentum;
  float* memory_after;  // may be the same
  float* momentum_after;
  float* starts;       // states before every chunk, [rows, start_chunks, 2, key dim, value_dim] from chunk start_first on
  int start_chunks;
  int start_first;
  float* kept;         // null, or states before every ``kept_every``-th chunk of the sequence
  int kept_every;
  int kept_chunks;     // per row
  float* residuals;    // [rows, residual_tokens, value_dim]
  int residual_tokens;
  int residual_first;  // token
};

template <class In, int KeyDim>
struct States {
  static constexpr int kThreads = SliceShape<KeyDim>::kThreads, kWarps = SliceShape<KeyDim>::kWarps;
  static constexpr int kStages = 2;
  static constexpr int kValueStride = input_stride(kSlice);
  static constexpr int kStage = arena_bytes<In>(kChunk * input_stride(KeyDim)) + arena_bytes<float>(kChunk * kAlong) +
                                arena_bytes<In>(kChunk * kValueStride) + arena_bytes<float>(kCoefficientFloats);
  static constexpr int kShared = kStages * kStage + (kWarps + 2) * arena_bytes<float>(kSlice * kAlong);
};

template <class In, int KeyDim>
__global__ void __launch_bounds__(SliceShape<KeyDim>::kThreads, 1) states_kernel(const StatesArguments<In> x) {
  using Sizes = States<In, KeyDim>;
  using Shape = SliceShape<KeyDim>;
  using A = Arithmetic<In>;
  constexpr int kThreads = Sizes::kThreads, kValueStride = Sizes::kValueStride;
  const Span& s = x.span;
  const int row = blockIdx.y, column = blockIdx.x * kSlice;
  const int thread = threadIdx.x, warp = thread / 32;
  const int64_t state_size = static_cast<int64_t>(KeyDim) * s.value_dim;

  Arena arena{shared_memory() + Sizes::kStages * Sizes::kStage};
  float* partial = arena.take<float>(Sizes::kWarps * kSlice * kAlong);
  uint32_t* for_memory = arena.take<uint32_t>(kSlice * kAlong);
  uint32_t* for_momentum = arena.take<uint32_t>(kSlice * kAlong);

  struct Stage {
    In* k;
    float* inverse;
    In* v;
    float* coefficients;
  };
  const auto stage = [](int i) {
    Arena part{shared_memory() + i % Sizes::kStages * Sizes::kStage};
    Stage result;
    result.k = part.take<In>(kChunk * input_stride(KeyDim));
    result.inverse = part.take<float>(kChunk * kAlong);
    result.v = part.take<In>(kChunk * kValueStride);
    result.coefficients = part.take<float>(kCoefficientFloats);
    return result;
  };

  const auto fetch = [&](int i) {
    const Stage to = stage(i);
    const int chunk = s.first + i, rows = chunk_rows(s, chunk);
    const int64_t slot = chunk_slot(s, row, chunk), token = token_row(s, row, chunk * kChunk);
    copy_rows<KeyDim, kThreads>(to.k, input_stride(KeyDim), x.k + token * KeyDim,
                                static_cast<int64_t>(s.heads) * KeyDim, rows, KeyDim);
    copy_rows<kChunk, kThreads>(to.inverse, kAlong, x.inverse + slot * kSquare, kChunk, kChunk, kChunk);
    copy_rows<kSlice, kThreads>(to.v, kValueStride, x.v + token * s.value_dim + column,
                                static_cast<int64_t>(s.heads) * s.value_dim, rows, kSlice);
    copy_floats<kCoefficientFloats, kThreads>(to.coefficients, x.coefficients + slot * kCoefficientFloats);
    copy_commit();
  };

  fetch(0);
  SliceState<KeyDim> memory, momentum;
  memory.load(x.memory + row * state_size + column, s.value_dim);
  momentum.load(x.momentum + row * state_size + column, s.value_dim);

  for (int i = 0; i < s.chunks; ++i) {
    const Stage now = stage(i);
    const int chunk = s.first + i;
    copy_wait<0>();
    // The chunk has come, and nobody reads the other stage any more.
    __syncthreads();
    if (i + 1 < s.chunks) fetch(i + 1);

    float* start =
        x.starts + (static_cast<int64_t>(row) * x.start_chunks + chunk - x.start_first) * 2 * state_size + column;
    memory.store(start, s.value_dim);
    momentum.store(start + state_size, s.value_dim);
    if (x.kept != nullptr && chunk % x.kept_every == 0) {
      float* kept =
          x.kept + (static_cast<int64_t>(row) * x.kept_chunks + chunk / x.kept_every) * 2 * state_size + column;
      memory.store(kept, s.value_dim);
      momentum.store(kept + state_size, s.value_dim);
    }

    read_slice<In, KeyDim>(partial + warp * kSlice * kAlong, memory, momentum, now.k,
                           now.coefficients + kBetaBefore * kChunk, now.coefficients + kMomentumInMemoryBefore * kChunk);
    __syncthreads();

    // Over the first warp's part, which only the thread itself still reads there.
    for (int j = thread; j < kSlice * kChunk; j += kThreads) {
      const int c = j / kChunk, t = j % kChunk;
      float sum = -to_float(now.v[t * kValueStride + c]);
#pragma unroll
      for (int w = 0; w < Sizes::kWarps; ++w) sum += partial[(w * kSlice + c) * kAlong + t];
      partial[c * kAlong + t] = as_float(A::word_for_value(sum));
    }
    __syncthreads();

    float residual[Shape::kTokens / 8][4];
    solve_slice<In, KeyDim, true>(residual, partial, now.inverse);
    float* residuals = x.residuals +
                       (static_cast<int64_t>(row) * x.residual_tokens + chunk * kChunk - x.residual_first) * s.value_dim +
                       column;
    const int rows = chunk_rows(s, chunk);
#pragma unroll
    for (int n = 0; n < Shape::kTokens / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int t = warp * Shape::kTokens + 8 * n + lane_column() + (e & 1), c = lane_row() + 8 * (e >> 1);
        const float r = residual[n][e];
        if (t < rows) residuals[static_cast<int64_t>(t) * s.value_dim + c] = r;
        for_memory[c * kAlong + t] = A::word_for_input(-now.coefficients[kUpdateMemory * kChunk + t] * r);
        for_momentum[c * kAlong + t] = A::word_for_input(-now.coefficients[kUpdateMomentum * kChunk + t] * r);
      }
    }
    __syncthreads();

    SliceUpdate<In, KeyDim> chunk_update;
    chunk_update.add(for_memory, for_momentum, now.k);
    advance_slice<In, KeyDim>(memory, momentum, now.coefficients + kEnd * kChunk, chunk_update);
  }
  memory.store(x.memory_after + row * state_size + column, s.value_dim);
  momentum.store(x.momentum_after + row * state_size + column, s.value_dim);
}

}  // namespace mnemos::miras_scan
