// Keys and values of a chunk in one list, and rows of queries.
#pragma once

#include "slot_attention/cpu/kernels.h"
#include "slot_attention/cpu/words.h"

namespace mnemos {
namespace MNEMOS_ISA {
namespace {

using slot_attention::Keys;
using slot_attention::kKeys;
using slot_attention::kQueries;
using slot_attention::Step;

constexpr float kLog2E = 1.44269504088896340736f;

// Cosines and sines of one row, [dim / 2] each.
struct Turn {
  const float *cos, *sin;
};

MNEMOS_INLINE float scalar(const float* p) { return *p; }
MNEMOS_INLINE float scalar(const Bfloat16* p) {
  const uint32_t bits = (uint32_t)p->bits << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A row [dim] turned, in float32; or turned back, which its gradient is.
template <bool BACK, class T>
inline void turn_row(const T* from, Turn by, int dim, float* to) {
  const int half = dim / 2;
  int i = 0;
  for (; i + VL <= half; i += VL) {
    const vec a = load(from + i), b = load(from + half + i), c = load(by.cos + i), s = load(by.sin + i);
    store(to + i, BACK ? a * c + b * s : a * c - b * s);
    store(to + half + i, BACK ? b * c - a * s : b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = scalar(from + i), b = scalar(from + half + i), c = by.cos[i], s = by.sin[i];
    to[i] = BACK ? a * c + b * s : a * c - b * s;
    to[half + i] = BACK ? b * c - a * s : b * c + a * s;
  }
}

inline Turn turn_of_token(const Step& p, const Keys& keys, int64_t key) {
  const int64_t half = p.dim / 2, at = (keys.row * p.key_count + key) * half;
  return {p.turns + at, p.turns + p.batch * p.key_count * half + at};
}

// Written to `row` [dim].
inline Turn turn_of_slot(const Step& p, const Keys& keys, int64_t slot, float* row) {
  const int64_t half = p.dim / 2, chunk = keys.row * p.chunks + keys.chunk;
  const float age = p.ages[(chunk * p.kv_heads + keys.head) * p.slots + slot];
  const int64_t back = !(age > 0) ? 0 : age < p.ages_most ? (int64_t)age : p.ages_most;
  const float *c = p.places + chunk * half, *s = c + p.batch * p.chunks * half;
  const float *back_c = p.back + back * half, *back_s = back_c + (p.ages_most + 1) * half;
  for (int64_t i = 0; i < half; ++i) {
    row[i] = c[i] * back_c[i] - s[i] * back_s[i];
    row[half + i] = s[i] * back_c[i] + c[i] * back_s[i];
  }
  return {row, row + half};
}

enum Kind { kBand, kSlot, kSink };

// f(j, kind, where) for every key that there is: where its row stands in the tensors of Step.
template <class F>
inline void each_key(const Step& p, const Keys& keys, F f) {
  const int64_t place = keys.row * p.chunks + keys.chunk;
  for (int j = 0; j < keys.band; ++j)
    f(j, kBand, ((keys.row * p.key_count + keys.from + j) * p.kv_heads + keys.head) * p.dim);
  for (int j = keys.slots_begin; j < keys.slots_end; ++j) {
    const int64_t slot = keys.sources[j - keys.slots_begin];
    f(j, kSlot, ((place * p.kv_heads + keys.head) * p.slots + slot) * p.dim);
  }
  for (int j = keys.sinks_begin; j < keys.count; ++j) {
    const int64_t sink = keys.sources[j - keys.slots_begin];
    f(j, kSink, ((place * p.sinks + sink) * p.kv_heads + keys.head) * p.dim);
  }
}

// Words of keys or values in rows; what is padding is zero.
template <class P, class T>
inline void gather(
    const Step& p, const Keys& keys, const void* band, const void* slots, const void* sinks, float* to) {
  const int words = p.dim / P::G;
  std::memset(to, 0, sizeof(float) * keys.rows * words);
  const T* from[] = {static_cast<const T*>(band), static_cast<const T*>(slots), static_cast<const T*>(sinks)};
  each_key(p, keys, [&](int j, Kind kind, int64_t at) { P::load_row(from[kind] + at, p.dim, to + (ptrdiff_t)j * words); });
}

inline int slots_padded(const Keys& keys) {
  constexpr int multiple = slot_attention::kRowMultiple;
  return (keys.slots_end - keys.slots_begin + multiple - 1) / multiple * multiple;
}

// Words of the slots' keys as they are stored, in rows; what is padding is zero.
template <class P, class T>
inline void gather_slots(const Step& p, const Keys& keys, float* to) {
  const int words = p.dim / P::G;
  std::memset(to, 0, sizeof(float) * slots_padded(keys) * words);
  each_key(p, keys, [&](int j, Kind kind, int64_t at) {
    if (kind == kSlot)
      P::load_row(static_cast<const T*>(p.slot_k) + at, p.dim, to + (ptrdiff_t)(j - keys.slots_begin) * words);
  });
}

// Memory that turning keys takes.
struct TurnScratch {
  float* row;     // [3 dim]
  float* map;     // [2 dim dim]
  float* stored;  // [keys.rows, dim]
  float* mapped;  // [keys.rows, dim]
};

// Whether there is a slot to be read through maps.
inline bool has_maps(const Step& p, const Keys& keys) {
  return p.key_map != nullptr && keys.slots_end > keys.slots_begin;
}

// Words of the map of the keys' head in rows, to [dim dim].
template <class P, class T>
inline void load_map(const Step& p, const Keys& keys, const void* maps, float* to) {
  const T* map = static_cast<const T*>(maps) + keys.head * p.dim * p.dim;
  for (int i = 0; i < p.dim; ++i) P::load_row(map + (ptrdiff_t)i * p.dim, p.dim, to + (ptrdiff_t)i * (p.dim / P::G));
}

// Words of all keys in rows, those of slots mapped, and turned; what is padding is zero.
template <class P, class T>
inline void gather_turned(const Step& p, const Keys& keys, const TurnScratch& work, float* to) {
  const int dim = p.dim, words = dim / P::G;
  const T* from[] = {static_cast<const T*>(p.k), static_cast<const T*>(p.slot_k), static_cast<const T*>(p.sink_k)};
  const bool maps = has_maps(p, keys);
  if (maps) {
    load_map<P, T>(p, keys, p.key_map, work.map);
    const float* right = P::interleaved(work.map, dim, dim, work.map + (ptrdiff_t)dim * dim);
    gather_slots<P, T>(p, keys, work.stored);
    product<P>(keys.slots_end - keys.slots_begin, dim, words, work.stored, words, right, dim, work.mapped, dim, false);
  }
  std::memset(to, 0, sizeof(float) * keys.rows * words);
  each_key(p, keys, [&](int j, Kind kind, int64_t at) {
    float *own = to + (ptrdiff_t)j * words, *row = work.row;
    if (kind == kSink) return P::load_row(from[kind] + at, dim, own);
    if (kind == kBand) {
      turn_row<false>(from[kind] + at, turn_of_token(p, keys, keys.from + j), dim, row);
    } else {
      const Turn by = turn_of_slot(p, keys, keys.sources[j - keys.slots_begin], row + 2 * dim);
      if (maps) {
        const float* change = work.mapped + (ptrdiff_t)(j - keys.slots_begin) * dim;
        for (int i = 0; i < dim; i += VL) store(row + dim + i, load(from[kind] + at + i) + load(change + i));
        turn_row<false>(row + dim, by, dim, row);
      } else {
        turn_row<false>(from[kind] + at, by, dim, row);
      }
    }
    P::round_row(row, dim, own);
  });
}

// Words [dim][kQueries] in float32 to rows [kQueries][dim], times a factor of each query.
inline void put_queries(const float* columns, const float* factors, int dim, float* rows) {
  for (int c = 0; c < kQueries; c += VL) {
    const vec factor = load(factors + c);
    for (int i = 0; i < dim; i += VL) {
      vec square[VL];
      MNEMOS_UNROLL
      for (int r = 0; r < VL; ++r) square[r] = load(columns + (ptrdiff_t)(i + r) * kQueries + c) * factor;
      transpose(square);
      MNEMOS_UNROLL
      for (int r = 0; r < VL; ++r) store(rows + (ptrdiff_t)(c + r) * dim + i, square[r]);
    }
  }
}

template <class T, class U>
inline float dot_of(const T* a, const U* b, int dim) {
  vec total = {};
  for (int i = 0; i < dim; i += VL) total += load(a + i) * load(b + i);
  return sum(total);
}

// What is added to a query's logits of slots, in units of log 2; q before RoPE.
template <class T>
inline float shift_of(const Step& p, const T* q, int64_t token, int64_t query_head) {
  const float own = p.shift[token * p.heads + query_head];
  return kLog2E * (p.shift_query == nullptr ? own : own + dot_of(q, p.shift_query + query_head * p.dim, p.dim));
}

template <class T>
inline void put_row(const float* from, int dim, T* to) {
  for (int i = 0; i < dim; i += VL) store(to + i, load(from + i));
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
