// Runs the CUDA source of memory_step on the host: the phases of a block's threads one after another, the threads of a
// phase in a chosen order. Between two phases the device waits for all threads, so the order must not change a bit.

#include <cstdint>
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline

#include "memory_step/cuda/memory_step.cuh"

using namespace mnemos::memory_step;

namespace {

template <int Dk, class T, bool Momentum>
void run(const Step& p, int order) {
  std::vector<int> places(kThreads);
  std::iota(places.begin(), places.end(), 0);
  if (order == 1) std::reverse(places.begin(), places.end());
  std::mt19937 random(7);
  for (int64_t block = 0; block < blocks(p); ++block) {
    // Not cleared on a device either.
    Sums sums;
    memset(&sums, 0xff, sizeof sums);
    std::vector<Thread<Dk, T, Momentum>> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(p, block, i);
    const auto phase = [&](auto step) {
      if (order == 2) std::shuffle(places.begin(), places.end(), random);
      for (int i : places) step(threads[i]);
    };
    phase([&](auto& thread) { thread.recall(p, sums); });
    phase([&](auto& thread) { thread.write(p, sums); });
    phase([&](auto& thread) { thread.read(p, sums); });
  }
}

}  // namespace

// sizes: memories, key dim, value dim, bfloat16, order. pointers: q, k, v, alpha, eta or null, theta, memory, momentum,
// out. The number of blocks.
extern "C" int64_t emulated_step(const int64_t* sizes, void* const* x) {
  const auto floats = [&](int i) { return static_cast<const float*>(x[i]); };
  const Step p{sizes[0], static_cast<int>(sizes[1]), static_cast<int>(sizes[2]), sizes[3] != 0,
               x[0], x[1], x[2], floats(3), floats(4), floats(5),
               static_cast<float*>(x[6]), static_cast<float*>(x[7]), x[8]};
  with_kernel(p, [&]<int Dk, class T, bool Momentum>() { run<Dk, T, Momentum>(p, static_cast<int>(sizes[4])); });
  return blocks(p);
}
