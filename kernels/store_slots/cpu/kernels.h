// What each instruction set has of its own: the search for the cheapest merges.
#pragma once

#include <cstdint>

namespace mnemos::store_slots {

// Keys come in whole vectors of every instruction set, and in whole register tiles.
constexpr int kDimMultiple = 16;
constexpr int kPadding = 32;

constexpr int padded(int count) { return (count + kPadding - 1) / kPadding * kPadding; }

// One of the halves between which candidates are merged.
struct Half {
  int count;
  const float* const* keys;      // rows of dim floats
  const float* inverse_weights;  // [padded(count)], 1 / weight; beyond count: anything above 0
  const float* inverse_roots;    // [padded(count)], 1 / sqrt(age + 1); beyond count: anything
  float* packed;                 // [dim, padded(count)], made by Kernels::pack
  float* squares;                // [padded(count)], likewise
};

struct Kernels {
  // Lays the keys out for `nearest`.
  void (*pack)(const Half& half, int dim);
  // For each key begin <= i < end of the first half the cost of its cheapest merge, and with which key of the second.
  void (*nearest)(
      const Half& first, const Half& second, int dim, int begin, int end, float* cost, int32_t* partner);
  // To bfloat16; count is a multiple of kDimMultiple.
  void (*narrow)(const float* from, uint16_t* to, int64_t count);
};

Kernels kernels_generic();
#if defined(__x86_64__)
Kernels kernels_avx2();
Kernels kernels_avx512();
#endif

}  // namespace mnemos::store_slots
