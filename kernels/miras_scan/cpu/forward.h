// The forward pass of one item: a loop over chunks that carries (M, S).
#pragma once

#include "common/cpu/prefetch.h"
#include "miras_scan/cpu/coefficients.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

struct ForwardScratch {
  float *key_rows, *keys, *queries;          // [C][Dk], [Dk][C], [Dk][C]
  float *keys_state, *queries_state;         // [2 Dk][C]: weighted for M, then for S
  float *keys_memory, *keys_momentum;        // [C][Dk]: weighted by G_C and by E_C
  float *solve, *read;                       // [C][C] transposed: (K K^T) o G^-, (Q K^T) o G
  float* decay;                              // [C][kDecayStride]
  Panels state, residuals, outputs;          // [2 Dk], [C], [C] rows

  ForwardScratch(Arena& arena, int key_dim, int columns) {
    key_rows = arena.take(C * key_dim);
    keys = arena.take(C * key_dim);
    queries = arena.take(C * key_dim);
    keys_state = arena.take(2 * C * key_dim);
    queries_state = arena.take(2 * C * key_dim);
    keys_memory = arena.take(C * key_dim);
    keys_momentum = arena.take(C * key_dim);
    solve = arena.take(C * C);
    read = arena.take(C * C);
    decay = arena.take(C * kDecayStride);
    state = {arena.take(2 * key_dim * (int64_t)columns), 2 * key_dim, columns};
    residuals = {arena.take(C * (int64_t)columns), C, columns};
    outputs = {arena.take(C * (int64_t)columns), C, columns};
  }
};

// Substitution within a diagonal block, in registers: acc = (I + T)^-1 acc with T[s][r] = solve[r * C + s].
template <int N>
MNEMOS_INLINE void solve_forward(vec (&acc)[MR][N], const float* solve) {
  MNEMOS_UNROLL
  for (int r = 0; r < MR; ++r) {
    MNEMOS_UNROLL
    for (int s = r + 1; s < MR; ++s) {
      const vec x = splat(solve[r * C + s]);
      MNEMOS_UNROLL
      for (int i = 0; i < N; ++i) acc[s][i] -= x * acc[r][i];
    }
  }
}

// (M, S) after the chunk: M' = beta_C M + f_C S - (G_C K)^T R, S' = m_C S - (E_C K)^T R.
template <int Dk, int N>
void advance(const Gates& g, const float* keys_memory, const float* keys_momentum, const float* residuals, int ldr,
             int rows, const float* from, float* to, Prefetcher& ahead) {
  constexpr int W = N * VL;
  const vec beta = splat(g.beta_end), f = splat(g.f_end), m = splat(g.m_end);
  for (int k = 0; k < Dk; k += MR) {
    const float *M = from + k * W, *S = from + (Dk + k) * W;
    // The state comes in last: added up term by term, it would be rounded at every token.
    vec acc[MR][N];
    clear(acc);
    multiply<true, false>(acc, keys_memory + k, Dk, residuals, ldr, rows);
    MNEMOS_UNROLL
    for (int r = 0; r < MR; ++r) {
      MNEMOS_UNROLL
      for (int i = 0; i < N; ++i)
        acc[r][i] = beta * load(M + r * W + i * VL) + (f * load(S + r * W + i * VL) - acc[r][i]);
    }
    store_tile(acc, to + k * W, W);
    clear(acc);
    multiply<true, false>(acc, keys_momentum + k, Dk, residuals, ldr, rows);
    MNEMOS_UNROLL
    for (int r = 0; r < MR; ++r) {
      MNEMOS_UNROLL
      for (int i = 0; i < N; ++i) acc[r][i] = m * load(S + r * W + i * VL) - acc[r][i];
    }
    store_tile(acc, to + (Dk + k) * W, W);
    ahead.step();
  }
}

// One panel of one chunk. The residuals hold the values when it starts.
template <int Dk, int N>
void forward_panel(const ForwardScratch& s, const Gates& g, int column, int rows, Prefetcher& ahead) {
  constexpr int W = N * VL;
  float *state = s.state.at(0, column), *residuals = s.residuals.at(0, column), *outputs = s.outputs.at(0, column);
  for (int t = 0; t < rows; t += MR) {
    vec acc[MR][N];
    MNEMOS_UNROLL
    for (int r = 0; r < MR; ++r) {
      MNEMOS_UNROLL
      for (int i = 0; i < N; ++i) acc[r][i] = -load(residuals + (t + r) * W + i * VL);
    }
    multiply<true, false>(acc, s.keys_state + t, C, state, W, 2 * Dk);
    multiply<true, true>(acc, s.solve + t, C, residuals, W, t);
    solve_forward(acc, s.solve + t * C + t);
    store_tile(acc, residuals + t * W, W);
    ahead.step();
  }
  for (int t = 0; t < rows; t += MR) {
    vec acc[MR][N];
    clear(acc);
    multiply<true, false>(acc, s.queries_state + t, C, state, W, 2 * Dk);
    multiply<true, true>(acc, s.read + t, C, residuals, W, t + MR);
    store_tile(acc, outputs + t * W, W);
    ahead.step();
  }
  advance<Dk, N>(g, s.keys_memory, s.keys_momentum, residuals, W, rows, state, state, ahead);
}

// out[j][t] *= keep_t decay of token t - 1 (BEFORE) or decay of token t.
template <bool BEFORE>
void weigh(const Gates& g, const float* decay, float* out) {
  for (int j = 0; j < C; ++j)
    for (int t = j / VL * VL; t < C; t += VL) {
      vec w = load(decay + j * kDecayStride + 16 + t - (BEFORE ? 1 : 0));
      if (BEFORE) w *= load(g.keep + t);
      store(out + j * C + t, load(out + j * C + t) * w);
    }
}

template <int Dk, typename T>
void forward_item(const Forward& p, const Item& item, float* memory) {
  Arena arena(memory);
  const int columns = (int)item.columns;
  const ForwardScratch s(arena, Dk, columns);
  const int64_t row = item.batch * p.heads + item.head, size = Dk * p.value_dim;
  const ptrdiff_t key_stride = p.heads * Dk, value_stride = p.heads * p.value_dim;
  copy_to_panels(p.memory + row * size + item.first, p.value_dim, Dk, s.state, 0);
  copy_to_panels(p.momentum + row * size + item.first, p.value_dim, Dk, s.state, Dk);
  const int64_t saves = (p.sequence + p.interval - 1) / p.interval;

  for (int64_t t0 = 0; t0 < p.sequence; t0 += C) {
    const int n = (int)(p.sequence - t0 < C ? p.sequence - t0 : C), rows = round_up(n, MR);
    const int64_t token = (item.batch * p.sequence + t0) * p.heads + item.head;
    if (p.states != nullptr && t0 % p.interval == 0) {
      float* target = p.states + (row * saves + t0 / p.interval) * 2 * size + item.first;
      store_panels(s.state, 0, Dk, 1, target, p.value_dim);
      store_panels(s.state, Dk, Dk, 1, target + size, p.value_dim);
    }
    Gates g;
    load_gates(p, item, t0, n, g);
    load_tokens((const T*)p.k + token * Dk, key_stride, n, Dk, s.key_rows, s.keys);
    load_tokens((const T*)p.q + token * Dk, key_stride, n, Dk, nullptr, s.queries);
    load_panels((const T*)p.v + token * p.value_dim + item.first, value_stride, n, s.residuals, 0, nullptr);
    scale_lanes(s.keys, g.beta_before, g.f_before, Dk, s.keys_state);
    scale_lanes(s.queries, g.beta, g.f, Dk, s.queries_state);
    scale_rows(s.key_rows, g.memory_end, g.momentum_end, Dk, s.keys_memory, s.keys_momentum);
    decay_transposed(g, s.decay);
    gram<false, true>(s.keys, s.keys, Dk, s.solve, 1);
    gram<false, true>(s.keys, s.queries, Dk, s.read, 1);
    weigh<true>(g, s.decay, s.solve);
    weigh<false>(g, s.decay, s.read);

    const int64_t next = t0 + C;
    Prefetcher ahead((2 * (C / MR) + Dk / MR) * ((columns + P - 1) / P));
    ahead.add((T*)p.y + token * p.value_dim + item.first, value_stride * sizeof(T), n, columns * sizeof(T));
    if (p.residuals != nullptr)
      ahead.add(p.residuals + (row * p.sequence + t0) * p.value_dim + item.first, p.value_dim * sizeof(float), n,
                columns * sizeof(float));
    if (next < p.sequence) {
      const int64_t after = token + C * p.heads;
      const int m = (int)(p.sequence - next < C ? p.sequence - next : C);
      ahead.add((const T*)p.k + after * Dk, key_stride * sizeof(T), m, Dk * sizeof(T));
      ahead.add((const T*)p.q + after * Dk, key_stride * sizeof(T), m, Dk * sizeof(T));
      ahead.add((const T*)p.v + after * p.value_dim + item.first, value_stride * sizeof(T), m, columns * sizeof(T));
      if (p.states != nullptr && next % p.interval == 0)
        ahead.add(p.states + (row * saves + next / p.interval) * 2 * size + item.first, p.value_dim * sizeof(float),
                  2 * Dk, columns * sizeof(float));
    }

    int column = 0;
    for (; column + P <= columns; column += P) forward_panel<Dk, NV>(s, g, column, rows, ahead);
    if constexpr (P == 32) {
      if (column < columns) forward_panel<Dk, 1>(s, g, column, rows, ahead);
    }
    store_panels(s.outputs, 0, n, 1, (T*)p.y + token * p.value_dim + item.first, value_stride);
    if (p.residuals != nullptr)
      store_panels(s.residuals, 0, n, 1, p.residuals + (row * p.sequence + t0) * p.value_dim + item.first, p.value_dim);
  }
  store_panels(s.state, 0, Dk, 1, p.memory_after + row * size + item.first, p.value_dim);
  store_panels(s.state, Dk, Dk, 1, p.momentum_after + row * size + item.first, p.value_dim);
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
