// miras_scan and miras_scan_backward for CPU tensors: checks, memory, and items of work for torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "miras_scan/cpu/scan.h"

namespace mnemos {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Kernels scan_kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::avx512_bf16:
    case Isa::avx512:
      return scan_avx512();
    case Isa::avx2:
      return scan_avx2();
#endif
    default:
      return scan_generic();
  }
}

void check(const Tensor& x, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(x.is_cpu(), "miras_scan: ", name, " is not on the CPU");
  STD_TORCH_CHECK(x.scalar_type() == dtype, "miras_scan: ", name, " has an unexpected dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "miras_scan: ", name, " is not contiguous");
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), "miras_scan: ", name,
                  " has an unexpected shape");
}

Tensor make(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype = ScalarType::Float) {
  const std::vector<int64_t> sizes(shape);
  Tensor x = torch::stable::new_empty(like, sizes, dtype);
#if defined(__linux__)
  // Memory of this size is new from the system at every call, and its first touch costs a fault per page: a fifth of
  // the time of a long sequence, unless pages are large. Below, malloc hands out what was used before.
  constexpr uintptr_t kFresh = uintptr_t{32} << 20, kPage = uintptr_t{2} << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(x.numel()) * x.element_size();
  if (bytes >= kFresh) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
    const uintptr_t first = (start + kPage - 1) / kPage * kPage, end = (start + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);  // a hint: it may be refused
  }
#endif
  return x;
}

const float* floats(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
float* mutable_floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

struct Inputs {
  const Tensor &q, &k, &v, &alpha, &eta, &theta;
  const std::optional<Tensor>& resets;
};

// Fills what both passes have in common, and refuses what would read out of bounds.
void fill(Problem& p, int64_t& batch, const Inputs& x, int64_t interval) {
  STD_TORCH_CHECK(x.q.dim() == 4 && x.v.dim() == 4, "miras_scan: q and v have four dimensions");
  const ScalarType dtype = x.q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
                  "miras_scan: q is neither float32 nor bfloat16");
  batch = x.q.size(0);
  p.sequence = x.q.size(1);
  p.heads = x.q.size(2);
  p.key_dim = x.q.size(3);
  p.value_dim = x.v.size(3);
  p.interval = interval;
  STD_TORCH_CHECK(p.key_dim == 32 || p.key_dim == 64 || p.key_dim == 128, "miras_scan: the key dim is ", p.key_dim,
                  "; expected 32, 64 or 128");
  STD_TORCH_CHECK(p.value_dim > 0 && p.value_dim % 16 == 0, "miras_scan: the value dim is ", p.value_dim,
                  "; expected a multiple of 16");
  STD_TORCH_CHECK(p.sequence > 0, "miras_scan: no tokens");
  STD_TORCH_CHECK(interval > 0 && interval % kChunk == 0, "miras_scan: the interval is ", interval,
                  "; expected a multiple of ", kChunk);
  check(x.q, "q", dtype, {batch, p.sequence, p.heads, p.key_dim});
  check(x.k, "k", dtype, {batch, p.sequence, p.heads, p.key_dim});
  check(x.v, "v", dtype, {batch, p.sequence, p.heads, p.value_dim});
  check(x.alpha, "alpha", ScalarType::Float, {batch, p.sequence, p.heads});
  check(x.eta, "eta", ScalarType::Float, {batch, p.sequence, p.heads});
  check(x.theta, "theta", ScalarType::Float, {batch, p.sequence, p.heads});
  if (x.resets.has_value()) check(*x.resets, "resets", ScalarType::Bool, {batch, p.sequence});
  p.bfloat16 = dtype == ScalarType::BFloat16;
  p.q = x.q.const_data_ptr();
  p.k = x.k.const_data_ptr();
  p.v = x.v.const_data_ptr();
  p.alpha = floats(x.alpha);
  p.eta = floats(x.eta);
  p.theta = floats(x.theta);
  p.resets = x.resets.has_value() ? static_cast<const bool*>(x.resets->const_data_ptr()) : nullptr;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items of work, slice by slice of the same head, so that the slices of one head are summed in one order.
struct Work {
  int64_t slices, columns;  // columns of the widest slice
  std::vector<Item> items;

  // Slices repeat what does not depend on the columns, hence only where whole heads leave threads idle.
  Work(int64_t batch, const Problem& p) {
    const int64_t rows = batch * p.heads, threads = torch::stable::get_num_threads();
    const int64_t wanted = rows > 0 ? std::min(divide_up(threads, rows), p.value_dim / 16) : 1;
    columns = divide_up(p.value_dim / 16, wanted) * 16;
    slices = divide_up(p.value_dim, columns);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t first = 0; first < p.value_dim; first += columns)
        items.push_back({row / p.heads, row % p.heads, first, std::min(columns, p.value_dim - first)});
  }

  // run(item index, scratch) for every item, each on one thread.
  template <typename F>
  void for_each(const Tensor& like, int64_t scratch_size, const F& run) const {
    const int64_t count = (int64_t)items.size();
    const int64_t workers = std::min<int64_t>(count, torch::stable::get_num_threads());
    if (count == 0) return;
    const int64_t size = divide_up(scratch_size, 1024) * 1024;
    const Tensor memory = make(like, {workers * size + 16});
    float* scratch = mutable_floats(memory);
    scratch += (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64 / sizeof(float);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t i = count * worker / workers; i < count * (worker + 1) / workers; ++i)
          run(i, scratch + worker * size);
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> miras_scan(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& alpha, const Tensor& eta, const Tensor& theta,
    const Tensor& memory, const Tensor& momentum, const std::optional<Tensor>& resets, int64_t interval, bool save) {
  const Kernels kernels = scan_kernels();
  Forward p{};
  int64_t batch;
  fill(p, batch, {q, k, v, alpha, eta, theta, resets}, interval);
  check(memory, "memory", ScalarType::Float, {batch, p.heads, p.key_dim, p.value_dim});
  check(momentum, "momentum", ScalarType::Float, {batch, p.heads, p.key_dim, p.value_dim});
  p.memory = floats(memory);
  p.momentum = floats(momentum);
  const Tensor y = make(v, {batch, p.sequence, p.heads, p.value_dim}, v.scalar_type());
  const Tensor memory_after = make(memory, {batch, p.heads, p.key_dim, p.value_dim});
  const Tensor momentum_after = make(memory, {batch, p.heads, p.key_dim, p.value_dim});
  const int64_t saves = divide_up(p.sequence, interval);
  const Tensor residuals = save ? make(memory, {batch, p.heads, p.sequence, p.value_dim}) : make(memory, {0});
  const Tensor states =
      save ? make(memory, {batch, p.heads, saves, 2, p.key_dim, p.value_dim}) : make(memory, {0});
  p.y = y.mutable_data_ptr();
  p.memory_after = mutable_floats(memory_after);
  p.momentum_after = mutable_floats(momentum_after);
  p.residuals = save ? mutable_floats(residuals) : nullptr;
  p.states = save ? mutable_floats(states) : nullptr;

  const Work work(batch, p);
  work.for_each(memory, kernels.forward_scratch(p, work.columns),
                [&](int64_t i, float* scratch) { kernels.forward(p, work.items[i], scratch); });
  return {y, memory_after, momentum_after, residuals, states};
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// target[i] = sum over slices of parts[slice * size + i], first slice first: the same bits at every run.
void sum_slices(const float* parts, int64_t slices, int64_t size, void* target, bool bfloat16) {
  torch::stable::parallel_for(0, size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float total = parts[i];
      for (int64_t s = 1; s < slices; ++s) total += parts[s * size + i];
      if (bfloat16)
        static_cast<uint16_t*>(target)[i] = to_bfloat16(total);
      else
        static_cast<float*>(target)[i] = total;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> miras_scan_backward(
    const Tensor& grad_y, const Tensor& grad_memory, const Tensor& grad_momentum, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& alpha, const Tensor& eta, const Tensor& theta, const std::optional<Tensor>& resets,
    const Tensor& residuals, const Tensor& states, int64_t interval) {
  const Kernels kernels = scan_kernels();
  Backward p{};
  int64_t batch;
  fill(p, batch, {q, k, v, alpha, eta, theta, resets}, interval);
  const int64_t saves = divide_up(p.sequence, interval);
  check(grad_y, "grad_y", v.scalar_type(), {batch, p.sequence, p.heads, p.value_dim});
  check(grad_memory, "grad_memory", ScalarType::Float, {batch, p.heads, p.key_dim, p.value_dim});
  check(grad_momentum, "grad_momentum", ScalarType::Float, {batch, p.heads, p.key_dim, p.value_dim});
  check(residuals, "residuals", ScalarType::Float, {batch, p.heads, p.sequence, p.value_dim});
  check(states, "states", ScalarType::Float, {batch, p.heads, saves, 2, p.key_dim, p.value_dim});
  p.grad_y = grad_y.const_data_ptr();
  p.grad_memory = floats(grad_memory);
  p.grad_momentum = floats(grad_momentum);
  p.residuals = floats(residuals);
  p.states = floats(states);

  const ScalarType dtype = q.scalar_type();
  const Tensor grad_q = make(q, {batch, p.sequence, p.heads, p.key_dim}, dtype);
  const Tensor grad_k = make(q, {batch, p.sequence, p.heads, p.key_dim}, dtype);
  const Tensor grad_v = make(q, {batch, p.sequence, p.heads, p.value_dim}, dtype);
  const Tensor gates[] = {make(alpha, {batch, p.sequence, p.heads}), make(alpha, {batch, p.sequence, p.heads}),
                          make(alpha, {batch, p.sequence, p.heads})};
  const Tensor grad_memory0 = make(states, {batch, p.heads, p.key_dim, p.value_dim});
  const Tensor grad_momentum0 = make(states, {batch, p.heads, p.key_dim, p.value_dim});
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_memory0 = mutable_floats(grad_memory0);
  p.grad_momentum0 = mutable_floats(grad_momentum0);

  const Work work(batch, p);
  const int64_t scratch_size = kernels.backward_scratch(p, work.columns);
  if (work.slices == 1) {
    const Shared out{grad_q.mutable_data_ptr(), grad_k.mutable_data_ptr(), p.bfloat16, mutable_floats(gates[0]),
                     mutable_floats(gates[1]), mutable_floats(gates[2])};
    work.for_each(states, scratch_size,
                  [&](int64_t i, float* scratch) { kernels.backward(p, out, work.items[i], scratch); });
  } else {
    const int64_t gate_size = batch * p.sequence * p.heads, key_size = gate_size * p.key_dim;
    const Tensor parts = make(states, {work.slices * (2 * key_size + 3 * gate_size)});
    float* queries = mutable_floats(parts);
    float* keys = queries + work.slices * key_size;
    float* gate_parts = keys + work.slices * key_size;
    work.for_each(states, scratch_size, [&](int64_t i, float* scratch) {
      const int64_t slice = i % work.slices;
      float* own_gates = gate_parts + slice * gate_size;
      const Shared out{queries + slice * key_size, keys + slice * key_size, false, own_gates,
                       own_gates + work.slices * gate_size, own_gates + 2 * work.slices * gate_size};
      kernels.backward(p, out, work.items[i], scratch);
    });
    sum_slices(queries, work.slices, key_size, grad_q.mutable_data_ptr(), p.bfloat16);
    sum_slices(keys, work.slices, key_size, grad_k.mutable_data_ptr(), p.bfloat16);
    for (int i = 0; i < 3; ++i)
      sum_slices(gate_parts + i * work.slices * gate_size, work.slices, gate_size, gates[i].mutable_data_ptr(), false);
  }
  return {grad_q, grad_k, grad_v, gates[0], gates[1], gates[2], grad_memory0, grad_momentum0};
}

std::string cpu_isa_name() { return isa_name(cpu_isa()); }

}  // namespace
}  // namespace mnemos

STABLE_TORCH_LIBRARY_IMPL(mnemos, CPU, m) {
  m.impl("miras_scan", TORCH_BOX(&mnemos::miras_scan));
  m.impl("miras_scan_backward", TORCH_BOX(&mnemos::miras_scan_backward));
}

STABLE_TORCH_LIBRARY_IMPL(mnemos, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&mnemos::cpu_isa_name));
}
