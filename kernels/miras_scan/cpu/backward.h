// The backward pass of one item: chunks in reverse, carrying the gradient of (M, S). Within an interval the states at
// the chunks' starts are computed again from the saved one and the saved residuals.
#pragma once

#include <initializer_list>

#include "miras_scan/cpu/backward_gates.h"
#include "miras_scan/cpu/forward.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

struct BackwardScratch {
  float *key_rows, *query_rows, *keys, *queries;  // [C][Dk], [Dk][C]
  float* keys_end;                                // [2 Dk][C]: keys weighted by G_C, then by E_C
  float *for_memory, *for_momentum;               // [2 C][Dk]: queries by beta, keys by beta^-; the same by f, f^-
  float *grad_queries, *grad_keys;                // [Dk][C]
  float *grad_outputs, *lambda, *residuals;       // [columns][C]
  Squares squares;
  Panels sources;                                 // [2 C] rows: dO, then lambda
  Panels grad_state;                              // [2 Dk] rows: dM, dS after the chunk, then before it
  float* states;                                  // (M, S) at the start of every chunk of an interval
  int columns, key_dim;

  BackwardScratch(Arena& arena, const Problem& p, int key_dim, int columns) : columns(columns), key_dim(key_dim) {
    for (float** x : {&key_rows, &query_rows, &keys, &queries, &grad_queries, &grad_keys}) *x = arena.take(C * key_dim);
    for (float** x : {&keys_end, &for_memory, &for_momentum}) *x = arena.take(2 * C * key_dim);
    for (float** x : {&grad_outputs, &lambda, &residuals}) *x = arena.take(C * (int64_t)columns);
    for (float** x : {&squares.keys, &squares.queries, &squares.decay, &squares.momentum, &squares.solve, &squares.read,
                      &squares.grad_solve, &squares.grad_read, &squares.grad_queries,
                      &squares.grad_queries_transposed, &squares.grad_keys})
      *x = arena.take(C * C);
    sources = {arena.take(2 * C * (int64_t)columns), 2 * C, columns};
    grad_state = {arena.take(2 * key_dim * (int64_t)columns), 2 * key_dim, columns};
    const int64_t span = p.interval < p.sequence ? p.interval : p.sequence;
    states = arena.take((span + C - 1) / C * state_size());
  }

  int64_t state_size() const { return 2 * key_dim * (int64_t)columns; }
  Panels state(int64_t chunk) const { return {states + chunk * state_size(), 2 * key_dim, columns}; }
};

// Substitution from the last row up: acc = (I + T)^-T acc with T[s][r] = solve[s * C + r].
template <int N>
MNEMOS_INLINE void solve_backward(vec (&acc)[MR][N], const float* solve) {
  MNEMOS_UNROLL
  for (int s = MR - 1; s > 0; --s) {
    MNEMOS_UNROLL
    for (int r = 0; r < s; ++r) {
      const vec x = splat(solve[s * C + r]);
      MNEMOS_UNROLL
      for (int i = 0; i < N; ++i) acc[r][i] -= x * acc[s][i];
    }
  }
}

// lambda = (I + T)^-T (-A^T dO - G_C K dM' - E_C K dS'), from the last block of rows up.
template <int Dk, int N>
void residual_gradient(const BackwardScratch& s, int column, int rows, Prefetcher& ahead) {
  constexpr int W = N * VL;
  const float *grad_state = s.grad_state.at(0, column), *grad_outputs = s.sources.at(0, column);
  float* lambda = s.sources.at(C, column);
  for (int j = rows - MR; j >= 0; j -= MR) {
    vec acc[MR][N];
    clear(acc);
    multiply<true, true>(acc, s.keys_end + j, C, grad_state, W, 2 * Dk);
    multiply<true, true>(acc, s.squares.read + j * C + j, C, grad_outputs + j * W, W, rows - j);
    const int next = j + MR;
    multiply<true, true>(acc, s.squares.solve + next * C + j, C, lambda + next * W, W, rows - next);
    solve_backward(acc, s.squares.solve + j * C + j);
    store_tile(acc, lambda + j * W, W);
    ahead.step();
  }
}

// dM = beta_C dM' + [beta Q; beta^- K]^T [dO; lambda], dS = f_C dM' + m_C dS' + [f Q; f^- K]^T [dO; lambda].
template <int Dk, int N>
void retreat(const BackwardScratch& s, const Gates& g, int column, Prefetcher& ahead) {
  constexpr int W = N * VL;
  const float* sources = s.sources.at(0, column);
  float* grad_state = s.grad_state.at(0, column);
  const vec beta = splat(g.beta_end), f = splat(g.f_end), m = splat(g.m_end);
  for (int k = 0; k < Dk; k += MR) {
    float *M = grad_state + k * W, *S = grad_state + (Dk + k) * W;
    vec acc[MR][N];
    clear(acc);
    multiply<true, false>(acc, s.for_momentum + k, Dk, sources, W, 2 * C);
    MNEMOS_UNROLL
    for (int r = 0; r < MR; ++r) {
      MNEMOS_UNROLL
      for (int i = 0; i < N; ++i)
        acc[r][i] = m * load(S + r * W + i * VL) + (f * load(M + r * W + i * VL) + acc[r][i]);
    }
    store_tile(acc, S, W);
    clear(acc);
    multiply<true, false>(acc, s.for_memory + k, Dk, sources, W, 2 * C);
    MNEMOS_UNROLL
    for (int r = 0; r < MR; ++r) {
      MNEMOS_UNROLL
      for (int i = 0; i < N; ++i) acc[r][i] = beta * load(M + r * W + i * VL) + acc[r][i];
    }
    store_tile(acc, M, W);
    ahead.step();
  }
}

// One term of a token gradient, MR features x P tokens: product = state rows x transposed rows, whose product with
// `tokens` is a gradient of `weight` and which counts in `out` times that weight. A row of the state is as long as the
// values, so the panels are gone through one after the other.
template <bool FIRST, bool NEGATE>
MNEMOS_INLINE void state_term(const Panels& state, int row, const float* transposed, const float* tokens,
                              const float* weight, float* grad_weight, float* out) {
  vec acc[MR][NV];
  clear(acc);
  int column = 0;
  for (; column + P <= state.columns; column += P)
    multiply<false, false>(acc, state.at(row, column), P, transposed + (ptrdiff_t)column * C, C, P);
  if constexpr (P == 32) {
    if (column < state.columns)
      multiply<false, false>(acc, state.at(row, column), VL, transposed + (ptrdiff_t)column * C, C, VL);
  }
  MNEMOS_UNROLL
  for (int i = 0; i < NV; ++i) {
    const vec w = load(weight + i * VL);
    vec total = load(grad_weight + i * VL);
    MNEMOS_UNROLL
    for (int r = 0; r < MR; ++r) {
      float* o = out + r * C + i * VL;
      if (NEGATE) {
        total -= acc[r][i] * load(tokens + r * C + i * VL);
        store(o, (FIRST ? vec{} : load(o)) - acc[r][i] * w);
      } else {
        total += acc[r][i] * load(tokens + r * C + i * VL);
        store(o, FIRST ? acc[r][i] * w : load(o) + acc[r][i] * w);
      }
    }
    store(grad_weight + i * VL, total);
  }
}

enum class Shape { full, lower, upper };

// The vectors of a tile on the diagonal of a triangle: rows V VL on meet the vectors up to V (lower) or from V on.
template <Shape SHAPE, int V, int Dk>
MNEMOS_INLINE void diagonal_term(vec (&acc)[MR][NV], const float* rows, const float* square) {
  constexpr int FROM = SHAPE == Shape::upper ? V : 0, TO = SHAPE == Shape::upper ? NV : V + 1;
  multiply<true, false, FROM, TO>(acc, rows + V * VL * Dk, Dk, square + V * VL * C, C, VL);
  if constexpr (V + 1 < NV) diagonal_term<SHAPE, V + 1, Dk>(acc, rows, square);
}

// out[k][t] += sum over i of rows[i][k] square[i][t], for MR features x P tokens from `token` on; a triangular square
// is zero for t > i (lower) or t < i (upper).
template <Shape SHAPE, int Dk>
MNEMOS_INLINE void square_term(const float* rows, const float* square, int token, float* out) {
  vec acc[MR][NV];
  MNEMOS_UNROLL
  for (int r = 0; r < MR; ++r) {
    MNEMOS_UNROLL
    for (int i = 0; i < NV; ++i) acc[r][i] = load(out + r * C + i * VL);
  }
  square += token;
  if (SHAPE == Shape::full) {
    multiply<true, false>(acc, rows, Dk, square, C, C);
  } else {
    if (SHAPE == Shape::upper) multiply<true, false>(acc, rows, Dk, square, C, token);
    diagonal_term<SHAPE, 0, Dk>(acc, rows + token * Dk, square + token * C);
    const int below = token + P;
    if (SHAPE == Shape::lower) multiply<true, false>(acc, rows + below * Dk, Dk, square + below * C, C, C - below);
  }
  store_tile(acc, out, C);
}

// Gradients of the queries and keys, transposed, and of the coefficients that weigh them.
template <int Dk>
void token_gradients(const BackwardScratch& s, const Panels& state, const Gates& g, GateGradients& d,
                     Prefetcher& ahead) {
  for (int t = 0; t < C; t += P)
    for (int k = 0; k < Dk; k += MR) {
      const int at = k * C + t;
      float* out = s.grad_queries + at;
      state_term<true, false>(state, k, s.grad_outputs + t, s.queries + at, g.beta + t, d.beta + t, out);
      state_term<false, false>(state, Dk + k, s.grad_outputs + t, s.queries + at, g.f + t, d.f + t, out);
      square_term<Shape::upper, Dk>(s.key_rows + k, s.squares.grad_queries_transposed, t, out);
      ahead.step();
    }
  for (int t = 0; t < C; t += P)
    for (int k = 0; k < Dk; k += MR) {
      const int at = k * C + t;
      float* out = s.grad_keys + at;
      const float* keys = s.keys + at;
      state_term<true, false>(state, k, s.lambda + t, keys, g.beta_before + t, d.beta_before + t, out);
      state_term<false, false>(state, Dk + k, s.lambda + t, keys, g.f_before + t, d.f_before + t, out);
      state_term<false, true>(s.grad_state, k, s.residuals + t, keys, g.memory_end + t, d.memory_end + t, out);
      state_term<false, true>(s.grad_state, Dk + k, s.residuals + t, keys, g.momentum_end + t, d.momentum_end + t, out);
      square_term<Shape::lower, Dk>(s.query_rows + k, s.squares.grad_queries, t, out);
      square_term<Shape::full, Dk>(s.key_rows + k, s.squares.grad_keys, t, out);
      ahead.step();
    }
}

// The decayed squares and their gradients' share of the keys and queries.
void weigh_squares(const Squares& q, const Gates& g) {
  for (int t = 0; t < C; ++t)
    for (int j = 0; j < C; j += VL) {
      const int at = t * C + j;
      store(q.read + at, load(q.queries + at) * load(q.decay + at));
      store(q.solve + at, t == 0 ? vec{} : load(q.keys + at) * (load(q.decay + at - C) * g.keep[t]));
    }
}

void weigh_square_gradients(const Squares& q, const Gates& g) {
  for (int t = 0; t < C; ++t)
    for (int j = 0; j < C; j += VL) {
      const int at = t * C + j;
      store(q.grad_queries + at, load(q.grad_read + at) * load(q.decay + at));
      store(q.grad_keys + at, t == 0 ? vec{} : load(q.grad_solve + at) * (load(q.decay + at - C) * g.keep[t]));
    }
  for (int t = 0; t < C; t += VL)
    for (int j = 0; j <= t; j += VL) {
      vec x[VL], y[VL];
      MNEMOS_UNROLL
      for (int i = 0; i < VL; ++i) x[i] = load(q.grad_queries + (t + i) * C + j);
      transpose(x);
      MNEMOS_UNROLL
      for (int i = 0; i < VL; ++i) store(q.grad_queries_transposed + (j + i) * C + t, x[i]);
      MNEMOS_UNROLL
      for (int i = 0; i < VL; ++i) y[i] = load(q.grad_keys + (t + i) * C + j);
      transpose(y);
      MNEMOS_UNROLL
      for (int i = 0; i < VL; ++i) {
        float* mirrored = q.grad_keys + (j + i) * C + t;
        store(mirrored, j == t ? load(mirrored) + y[i] : y[i]);
      }
    }
}

// What this chunk writes, and what the next one in line reads.
template <int Dk, typename T>
Prefetcher backward_prefetcher(const Backward& p, const Shared& out, const Item& item, int columns, int64_t t0, int n) {
  const int64_t token = (item.batch * p.sequence + t0) * p.heads + item.head, row = item.batch * p.heads + item.head;
  const ptrdiff_t keys = p.heads * Dk, values = p.heads * p.value_dim;
  const int key_bytes = Dk * sizeof(T), value_bytes = columns * sizeof(T), state_bytes = columns * sizeof(float);
  Prefetcher ahead((C / MR + Dk / MR) * ((columns + P - 1) / P) + 2 * (C / P) * (Dk / MR));
  ahead.add((T*)p.grad_v + token * p.value_dim + item.first, values * sizeof(T), n, value_bytes);
  const size_t element = out.bfloat16 ? sizeof(Bfloat16) : sizeof(float);
  for (void* x : {out.grad_q, out.grad_k}) ahead.add((char*)x + token * Dk * element, keys * element, n, Dk * element);
  if (t0 == 0) return ahead;
  const float* residuals = p.residuals + row * p.sequence * p.value_dim + item.first;
  const int64_t before = token - C * p.heads;
  ahead.add(residuals + (t0 - C) * p.value_dim, p.value_dim * sizeof(float), C, state_bytes);
  ahead.add((const T*)p.k + before * Dk, keys * sizeof(T), C, key_bytes);
  ahead.add((const T*)p.q + before * Dk, keys * sizeof(T), C, key_bytes);
  ahead.add((const T*)p.grad_y + before * p.value_dim + item.first, values * sizeof(T), C, value_bytes);
  if (t0 % p.interval == 0) {
    const int64_t saves = (p.sequence + p.interval - 1) / p.interval, saved = row * saves + t0 / p.interval - 1;
    ahead.add(p.states + saved * 2 * Dk * p.value_dim + item.first, p.value_dim * sizeof(float), 2 * Dk, state_bytes);
    // The first chunk of an interval is the first to be computed again.
    const int64_t start = token - p.interval * p.heads;
    ahead.add(residuals + (t0 - p.interval) * p.value_dim, p.value_dim * sizeof(float), C, state_bytes);
    ahead.add((const T*)p.k + start * Dk, keys * sizeof(T), C, key_bytes);
  }
  return ahead;
}

template <int Dk, typename T>
void backward_chunk(const Backward& p, const Shared& out, const Item& item, const BackwardScratch& s, int64_t t0,
                    const Panels& state) {
  const int n = (int)(p.sequence - t0 < C ? p.sequence - t0 : C), rows = round_up(n, MR), columns = s.columns;
  const int64_t token = (item.batch * p.sequence + t0) * p.heads + item.head, row = item.batch * p.heads + item.head;
  const ptrdiff_t key_stride = p.heads * Dk, value_stride = p.heads * p.value_dim;
  const Squares& q = s.squares;
  Prefetcher ahead = backward_prefetcher<Dk, T>(p, out, item, columns, t0, n);
  Gates g;
  load_gates(p, item, t0, n, g);
  load_tokens((const T*)p.k + token * Dk, key_stride, n, Dk, s.key_rows, s.keys);
  load_tokens((const T*)p.q + token * Dk, key_stride, n, Dk, s.query_rows, s.queries);
  load_panels((const T*)p.grad_y + token * p.value_dim + item.first, value_stride, n, s.sources, 0, s.grad_outputs);
  load_tokens(p.residuals + (row * p.sequence + t0) * p.value_dim + item.first, p.value_dim, n, columns, nullptr,
              s.residuals);
  scale_lanes(s.keys, g.memory_end, g.momentum_end, Dk, s.keys_end);
  decay_rows(g, q.decay, q.momentum);
  gram<true, false>(s.keys, s.keys, Dk, q.keys, 1);
  gram<true, false>(s.queries, s.keys, Dk, q.queries, 1);
  weigh_squares(q, g);

  int column = 0;
  for (; column + P <= columns; column += P) residual_gradient<Dk, NV>(s, column, rows, ahead);
  if constexpr (P == 32) {
    if (column < columns) residual_gradient<Dk, 1>(s, column, rows, ahead);
  }
  clear_panels(s.sources, C + rows, C - rows);
  store_panels(s.sources, C, n, -1, (T*)p.grad_v + token * p.value_dim + item.first, value_stride);
  transpose_panels(s.sources, C, s.lambda);

  gram<true, false>(s.grad_outputs, s.residuals, columns, q.grad_read, -1);
  gram<true, false>(s.lambda, s.residuals, columns, q.grad_solve, -1);
  weigh_square_gradients(q, g);
  GateGradients d;
  memset(&d, 0, sizeof(d));
  token_gradients<Dk>(s, state, g, d, ahead);
  if (out.bfloat16) {
    store_transposed(s.grad_queries, n, Dk, (Bfloat16*)out.grad_q + token * Dk, key_stride);
    store_transposed(s.grad_keys, n, Dk, (Bfloat16*)out.grad_k + token * Dk, key_stride);
  } else {
    store_transposed(s.grad_queries, n, Dk, (float*)out.grad_q + token * Dk, key_stride);
    store_transposed(s.grad_keys, n, Dk, (float*)out.grad_k + token * Dk, key_stride);
  }
  end_gradients(state, s.grad_state, Dk, d);
  gate_gradients(q, g, d, n, out, (item.batch * p.sequence + t0) * p.heads + item.head, p.heads);

  scale_rows(s.query_rows, g.beta, g.f, Dk, s.for_memory, s.for_momentum);
  scale_rows(s.key_rows, g.beta_before, g.f_before, Dk, s.for_memory + C * Dk, s.for_momentum + C * Dk);
  for (column = 0; column + P <= columns; column += P) retreat<Dk, NV>(s, g, column, ahead);
  if constexpr (P == 32) {
    if (column < columns) retreat<Dk, 1>(s, g, column, ahead);
  }
}

// The state after a full chunk from that before it; the residuals are the saved ones.
template <int Dk, typename T>
void recompute_state(const Backward& p, const Item& item, const BackwardScratch& s, int64_t t0, const Panels& from,
                     const Panels& to) {
  const int64_t token = (item.batch * p.sequence + t0) * p.heads + item.head, row = item.batch * p.heads + item.head;
  const float* residuals = p.residuals + (row * p.sequence + t0) * p.value_dim + item.first;
  float *keys_memory = s.for_memory, *keys_momentum = s.for_memory + C * Dk;
  Gates g;
  load_gates(p, item, t0, C, g);
  load_tokens((const T*)p.k + token * Dk, p.heads * Dk, C, Dk, s.key_rows, nullptr);
  scale_rows(s.key_rows, g.memory_end, g.momentum_end, Dk, keys_memory, keys_momentum);
  const int columns = s.columns, stride = (int)p.value_dim;
  Prefetcher ahead((Dk / MR) * ((columns + P - 1) / P));
  if (t0 + 2 * C <= p.sequence) {
    ahead.add(residuals + C * p.value_dim, p.value_dim * sizeof(float), C, columns * sizeof(float));
    ahead.add((const T*)p.k + (token + C * p.heads) * Dk, p.heads * Dk * sizeof(T), C, Dk * sizeof(T));
  }
  int c = 0;
  for (; c + P <= columns; c += P)
    advance<Dk, NV>(g, keys_memory, keys_momentum, residuals + c, stride, C, from.at(0, c), to.at(0, c), ahead);
  if constexpr (P == 32) {
    if (c < columns)
      advance<Dk, 1>(g, keys_memory, keys_momentum, residuals + c, stride, C, from.at(0, c), to.at(0, c), ahead);
  }
}

template <int Dk, typename T>
void backward_item(const Backward& p, const Shared& out, const Item& item, float* memory) {
  Arena arena(memory);
  const int columns = (int)item.columns;
  const BackwardScratch s(arena, p, Dk, columns);
  // Vectors above the diagonal are not written; they are multiplied by zero, which only something finite survives.
  for (float* x : {s.squares.keys, s.squares.queries, s.squares.grad_solve, s.squares.grad_read,
                   s.squares.grad_queries_transposed})
    memset(x, 0, C * C * sizeof(float));
  const int64_t row = item.batch * p.heads + item.head, size = Dk * p.value_dim;
  const int64_t saves = (p.sequence + p.interval - 1) / p.interval;
  copy_to_panels(p.grad_memory + row * size + item.first, p.value_dim, Dk, s.grad_state, 0);
  copy_to_panels(p.grad_momentum + row * size + item.first, p.value_dim, Dk, s.grad_state, Dk);

  for (int64_t i = saves - 1; i >= 0; --i) {
    const float* saved = p.states + (row * saves + i) * 2 * size + item.first;
    copy_to_panels(saved, p.value_dim, Dk, s.state(0), 0);
    copy_to_panels(saved + size, p.value_dim, Dk, s.state(0), Dk);
    const int64_t start = i * p.interval;
    const int64_t end = start + p.interval < p.sequence ? start + p.interval : p.sequence;
    const int64_t chunks = (end - start + C - 1) / C;
    for (int64_t c = 0; c + 1 < chunks; ++c)
      recompute_state<Dk, T>(p, item, s, start + c * C, s.state(c), s.state(c + 1));
    for (int64_t c = chunks - 1; c >= 0; --c) backward_chunk<Dk, T>(p, out, item, s, start + c * C, s.state(c));
  }
  store_panels(s.grad_state, 0, Dk, 1, p.grad_memory0 + row * size + item.first, p.value_dim);
  store_panels(s.grad_state, Dk, Dk, 1, p.grad_momentum0 + row * size + item.first, p.value_dim);
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
