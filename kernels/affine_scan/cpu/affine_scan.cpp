// affine_scan on the CPU. The maths, and why time is split the way it is: ../README.md.

#include "affine_scan/arguments.h"
#include "affine_scan/cpu/work.h"
#include "common/cpu/isa.h"

#include <algorithm>
#include <vector>

namespace mnemos::affine_scan {
namespace {

// With fewer features than this (batch x features) there are too few for the threads: then time is split too.
constexpr int64_t kNarrow = 128;
constexpr int64_t kPieces = 16;
constexpr int64_t kPieceTokens = 1024;

// Features that go through time together: 4 KB of state stay in the first cache, and rows of 4 KB stream from memory.
constexpr int64_t kWidth = 1024;
constexpr int64_t kGrain = 16384;

// How the tokens and features are cut. The cut of time decides roundings, so it depends on the shape alone and not on
// the number of threads; the cut of features decides none.
Cut cut(const Sizes& n) {
  Cut c;
  c.pieces = 1;
  c.piece = n.tokens;
  if (n.batch * n.features < kNarrow && n.tokens >= 2 * kPieceTokens) {
    c.piece = std::max(kPieceTokens, (n.tokens + kPieces - 1) / kPieces);
    c.piece = (c.piece + n.interval - 1) / n.interval * n.interval;
    c.pieces = (n.tokens + c.piece - 1) / c.piece;
  }
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = (threads + n.batch * c.pieces - 1) / (n.batch * c.pieces);
  const int64_t even = ((n.features + blocks - 1) / blocks + 63) / 64 * 64;
  c.width = std::max<int64_t>(std::min({kWidth, even, n.features}), 1);
  c.blocks = (n.features + c.width - 1) / c.width;
  return c;
}

void parallel(const Job& job, Work work) {
  const int64_t units = job.n.batch * job.cut.pieces * job.cut.blocks;
  // What is too small to wake other threads is one thread's.
  const int64_t elements = job.n.batch * job.n.tokens * job.n.features;
  const int64_t grain = std::max<int64_t>(1, kGrain * units / elements);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    work(job, begin, end);
  });
}

// The states at the pieces' ends, joined in order. starts: [batch, pieces, features].
void join(const Job& job, const float* first, float* starts, bool reverse) {
  const auto& n = job.n;
  const int64_t pieces = job.cut.pieces;
  for (int64_t row = 0; row < n.batch; ++row) {
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t p = reverse ? pieces - 1 - i : i;
      const int64_t previous = reverse ? p + 1 : p - 1;
      const bool severed = i > 0 && job.severed(row, previous);
      for (int64_t f = 0; f < n.features; ++f) {
        const int64_t to = (row * pieces + p) * n.features + f;
        if (i == 0) {
          starts[to] = first[row * n.features + f];
          continue;
        }
        const int64_t from = (row * pieces + previous) * n.features + f;
        // A product that overflows in float64 is that of a state which overflows in float32, or which is zero.
        const bool alone = severed || starts[from] == 0;
        starts[to] = alone ? job.ends[from] : static_cast<float>(job.products[from] * starts[from] + job.ends[from]);
      }
    }
  }
}

void run(Job& job, const float* first, Work maps, Work scan, bool reverse) {
  const int64_t size = job.cut.pieces > 1 ? job.n.batch * job.cut.pieces * job.n.features : 0;
  std::vector<double> products(size);
  std::vector<float> ends(size), starts(size);
  job.starts = first;
  if (job.cut.pieces > 1) {
    job.products = products.data();
    job.ends = ends.data();
    parallel(job, maps);
    join(job, first, starts.data(), reverse);
    job.starts = starts.data();
  }
  parallel(job, scan);
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& a,
    const Tensor& b,
    const Tensor& state,
    const std::optional<Tensor>& resets,
    int64_t interval,
    bool save) {
  const Sizes n = check_inputs(a, b, resets, interval);
  check(state, "state", {n.batch, n.features}, false, b);
  Tensor h = torch::stable::empty_like(b);
  Tensor after = empty(b, {n.batch, n.features});
  Tensor states = save ? empty(b, {n.batch, n.states(), n.features}) : empty(b, {0});
  if (b.numel() == 0) return {h, after, states};

  Job job;
  job.n = n;
  job.cut = cut(n);
  job.a = a.const_data_ptr();
  job.b = b.const_data_ptr();
  job.resets = bytes(resets);
  job.h = h.mutable_data_ptr();
  job.last = static_cast<float*>(after.mutable_data_ptr());
  job.save = save ? static_cast<float*>(states.mutable_data_ptr()) : nullptr;
  const Kernels k = kernels(a.scalar_type() == ScalarType::BFloat16, b.scalar_type() == ScalarType::BFloat16);
  run(job, static_cast<const float*>(state.const_data_ptr()), k.maps, k.scan, false);
  return {h, after, states};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_h,
    const Tensor& grad_after,
    const Tensor& a,
    const Tensor& b,
    const std::optional<Tensor>& resets,
    const Tensor& states,
    int64_t interval) {
  const Sizes n = check_inputs(a, b, resets, interval);
  check_backward(n, grad_h, grad_after, b, states);
  Tensor grad_a = torch::stable::empty_like(a);
  Tensor grad_b = torch::stable::empty_like(b);
  Tensor grad_state = empty(b, {n.batch, n.features});
  if (b.numel() == 0) return {grad_a, grad_b, grad_state};

  Job job;
  job.n = n;
  job.cut = cut(n);
  job.a = a.const_data_ptr();
  job.b = b.const_data_ptr();
  job.resets = bytes(resets);
  job.grad_h = grad_h.const_data_ptr();
  job.states = static_cast<const float*>(states.const_data_ptr());
  job.grad_a = grad_a.mutable_data_ptr();
  job.grad_b = grad_b.mutable_data_ptr();
  job.last = static_cast<float*>(grad_state.mutable_data_ptr());
  const Kernels k = kernels(a.scalar_type() == ScalarType::BFloat16, b.scalar_type() == ScalarType::BFloat16);
  run(job, static_cast<const float*>(grad_after.const_data_ptr()), k.reverse_maps, k.reverse_scan, true);
  return {grad_a, grad_b, grad_state};
}

}  // namespace
}  // namespace mnemos::affine_scan

STABLE_TORCH_LIBRARY_IMPL(mnemos, CPU, m) {
  m.impl("affine_scan", TORCH_BOX(&mnemos::affine_scan::forward));
  m.impl("affine_scan_backward", TORCH_BOX(&mnemos::affine_scan::backward));
}
