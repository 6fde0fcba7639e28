// The gradients of a chunk: its weights are made again from the log-sum-exps, a tile of queries and a block of keys at
// a time.
#pragma once

#include "slot_attention/cpu/forward.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

// Of a tile's queries.
struct Gradients {
  float lse[kQueries], dot[kQueries], shift[kQueries], by_shift[kQueries], scale[kQueries];
};

// Of a block's logits and the products of values and output's gradients, [to - from][kQueries]: weights in rows, and the
// logits' gradients in rows and as the right operand of a sum over keys.
template <class P, bool MASKED>
inline void differentiate(const Step& p, const Keys& keys, int query, int from, int to, Gradients& state,
                          const float* logits, const float* values, float* weights, float* grads, float* grads_right) {
  const vec scale = splat(p.scale * kLog2E);
  for (int c = 0; c < kQueries; c += VL) {
    const ivec queries = lanes(query + c);
    const vec shift = load(state.shift + c), lse = load(state.lse + c), dot = load(state.dot + c);
    vec by_shift = load(state.by_shift + c);
    for (int j = from; j < to; j += 2) {
      vec weight[2], grad[2];
      MNEMOS_UNROLL
      for (int i = 0; i < 2; ++i) {
        const ptrdiff_t at = (ptrdiff_t)(j + i - from) * kQueries + c;
        const vec shifted = splat(keys.shifted[j + i]);
        weight[i] = P::exp2(load(logits + at) * scale + (splat(keys.bias[j + i]) + shift * shifted) - lse);
        if (MASKED) weight[i] = seen(keys, j + i, queries) ? weight[i] : vec{};
        grad[i] = weight[i] * (load(values + at) - dot);
        by_shift += grad[i] * shifted;
      }
      P::put_rows(weights, kQueries, j - from, c, weight[0], weight[1]);
      P::put_rows(grads, kQueries, j - from, c, grad[0], grad[1]);
      if (P::G > 1) P::put_interleaved(grads_right + c, kQueries, j - from, grad[0], grad[1]);
    }
    store(state.by_shift + c, by_shift);
  }
}

inline void scale_row(const float* from, float factor, int dim, float* to) {
  for (int i = 0; i < dim; i += VL) store(to + i, load(from + i) * splat(factor));
}

inline void add_row(const float* from, int dim, float* to) {
  for (int i = 0; i < dim; i += VL) store(to + i, load(to + i) + load(from + i));
}

// to += factor from.
template <class T>
inline void add_scaled(const T* from, float factor, int dim, float* to) {
  for (int i = 0; i < dim; i += VL) store(to + i, load(to + i) + load(from + i) * splat(factor));
}

// Gradients of keys and values from one chunk's rows, those of slots apart; `row` [3 dim] is for work.
template <class T>
inline void put_keys(const Step& p, const Keys& keys, const float* grad_k, const float* grad_v, float* row) {
  const int dim = p.dim;
  float *scaled = row, *turned = row + dim;
  T *sink_k = static_cast<T*>(p.grad_sink_k), *sink_v = static_cast<T*>(p.grad_sink_v);
  each_key(p, keys, [&](int j, Kind kind, int64_t to) {
    if (kind == kSlot) return;
    const float* own_v = grad_v + (ptrdiff_t)j * dim;
    scale_row(grad_k + (ptrdiff_t)j * dim, p.scale, dim, scaled);
    if (kind == kBand) {
      turn_row<true>(scaled, turn_of_token(p, keys, keys.from + j), dim, turned);
      add_row(turned, dim, p.grad_k + to);
      add_row(own_v, dim, p.grad_v + to);
    } else {
      put_row(scaled, dim, sink_k + to);
      put_row(own_v, dim, sink_v + to);
    }
  });
}

// The gradient of the keys' map, of a chunk: of what is stored, times the gradient of what is read.
template <class P, class T>
inline void put_map(const Step& p, const Keys& keys, const float* grad_k, const TurnScratch& work, float* left,
                    float* right) {
  const int dim = p.dim, words = dim / P::G, rows = slots_padded(keys);
  if (p.key_map == nullptr || rows == 0) return;
  float *scaled = work.row, *turned = work.row + dim;
  gather_slots<P, T>(p, keys, work.stored);
  transpose_words(P::interleaved(work.stored, rows, dim, right), rows / P::G, dim, left);
  std::memset(work.stored, 0, sizeof(float) * rows * words);
  for (int j = keys.slots_begin; j < keys.slots_end; ++j) {
    scale_row(grad_k + (ptrdiff_t)j * dim, p.scale, dim, scaled);
    turn_row<true>(scaled, turn_of_slot(p, keys, keys.sources[j - keys.slots_begin], work.row + 2 * dim), dim, turned);
    P::round_row(turned, dim, work.stored + (ptrdiff_t)(j - keys.slots_begin) * words);
  }
  const int64_t place = (keys.row * p.chunks + keys.chunk) * p.kv_heads + keys.head;
  product<P>(dim, dim, rows / P::G, left, rows / P::G, P::interleaved(work.stored, rows, dim, right), dim,
             p.grad_key_map + place * dim * dim, dim, false);
}

template <class P, class T>
void run_backward(const Step& p, const Keys& keys, float* scratch) {
  const int dim = p.dim, words = dim / P::G, group = static_cast<int>(p.heads / p.kv_heads);
  const size_t matrix = static_cast<size_t>(keys.rows) * words, sums = static_cast<size_t>(keys.rows) * dim;
  const size_t tile = static_cast<size_t>(kQueries) * dim, block = static_cast<size_t>(kQueries) * kKeys;
  float *row = scratch, *map = row + 3 * dim;
  float *k = map + 2 * dim * dim, *k_left = k + matrix, *v = k_left + matrix;
  float *grad_k = v + matrix, *grad_v = grad_k + sums;
  float *q_rows = grad_v + sums, *q = q_rows + tile, *q_spare = q + tile;
  float *out_rows = q_spare + tile, *out = out_rows + tile, *out_spare = out + tile;
  float *slot_rows = out_spare + tile, *slot_out = slot_rows + tile, *grad_q = slot_out + tile;
  float *logits = grad_q + tile, *values = logits + block, *weights = values + block, *grads = weights + block;
  float* grads_right = P::G > 1 ? grads + block : grads;
  gather_turned<P, T>(p, keys, {row, map, v, grad_k}, k);
  transpose_words(P::interleaved(k, keys.rows, dim, grad_k), keys.rows / P::G, dim, k_left);
  gather<P, T>(p, keys, p.v, p.slot_v, p.sink_v, v);
  std::memset(grad_k, 0, sizeof(float) * 2 * sums);
  const bool maps = has_maps(p, keys);
  const int64_t place = keys.row * p.chunks + keys.chunk;
  float *value_map = map + (ptrdiff_t)dim * dim, *grad_value_map = nullptr;
  if (maps) {
    load_map<P, T>(p, keys, p.value_map, map);
    // Transposed, as the right operand.
    transpose_words(map, dim, words, value_map);
    grad_value_map = p.grad_value_map + (place * p.kv_heads + keys.head) * dim * dim;
  }

  for (int h = 0; h < group; ++h) {
    const int64_t query_head = keys.head * group + h;
    for (int query = 0; query < keys.queries; query += kQueries) {
      const int count = keys.queries - query < kQueries ? keys.queries - query : kQueries;
      const int64_t token = keys.row * p.tokens + keys.chunk * p.chunk + query, stride = p.heads * dim;
      const int64_t at = token * stride + query_head * dim;
      const float* lse = p.lse + (keys.row * p.heads + query_head) * p.tokens + keys.chunk * p.chunk + query;
      Gradients state;
      std::memset(q_rows, 0, sizeof(float) * kQueries * words);
      std::memset(out_rows, 0, sizeof(float) * kQueries * words);
      for (int i = 0; i < kQueries; ++i) {
        // A query that is not there has no weights.
        state.lse[i] = 1e30f;
        state.dot[i] = state.shift[i] = state.by_shift[i] = 0.0f;
        state.scale[i] = p.scale;
        if (i >= count) continue;
        const int64_t from = at + i * stride;
        const ptrdiff_t to = (ptrdiff_t)i * words;
        const T* grad = static_cast<const T*>(p.grad_out) + from;
        const T* own = static_cast<const T*>(p.q) + from;
        load_query<P>(p, keys, own, query + i, row, q_rows);
        P::load_row(grad, dim, out_rows + to);
        state.lse[i] = lse[i];
        state.dot[i] = dot_of(static_cast<const T*>(p.out) + from, grad, dim);
        state.shift[i] = shift_of(p, own, token + i, query_head);
      }
      transpose_words(q_rows, kQueries, words, q);
      transpose_words(out_rows, kQueries, words, out);
      const float* q_right = P::interleaved(q_rows, kQueries, dim, q_spare);
      const float* out_right = P::interleaved(out_rows, kQueries, dim, out_spare);
      const float* slot_grads = out;  // the output's gradients as slots' values have them
      if (maps) {
        const T* read = static_cast<const T*>(p.slot_out) + at;
        std::memset(slot_rows, 0, sizeof(float) * kQueries * words);
        for (int i = 0; i < count; ++i) P::load_row(read + i * stride, dim, slot_rows + (ptrdiff_t)i * words);
        transpose_words(P::interleaved(slot_rows, kQueries, dim, grad_q), kQueries / P::G, dim, slot_out);
        product<P>(dim, dim, kQueries / P::G, slot_out, kQueries / P::G, out_right, dim, grad_value_map, dim, true);
        product<P>(kQueries, dim, words, out_rows, words, value_map, dim, grad_q, dim, false);
        std::memset(slot_rows, 0, sizeof(float) * kQueries * words);
        for (int i = 0; i < count; ++i) {
          float* mapped = grad_q + (ptrdiff_t)i * dim;
          add_scaled(static_cast<const T*>(p.grad_out) + at + i * stride, 1.0f, dim, mapped);
          P::round_row(mapped, dim, slot_rows + (ptrdiff_t)i * words);
        }
        transpose_words(slot_rows, kQueries, words, slot_out);
        slot_grads = slot_out;
      }
      std::memset(grad_q, 0, sizeof(float) * tile);
      each_block(keys, query, count, [&](int from, int to, bool slots) {
        const int n = to - from;
        const ptrdiff_t first = (ptrdiff_t)from * words, sum_first = (ptrdiff_t)from * dim;
        product<P>(n, kQueries, words, k + first, words, q, kQueries, logits, kQueries, false);
        product<P>(n, kQueries, words, v + first, words, slots ? slot_grads : out, kQueries, values, kQueries, false);
        if (all_seen(keys, from, to, query))
          differentiate<P, false>(p, keys, query, from, to, state, logits, values, weights, grads, grads_right);
        else
          differentiate<P, true>(p, keys, query, from, to, state, logits, values, weights, grads, grads_right);
        // What is stored is a constant: of slots the gradient of the keys is for their map alone.
        if (!slots)
          product<P>(n, dim, kQueries / P::G, weights, kQueries / P::G, out_right, dim, grad_v + sum_first, dim, true);
        if (!slots || p.key_map != nullptr)
          product<P>(n, dim, kQueries / P::G, grads, kQueries / P::G, q_right, dim, grad_k + sum_first, dim, true);
        product<P>(dim, kQueries, n / P::G, k_left + from / P::G, keys.rows / P::G, grads_right, kQueries, grad_q,
                   kQueries, true);
      });
      put_queries(grad_q, state.scale, dim, q_spare);
      for (int i = 0; i < count; ++i) {
        const Turn by = turn_of_token(p, keys, p.key_count - p.tokens + keys.chunk * p.chunk + query + i);
        turn_row<true>(q_spare + (ptrdiff_t)i * dim, by, dim, row);
        if (p.shift_query != nullptr) {
          const T* own = static_cast<const T*>(p.q) + at + i * stride;
          add_scaled(p.shift_query + query_head * dim, state.by_shift[i], dim, row);
          add_scaled(own, state.by_shift[i], dim, p.grad_shift_query + (place * p.heads + query_head) * dim);
        }
        put_row(row, dim, static_cast<T*>(p.grad_q) + at + i * stride);
        p.grad_shift[(token + i) * p.heads + query_head] = state.by_shift[i];
      }
    }
  }
  put_keys<T>(p, keys, grad_k, grad_v, row);
  put_map<P, T>(p, keys, grad_k, {row, map, k, nullptr}, k_left, v);
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
