// What each instruction set has of its own: the search for the cheapest merges.
#pragma once

#include <cstdint>

namespace mnemos::store_slots {

// Keys come in whole vectors of every instruction set, and in whole register tiles.
constexpr int kDimMultiple = 16;
constexpr int kPadding = 64;

constexpr int padded(int count) { return (count + kPadding - 1) / kPadding * kPadding; }

// One of the halves between which candidates are merged.
struct Half {
  int count;
  const float* const* keys;      // rows of dim floats
  const float* inverse_weights;  // [padded(count)], 1 / weight; beyond count: anything above 0
  const float* inverse_roots;    // [padded(count)], 1 / sqrt(age + 1); beyond count: anything
  float* packed;                 // scratch, [dim, padded(count)]
  float* squares;                // scratch, [padded(count)]
};

// For each key of the first half the cost of its cheapest merge, and with which key of the second.
using Nearest = void (*)(const Half& first, const Half& second, int dim, float* cost, int32_t* partner);

Nearest nearest_generic();
#if defined(__x86_64__)
Nearest nearest_avx2();
Nearest nearest_avx512();
#endif

}  // namespace mnemos::store_slots
