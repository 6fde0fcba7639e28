// Runs the CUDA source of affine_scan on the host: every thread of every launch, one after another, in a chosen order.
// No thread of a launch may need another one, so the order must not change a bit.
//
//   affine_scan_emulator IN OUT
//   affine_scan_emulator BATCH TOKENS FEATURES A_IS_BFLOAT16 B_IS_BFLOAT16   prints the blocks of every launch, forwards
//                                                                            and backwards, without running any
//
// IN: int64 batch, tokens, features, a is bfloat16, b is bfloat16, has resets, has states, order, shift; then a, b,
// resets, state, grad_h, grad_after. OUT: h, after, states, grad_a, grad_b, grad_state, and int64 launches.
// shift: elements by which tokens are moved away from alignment.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline

struct Index {
  uint32_t x;
};
static Index blockIdx, threadIdx, blockDim;

#include "affine_scan/cuda/affine_scan.cuh"

namespace {

using mnemos::affine_scan::Scan;

// Exactly as large as it must be, so that the address sanitizer sees every step outside, and full of NaNs.
class Buffer {
 public:
  Buffer(int64_t count, int64_t element, int64_t shift = 0)
      : size(count * element), offset(shift * element), memory(new (std::align_val_t(64)) uint8_t[size + offset]) {
    std::fill_n(memory, size + offset, 0xff);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete[](memory, std::align_val_t(64)); }

  void* data() { return size ? memory + offset : nullptr; }
  float* floats() { return static_cast<float*>(data()); }
  void read(FILE* from) {
    if (fread(memory + offset, 1, size, from) != size) abort();
  }
  void write(FILE* to) {
    if (fwrite(memory + offset, 1, size, to) != size) abort();
  }

 private:
  const size_t size, offset;
  uint8_t* memory;
};

struct Launch {
  int64_t order;
  int64_t* launches;

  void operator()(void (*kernel)(Scan, int64_t), int64_t threads, const Scan& p) const {
    ++*launches;
    blockDim.x = mnemos::affine_scan::kBlock;
    const int64_t all = (threads + blockDim.x - 1) / blockDim.x * blockDim.x;
    std::vector<int64_t> places(all);
    std::iota(places.begin(), places.end(), 0);
    if (order == 1) std::reverse(places.begin(), places.end());
    if (order == 2) std::shuffle(places.begin(), places.end(), std::mt19937_64(7));
    for (const int64_t i : places) {
      blockIdx.x = static_cast<uint32_t>(i / blockDim.x);
      threadIdx.x = static_cast<uint32_t>(i % blockDim.x);
      kernel(p, threads);
    }
  }
};

void scan(Scan p, bool reverse, bool a_bfloat16, bool b_bfloat16, const Launch& launch) {
  mnemos::affine_scan::split(p, a_bfloat16, b_bfloat16);
  const int64_t pieces = p.pieces > 1 ? p.batch * p.pieces : 0;
  Buffer products(pieces * p.features, 8), ends(pieces * p.features, 4), starts(pieces * p.features, 4);
  Buffer severed(pieces, 1);
  p.products = static_cast<double*>(products.data());
  p.ends = ends.floats();
  p.starts = starts.floats();
  p.severed = static_cast<uint8_t*>(severed.data());
  mnemos::affine_scan::run(p, reverse, a_bfloat16, b_bfloat16, launch);
}

struct Count {
  void operator()(void (*)(Scan, int64_t), int64_t threads, const Scan&) const {
    printf("%lld ", static_cast<long long>((threads + mnemos::affine_scan::kBlock - 1) / mnemos::affine_scan::kBlock));
  }
};

int print_blocks(char** words) {
  Scan p{};
  p.batch = atoll(words[0]);
  p.tokens = atoll(words[1]);
  p.features = atoll(words[2]);
  const bool a_bfloat16 = atoi(words[3]), b_bfloat16 = atoi(words[4]);
  mnemos::affine_scan::split(p, a_bfloat16, b_bfloat16);
  for (bool reverse : {false, true}) mnemos::affine_scan::run(p, reverse, a_bfloat16, b_bfloat16, Count{});
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count == 6) return print_blocks(words + 1);
  if (count != 3) return 2;
  FILE* in = fopen(words[1], "rb");
  FILE* out = fopen(words[2], "wb");
  int64_t n[9];
  if (!in || !out || fread(n, sizeof n, 1, in) != 1) return 2;
  const auto [batch, tokens, features, a16, b16, has_resets, has_states, order, shift] = n;
  const int64_t all = batch * tokens * features, row = batch * features;
  const int64_t tiles = (tokens + mnemos::affine_scan::kTile - 1) / mnemos::affine_scan::kTile;
  const int64_t as = a16 ? 2 : 4, bs = b16 ? 2 : 4;

  Buffer a(all, as, shift), b(all, bs, shift), resets(has_resets ? batch * tokens : 0, 1), state(row, 4);
  Buffer grad_h(all, bs, shift), grad_after(row, 4);
  for (Buffer* x : {&a, &b, &resets, &state, &grad_h, &grad_after}) x->read(in);
  Buffer h(all, bs, shift), after(row, 4), states(has_states ? batch * tiles * features : 0, 4);
  Buffer grad_a(all, as, shift), grad_b(all, bs, shift), grad_state(row, 4);

  int64_t launches = 0;
  const Launch launch{order, &launches};
  Scan p{};
  p.batch = batch;
  p.tokens = tokens;
  p.features = features;
  p.a = a.data();
  p.b = b.data();
  p.resets = static_cast<uint8_t*>(resets.data());
  p.states = states.floats();
  p.first = state.floats();
  p.last = after.floats();
  p.h = h.data();
  scan(p, false, a16, b16, launch);
  if (has_states) {
    p.h = nullptr;
    p.grad_h = grad_h.data();
    p.first = grad_after.floats();
    p.last = grad_state.floats();
    p.grad_a = grad_a.data();
    p.grad_b = grad_b.data();
    scan(p, true, a16, b16, launch);
  }
  for (Buffer* x : {&h, &after, &states, &grad_a, &grad_b, &grad_state}) x->write(out);
  fwrite(&launches, sizeof launches, 1, out);
  fclose(in);
  return fclose(out);
}
