// What the ops hand to the code that is compiled once per instruction set: plain pointers and sizes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu/isa.h"

namespace mnemos {

// Tokens solved together.
constexpr int kChunk = 32;

// One unit of work: a head of a batch row, and columns of its values. The columns do not depend on each other.
struct Item {
  int64_t batch, head, first, columns;
};

struct Problem {
  int64_t sequence, heads, key_dim, value_dim, interval;
  bool bfloat16;  // q, k, v, y and their gradients; everything else is float32
  const void *q, *k, *v;
  const float *alpha, *eta, *theta;
  const bool* resets;  // null without segments
};

struct Forward : Problem {
  const float *memory, *momentum;
  void* y;
  float *memory_after, *momentum_after;
  float *residuals, *states;  // null unless saved
};

struct Backward : Problem {
  const void* grad_y;
  const float *grad_memory, *grad_momentum, *residuals, *states;
  void* grad_v;
  float *grad_memory0, *grad_momentum0;
};

// Where one item's share of the gradients goes that the columns of v have in common. Laid out as q and as the gates.
struct Shared {
  void *grad_q, *grad_k;
  bool bfloat16;
  float *grad_alpha, *grad_eta, *grad_theta;
};

struct Kernels {
  // Floats of scratch memory that an item of so many columns needs.
  int64_t (*forward_scratch)(const Problem&, int64_t columns);
  int64_t (*backward_scratch)(const Problem&, int64_t columns);
  void (*forward)(const Forward&, const Item&, float* scratch);
  void (*backward)(const Backward&, const Shared&, const Item&, float* scratch);
};

Kernels scan_generic();
#if defined(__x86_64__)
Kernels scan_avx2();
Kernels scan_avx512();
#endif

}  // namespace mnemos
