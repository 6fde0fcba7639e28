// slot_attention for CPU tensors: checks, and chunks for torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cpu/isa.h"
#include "slot_attention/cpu/chunk_keys.h"

namespace mnemos::slot_attention {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Kernels kernels(bool bfloat16) {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
      return kernels_avx512_bf16(bfloat16);
    case Isa::avx512:
      return kernels_avx512(bfloat16);
    case Isa::avx2:
      return kernels_avx2(bfloat16);
#endif
    default:
      return kernels_generic(bfloat16);
  }
}

void check(const Tensor& x, const char* name, ScalarType dtype, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "slot_attention: ", name, " has an unexpected dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "slot_attention: ", name, " is not contiguous");
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(
      std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), "slot_attention: ", name,
      " has an unexpected shape");
}

template <class T = float>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

Step step(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& documents,
    const Tensor& slot_k,
    const Tensor& slot_v,
    const Tensor& counts,
    const Tensor& ages,
    const std::optional<Tensor>& key_map,
    const std::optional<Tensor>& value_map,
    const std::optional<Tensor>& shift_query,
    const Tensor& shift,
    const Tensor& sink_k,
    const Tensor& sink_v,
    const Tensor& sinks_seen,
    const Tensor& turns,
    const Tensor& places,
    const Tensor& back,
    int64_t window,
    int64_t chunk,
    double scale) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "slot_attention: q must be float32 or bfloat16");
  STD_TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && slot_k.dim() == 5 && sink_k.dim() == 5,
      "slot_attention: q and k must have 4 dimensions, slot_k and sink_k 5");
  Step p{};
  p.batch = q.size(0), p.tokens = q.size(1), p.heads = q.size(2), p.dim = static_cast<int>(q.size(3));
  p.key_count = k.size(1), p.kv_heads = k.size(2);
  p.slots = slot_k.size(3), p.sinks = sink_k.size(2);
  p.window = window, p.chunk = chunk, p.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(p.tokens > 0 && p.key_count >= p.tokens, "slot_attention: k must have q's tokens at its end");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0, "slot_attention: heads must be a multiple of k's");
  STD_TORCH_CHECK(p.dim > 0 && p.dim % kDimMultiple == 0, "slot_attention: dim must be a multiple of 16");
  STD_TORCH_CHECK(window >= 0 && chunk > 0, "slot_attention: window must be at least 0, chunk at least 1");
  p.chunks = (p.tokens + chunk - 1) / chunk;
  check(q, "q", dtype, {p.batch, p.tokens, p.heads, p.dim});
  check(k, "k", dtype, {p.batch, p.key_count, p.kv_heads, p.dim});
  check(v, "v", dtype, {p.batch, p.key_count, p.kv_heads, p.dim});
  check(documents, "documents", ScalarType::Long, {p.batch, p.key_count});
  check(slot_k, "slot_k", dtype, {p.batch, p.chunks, p.kv_heads, p.slots, p.dim});
  check(slot_v, "slot_v", dtype, {p.batch, p.chunks, p.kv_heads, p.slots, p.dim});
  check(counts, "counts", ScalarType::Float, {p.batch, p.chunks, p.kv_heads, p.slots});
  check(ages, "ages", ScalarType::Float, {p.batch, p.chunks, p.kv_heads, p.slots});
  STD_TORCH_CHECK(
      key_map.has_value() == value_map.has_value() && key_map.has_value() == shift_query.has_value(),
      "slot_attention: key_map, value_map and shift_query come together");
  if (key_map.has_value()) {
    check(*key_map, "key_map", dtype, {p.kv_heads, p.dim, p.dim});
    check(*value_map, "value_map", dtype, {p.kv_heads, p.dim, p.dim});
    check(*shift_query, "shift_query", ScalarType::Float, {p.heads, p.dim});
    p.key_map = key_map->const_data_ptr(), p.value_map = value_map->const_data_ptr();
    p.shift_query = read(*shift_query);
  }
  check(shift, "shift", ScalarType::Float, {p.batch, p.tokens, p.heads});
  check(sink_k, "sink_k", dtype, {p.batch, p.chunks, p.sinks, p.kv_heads, p.dim});
  check(sink_v, "sink_v", dtype, {p.batch, p.chunks, p.sinks, p.kv_heads, p.dim});
  check(sinks_seen, "sinks_seen", ScalarType::Bool, {p.batch, p.chunks, p.sinks});
  STD_TORCH_CHECK(back.dim() == 3 && back.size(1) > 0, "slot_attention: back must be [2, ages, dim / 2]");
  p.ages_most = back.size(1) - 1;
  check(turns, "turns", ScalarType::Float, {2, p.batch, p.key_count, p.dim / 2});
  check(places, "places", ScalarType::Float, {2, p.batch, p.chunks, p.dim / 2});
  check(back, "back", ScalarType::Float, {2, p.ages_most + 1, p.dim / 2});
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.documents = read<int64_t>(documents);
  p.slot_k = slot_k.const_data_ptr(), p.slot_v = slot_v.const_data_ptr();
  p.counts = read(counts), p.ages = read(ages), p.shift = read(shift);
  p.turns = read(turns), p.places = read(places), p.back = read(back);
  p.sink_k = sink_k.const_data_ptr(), p.sink_v = sink_v.const_data_ptr();
  p.sinks_seen = read<bool>(sinks_seen);
  return p;
}

// Rows of what is there only where slots are mapped.
int64_t maps(const Step& p) { return p.key_map == nullptr ? 0 : p.batch; }

// Every `stride`-th chunk from `first` on, of all rows and heads. Threads take the next one when they are free: a
// chunk's cost grows with its slots in use.
void run(const Step& p, const Kernels& kernels, bool backward, int64_t first, int64_t stride) {
  const int64_t chunks = (p.chunks - first + stride - 1) / stride, heads = p.batch * p.kv_heads;
  const int64_t units = heads * chunks;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, units, 1, [&](int64_t, int64_t) {
    const FlushDenormals flush;
    ChunkKeys keys;
    for (int64_t unit = next++; unit < units; unit = next++) {
      const int64_t head = unit % heads, chunk = first + unit / heads * stride;
      const Keys& own = keys.of(p, head / p.kv_heads, head % p.kv_heads, chunk);
      (backward ? kernels.backward : kernels.forward)(p, own, keys.scratch(p.dim, kernels.elements, backward));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& documents,
    const Tensor& slot_k,
    const Tensor& slot_v,
    const Tensor& counts,
    const Tensor& ages,
    const std::optional<Tensor>& key_map,
    const std::optional<Tensor>& value_map,
    const std::optional<Tensor>& shift_query,
    const Tensor& shift,
    const Tensor& sink_k,
    const Tensor& sink_v,
    const Tensor& sinks_seen,
    const Tensor& turns,
    const Tensor& places,
    const Tensor& back,
    int64_t window,
    int64_t chunk,
    double scale) {
  Step p = step(
      q, k, v, documents, slot_k, slot_v, counts, ages, key_map, value_map, shift_query, shift, sink_k, sink_v,
      sinks_seen, turns, places, back, window, chunk, scale);
  Tensor out = torch::stable::empty_like(q);
  Tensor slot_out = torch::stable::new_empty(q, {maps(p), p.tokens, p.heads, p.dim}, q.scalar_type());
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.tokens}, ScalarType::Float);
  p.out = out.mutable_data_ptr(), p.slot_out = slot_out.mutable_data_ptr(), p.lse = floats(lse);
  run(p, kernels(q.scalar_type() == ScalarType::BFloat16), false, 0, 1);
  return {out, slot_out, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& documents,
    const Tensor& slot_k,
    const Tensor& slot_v,
    const Tensor& counts,
    const Tensor& ages,
    const std::optional<Tensor>& key_map,
    const std::optional<Tensor>& value_map,
    const std::optional<Tensor>& shift_query,
    const Tensor& shift,
    const Tensor& sink_k,
    const Tensor& sink_v,
    const Tensor& sinks_seen,
    const Tensor& turns,
    const Tensor& places,
    const Tensor& back,
    const Tensor& out,
    const Tensor& slot_out,
    const Tensor& lse,
    int64_t window,
    int64_t chunk,
    double scale) {
  Step p = step(
      q, k, v, documents, slot_k, slot_v, counts, ages, key_map, value_map, shift_query, shift, sink_k, sink_v,
      sinks_seen, turns, places, back, window, chunk, scale);
  const ScalarType dtype = q.scalar_type();
  check(grad_out, "grad_out", dtype, {p.batch, p.tokens, p.heads, p.dim});
  check(out, "out", dtype, {p.batch, p.tokens, p.heads, p.dim});
  check(slot_out, "slot_out", dtype, {maps(p), p.tokens, p.heads, p.dim});
  check(lse, "lse", ScalarType::Float, {p.batch, p.heads, p.tokens});
  Tensor grad_q = torch::stable::empty_like(q), grad_shift = torch::stable::empty_like(shift);
  const auto zeros = [&](const Tensor& like, ScalarType type) {
    return torch::stable::new_zeros(like, like.sizes(), type);
  };
  Tensor grad_k = zeros(k, ScalarType::Float), grad_v = zeros(v, ScalarType::Float);
  Tensor grad_sink_k = zeros(sink_k, dtype), grad_sink_v = zeros(sink_v, dtype);
  const auto by_chunk = [&](std::vector<int64_t> sizes) {
    sizes.insert(sizes.begin(), {maps(p), p.chunks});
    return torch::stable::new_zeros(q, sizes, ScalarType::Float);
  };
  Tensor grad_key_map = by_chunk({p.kv_heads, p.dim, p.dim}), grad_value_map = by_chunk({p.kv_heads, p.dim, p.dim});
  Tensor grad_shift_query = by_chunk({p.heads, p.dim});
  p.grad_out = grad_out.const_data_ptr();
  p.out = const_cast<void*>(out.const_data_ptr()), p.slot_out = const_cast<void*>(slot_out.const_data_ptr());
  p.lse = const_cast<float*>(read(lse));
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_shift = floats(grad_shift);
  p.grad_k = floats(grad_k), p.grad_v = floats(grad_v);
  p.grad_key_map = floats(grad_key_map), p.grad_value_map = floats(grad_value_map);
  p.grad_shift_query = floats(grad_shift_query);
  p.grad_sink_k = grad_sink_k.mutable_data_ptr(), p.grad_sink_v = grad_sink_v.mutable_data_ptr();
  const Kernels kernel = kernels(dtype == ScalarType::BFloat16);
  // Chunks whose bands overlap add to the same keys: they take turns, in one order whatever the threads do.
  const int64_t rounds = std::min(1 + (window + chunk - 1) / chunk, p.chunks);
  for (int64_t round = 0; round < rounds; ++round) run(p, kernel, true, round, rounds);
  return {
      grad_q,     grad_k,      grad_v,     grad_key_map, grad_value_map, grad_shift_query,
      grad_shift, grad_sink_k, grad_sink_v};
}

}  // namespace
}  // namespace mnemos::slot_attention

STABLE_TORCH_LIBRARY_IMPL(mnemos, CPU, m) {
  m.impl("slot_attention", TORCH_BOX(&mnemos::slot_attention::forward));
  m.impl("slot_attention_backward", TORCH_BOX(&mnemos::slot_attention::backward));
}
