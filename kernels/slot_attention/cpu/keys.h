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
  const int64_t half = p.dim / 2, at = (keys.row * p.keys + key) * half;
  return {p.turns + at, p.turns + p.batch * p.keys * half + at};
}

// Written to `row` [dim].
inline Turn turn_of_slot(const Step& p, const Keys& keys, int64_t slot, float* row) {
  const int64_t half = p.dim / 2, chunk = keys.row * p.chunks + keys.chunk;
  const float age = p.ages[(chunk * p.kv_heads + keys.head) * p.slots + slot];
  const int64_t back = age < p.ages_most ? (int64_t)age : p.ages_most;
  const float *c = p.places + chunk * half, *s = c + p.batch * p.chunks * half;
  const float *back_c = p.back + back * half, *back_s = back_c + (p.ages_most + 1) * half;
  for (int64_t i = 0; i < half; ++i) {
    row[i] = c[i] * back_c[i] - s[i] * back_s[i];
    row[half + i] = s[i] * back_c[i] + c[i] * back_s[i];
  }
  return {row, row + half};
}

// f(j, 0, 1 or 2, where) for every key of the band, the slots and the sinks: where its row stands in the tensors of Step.
template <class F>
inline void each_key(const Step& p, const Keys& keys, F f) {
  const int64_t place = keys.row * p.chunks + keys.chunk;
  for (int j = 0; j < keys.band; ++j)
    f(j, 0, ((keys.row * p.keys + keys.from + j) * p.kv_heads + keys.head) * p.dim);
  const int64_t* source = keys.sources - keys.extra;
  for (int j = keys.extra; j < keys.slots_end; ++j)
    f(j, 1, ((place * p.kv_heads + keys.head) * p.slots + source[j]) * p.dim);
  for (int j = keys.sinks; j < keys.count; ++j)
    f(j, 2, ((place * p.sinks + source[j]) * p.kv_heads + keys.head) * p.dim);
}

// Words of keys or values in rows; what is padding is zero.
template <class P, class T>
inline void gather(
    const Step& p, const Keys& keys, const void* band, const void* slots, const void* sinks, float* to) {
  const int words = p.dim / P::G;
  std::memset(to, 0, sizeof(float) * keys.rows * words);
  const T* from[] = {static_cast<const T*>(band), static_cast<const T*>(slots), static_cast<const T*>(sinks)};
  each_key(p, keys, [&](int j, int kind, int64_t at) { P::load_row(from[kind] + at, p.dim, to + (ptrdiff_t)j * words); });
}

inline int slots_padded(const Keys& keys) {
  constexpr int multiple = slot_attention::kRowMultiple;
  return (keys.slots_end - keys.extra + multiple - 1) / multiple * multiple;
}

// Words of the slots' keys as they are stored, in rows; what is padding is zero.
template <class P, class T>
inline void gather_slots(const Step& p, const Keys& keys, float* to) {
  const int words = p.dim / P::G;
  std::memset(to, 0, sizeof(float) * slots_padded(keys) * words);
  each_key(p, keys, [&](int j, int kind, int64_t at) {
    if (kind == 1)
      P::load_row(static_cast<const T*>(p.slot_k) + at, p.dim, to + (ptrdiff_t)(j - keys.extra) * words);
  });
}

// Memory that turning keys takes.
struct TurnScratch {
  float* row;     // [3 dim]
  float* map;     // [2 dim dim]
  float* stored;  // [keys.rows, dim]
  float* mapped;  // [keys.rows, dim]
};

// Words of all keys in rows, those of slots mapped, and turned; what is padding is zero.
template <class P, class T>
inline void gather_turned(const Step& p, const Keys& keys, const TurnScratch& work, float* to) {
  const int dim = p.dim, words = dim / P::G;
  const T* from[] = {static_cast<const T*>(p.k), static_cast<const T*>(p.slot_k), static_cast<const T*>(p.sink_k)};
  const bool maps = p.key_map != nullptr && keys.slots_end > keys.extra;
  if (maps) {
    const T* map = static_cast<const T*>(p.key_map) + keys.head * dim * dim;
    for (int i = 0; i < dim; ++i) P::load_row(map + (ptrdiff_t)i * dim, dim, work.map + (ptrdiff_t)i * words);
    const float* right = P::interleaved(work.map, dim, dim, work.map + (ptrdiff_t)dim * dim);
    gather_slots<P, T>(p, keys, work.stored);
    product<P>(keys.slots_end - keys.extra, dim, words, work.stored, words, right, dim, work.mapped, dim, false);
  }
  std::memset(to, 0, sizeof(float) * keys.rows * words);
  each_key(p, keys, [&](int j, int kind, int64_t at) {
    float *own = to + (ptrdiff_t)j * words, *row = work.row;
    if (kind == 2) return P::load_row(from[kind] + at, dim, own);
    if (kind == 0) {
      turn_row<false>(from[kind] + at, turn_of_token(p, keys, keys.from + j), dim, row);
    } else {
      const Turn by = turn_of_slot(p, keys, keys.sources[j - keys.extra], row + 2 * dim);
      if (maps) {
        const float* change = work.mapped + (ptrdiff_t)(j - keys.extra) * dim;
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

template <class T>
inline void put_row(const float* from, int dim, T* to) {
  for (int i = 0; i < dim; i += VL) store(to + i, load(from + i));
}

}  // namespace
}  // namespace MNEMOS_ISA
}  // namespace mnemos
