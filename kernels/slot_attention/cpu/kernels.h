// What each instruction set has of its own: attention of one chunk's queries, forward and backward.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mnemos::slot_attention {

constexpr int kDimMultiple = 16;

// A step's arguments and results. Token is what q, k, v and the results are made of.
struct Step {
  int64_t batch, tokens, heads, kv_heads, chunks, chunk, window, slots, sinks;
  int64_t key_count;  // tokens, and those carried before them
  int dim;
  float scale;

  const void *q, *k, *v;            // [batch, tokens, heads, dim], [batch, key_count, kv_heads, dim]; before RoPE
  const int64_t* documents;         // [batch, key_count]
  const void *slot_k, *slot_v;      // [batch, chunks, kv_heads, slots, dim]; before RoPE
  const float *counts, *ages;       // [batch, chunks, kv_heads, slots]
  // How slots are read, null where they are read as they are.
  const void *key_map, *value_map;  // [kv_heads, dim, dim]: keys as k + k map, values likewise
  const float* shift_query;         // [heads, dim]: its product with a query before RoPE is added to the shift
  const float* shift;               // [batch, tokens, heads]
  const void *sink_k, *sink_v;      // [batch, chunks, sinks, kv_heads, dim]; after RoPE
  const bool* sinks_seen;           // [batch, chunks, sinks]

  // Cosines and sines of RoPE, [2, ..., dim / 2].
  const float* turns;   // of the keys' tokens, [batch, key_count]
  const float* places;  // of the places from which slots turn back by their ages, [batch, chunks]
  const float* back;    // by age, [ages_most + 1]
  int64_t ages_most;

  // Like q: the output, and with maps what it reads of slots' values before they are mapped, where there are slots.
  void *out, *slot_out;
  float* lse;            // [batch, heads, tokens], of logits in units of log 2

  const void* grad_out;                   // like q
  void* grad_q;                           // like q
  float *grad_k, *grad_v;                 // [batch, key_count, kv_heads, dim], added to
  float* grad_key_map;                    // [batch, chunks, kv_heads, dim, dim], zeros where nothing is written
  float* grad_value_map;                  // likewise, added to
  float* grad_shift_query;                // [batch, chunks, heads, dim], added to
  float* grad_shift;                      // like shift
  void *grad_sink_k, *grad_sink_v;        // like sink_k; zeros where nothing is written
};

// The keys that a chunk's queries see by one key-value head, in one list: the band (the chunk's own tokens and the window
// before them), slots in use, sinks.
struct Keys {
  int64_t row, head, chunk;
  int64_t from;      // the band's first key, of Step::key_count
  int queries;       // tokens of the chunk
  int before, band;  // keys of the band before the first query, and all of them
  int own;           // queries of the document of the chunk's first token, which alone see slots and sinks
  int slots_begin;   // an even place
  int slots_end;
  int sinks_begin;   // an even place
  int count, rows;   // of all keys, and padded to kRowMultiple
  const int* runs;   // [band], where in the band the key's document begins
  const int *first, *last;        // [rows], the queries that see the key, from first to before last
  const float *bias, *shifted;    // [rows], added to the logit in units of log 2; 1 where the query's shift is too
  const int64_t* sources;         // [count - slots_begin], which slot or sink
};

// In which a tile of queries and a block of keys meet.
constexpr int kQueries = 64;
constexpr int kKeys = 64;
constexpr int kRowMultiple = 32;

// `scratch` is aligned to 64 bytes.
using Run = void (*)(const Step& p, const Keys& keys, float* scratch);

struct Kernels {
  Run forward, backward;
  int elements;  // of a word: 2 where pairs of bfloat16 are multiplied
};

// Words that a chunk needs for work, forward or backward; the first 3 `dim` are for single rows, and two maps follow.
inline size_t scratch_size(const Keys& keys, size_t dim, int elements, bool backward) {
  const size_t sums = keys.rows * dim, matrix = sums / elements, tile = kQueries * dim;
  const size_t block = static_cast<size_t>(kQueries) * kKeys;
  const size_t work = backward ? 3 * matrix + 2 * sums + 9 * tile + 5 * block : 2 * matrix + sums + 5 * tile + 2 * block;
  return 3 * dim + 2 * dim * dim + work;
}

Kernels kernels_generic(bool bfloat16);
#if defined(__x86_64__)
Kernels kernels_avx2(bool bfloat16);
Kernels kernels_avx512(bool bfloat16);
Kernels kernels_avx512_bf16(bool bfloat16);
#endif

}  // namespace mnemos::slot_attention
