// A tile of queries at a time: logits of a block of keys, one row per key, so that what belongs to a query is in a lane.
#pragma once

#include "slot_attention/cpu/keys.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

constexpr float kNever = -3e38f;

// Which queries of a tile's vector see a key.
MNEMOS_INLINE ivec seen(const Keys& keys, int j, ivec query) {
  return (query >= keys.first[j]) & (query < keys.last[j]);
}

inline bool all_seen(const Keys& keys, int from, int to, int query) {
  bool all = true;
  for (int j = from; j < to; ++j) all &= keys.first[j] <= query && keys.last[j] >= query + kQueries;
  return all;
}

// The blocks of keys that a tile of queries may see, as f(from, to, whether they are slots), from and to even.
template <class F>
inline void each_block(const Keys& keys, int query, int count, F f) {
  const auto blocks = [&](int from, int to, bool slots) {
    for (int j = from; j < to; j += kKeys) f(j, j + kKeys < to ? j + kKeys : to, slots);
  };
  const int least = keys.runs[keys.before + query], end = keys.before + query + count;
  blocks(least - least % 2, end + end % 2, false);
  if (query >= keys.own) return;
  blocks(keys.slots_begin, keys.sinks_begin, true);
  blocks(keys.sinks_begin, keys.count + keys.count % 2, false);
}

// The state of a tile's softmax, by query.
struct Softmax {
  float most[kQueries], total[kQueries], shift[kQueries];
};

// Weights of a block's logits [to - from][kQueries], as the right operand of a sum over keys; `outs` [2 dim][kQueries]
// are scaled to the new maximum.
template <class P, bool MASKED>
inline void weigh(const Step& p, const Keys& keys, int query, int from, int to, Softmax& state, float* logits,
                  float* weights, float* outs) {
  const vec scale = splat(p.scale * kLog2E);
  for (int c = 0; c < kQueries; c += VL) {
    const ivec queries = lanes(query + c);
    const vec shift = load(state.shift + c), before = load(state.most + c);
    vec most = before;
    for (int j = from; j < to; ++j) {
      float* at = logits + (ptrdiff_t)(j - from) * kQueries + c;
      vec x = load(at) * scale + (splat(keys.bias[j]) + shift * splat(keys.shifted[j]));
      if (MASKED) x = seen(keys, j, queries) ? x : splat(kNever);
      store(at, x);
      most = x > most ? x : most;
    }
    const vec kept = P::exp2(before - most);
    vec total = load(state.total + c) * kept;
    for (int j = from; j < to; j += 2) {
      const float* at = logits + (ptrdiff_t)(j - from) * kQueries + c;
      const vec a = P::exp2(load(at) - most), b = P::exp2(load(at + kQueries) - most);
      total += a + b;
      P::put_interleaved(weights + c, kQueries, j - from, a, b);
    }
    store(state.total + c, total);
    store(state.most + c, most);
    if (sum(before < most ? splat(1.0f) : vec{}) > 0)
      for (int i = 0; i < 2 * p.dim; ++i) store(outs + i * kQueries + c, load(outs + i * kQueries + c) * kept);
  }
}

// A query of the chunk, turned, into its row of a tile.
template <class P, class T>
inline void load_query(const Step& p, const Keys& keys, const T* from, int query, float* row, float* rows) {
  const int64_t key = p.key_count - p.tokens + keys.chunk * p.chunk + query;
  turn_row<false>(from, turn_of_token(p, keys, key), p.dim, row);
  P::round_row(row, p.dim, rows + (ptrdiff_t)(query % kQueries) * (p.dim / P::G));
}

template <class P, class T>
void run_forward(const Step& p, const Keys& keys, float* scratch) {
  const int dim = p.dim, words = dim / P::G, group = static_cast<int>(p.heads / p.kv_heads);
  const size_t matrix = static_cast<size_t>(keys.rows) * words, tile = static_cast<size_t>(kQueries) * dim;
  float *row = scratch, *map = row + 3 * dim;
  float *k = map + 2 * dim * dim, *v = k + matrix, *spare = v + matrix;  // v as the left operand of a sum over keys
  float *q = spare + static_cast<size_t>(keys.rows) * dim, *rows = q + tile, *out = rows + tile, *slot_out = out + tile;
  float *slot_rows = slot_out + tile, *logits = slot_rows + tile, *weights = logits + kQueries * kKeys;
  gather_turned<P, T>(p, keys, {row, map, v, spare}, k);
  gather<P, T>(p, keys, p.v, p.slot_v, p.sink_v, spare);
  float* interleaved = P::G > 1 ? spare + matrix : spare;
  transpose_words(P::interleaved(spare, keys.rows, dim, interleaved), keys.rows / P::G, dim, v);
  const float* value_map = nullptr;  // as the right operand
  if (has_maps(p, keys)) {
    load_map<P, T>(p, keys, p.value_map, map);
    value_map = P::interleaved(map, dim, dim, map + (ptrdiff_t)dim * dim);
  }

  for (int h = 0; h < group; ++h) {
    const int64_t query_head = keys.head * group + h;
    for (int query = 0; query < keys.queries; query += kQueries) {
      const int count = keys.queries - query < kQueries ? keys.queries - query : kQueries;
      const int64_t token = keys.row * p.tokens + keys.chunk * p.chunk + query, stride = p.heads * dim;
      const int64_t at = token * stride + query_head * dim;
      Softmax state;
      std::memset(rows, 0, sizeof(float) * kQueries * words);
      for (int i = 0; i < kQueries; ++i) {
        state.most[i] = -1e30f;
        state.total[i] = state.shift[i] = 0.0f;
        if (i >= count) continue;
        const T* own = static_cast<const T*>(p.q) + at + i * stride;
        load_query<P>(p, keys, own, query + i, row, rows);
        state.shift[i] = shift_of(p, own, token + i, query_head);
      }
      transpose_words(rows, kQueries, words, q);
      std::memset(out, 0, sizeof(float) * 2 * tile);
      each_block(keys, query, count, [&](int from, int to, bool slots) {
        product<P>(to - from, kQueries, words, k + (ptrdiff_t)from * words, words, q, kQueries, logits, kQueries, false);
        if (all_seen(keys, from, to, query))
          weigh<P, false>(p, keys, query, from, to, state, logits, weights, out);
        else
          weigh<P, true>(p, keys, query, from, to, state, logits, weights, out);
        product<P>(dim, kQueries, (to - from) / P::G, v + from / P::G, keys.rows / P::G, weights, kQueries,
                   slots ? slot_out : out, kQueries, true);
      });
      float* lse = p.lse + (keys.row * p.heads + query_head) * p.tokens + keys.chunk * p.chunk + query;
      for (int i = 0; i < count; ++i) lse[i] = state.most[i] + __builtin_log2f(state.total[i]);
      for (int i = 0; i < kQueries; ++i) state.total[i] = i < count ? 1 / state.total[i] : 0.0f;
      for (size_t i = 0; i < tile; i += VL) store(out + i, load(out + i) + load(slot_out + i));
      const auto put = [&](void* to) {
        for (int i = 0; i < count; ++i) put_row(rows + (ptrdiff_t)i * dim, dim, static_cast<T*>(to) + at + i * stride);
      };
      if (value_map == nullptr) {
        put_queries(out, state.total, dim, rows);
        put(p.out);
        continue;
      }
      // What a query reads of the slots' values is mapped, in place of every slot's: there are fewer.
      put_queries(slot_out, state.total, dim, rows);
      put(p.slot_out);
      for (int i = 0; i < kQueries; ++i) P::round_row(rows + (ptrdiff_t)i * dim, dim, slot_rows + (ptrdiff_t)i * words);
      put_queries(out, state.total, dim, rows);
      product<P>(kQueries, dim, words, slot_rows, words, value_map, dim, rows, dim, true);
      put(p.out);
    }
  }
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
