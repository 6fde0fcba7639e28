// The arguments of one memory_step, as both implementations know them.
#pragma once

#include <cstdint>

namespace mnemos::memory_step {

constexpr int kValueMultiple = 16;

// All contiguous; memories is rows x heads.
struct Step {
  int64_t memories;
  int key_dim, value_dim;
  bool bfloat16;                      // of q, k, v and out
  const void *q, *k, *v;              // [memories, key_dim], and [memories, value_dim]
  const float *alpha, *eta, *theta;   // [memories]; eta null: no momentum
  float *memory, *momentum;           // [memories, key_dim, value_dim]
  void* out;                          // [memories, value_dim]
};

}  // namespace mnemos::memory_step
