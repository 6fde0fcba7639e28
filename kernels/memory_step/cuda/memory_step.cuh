// The device code of memory_step: three phases of a thread, between which the threads of a block wait for each other. It
// uses nothing of CUDA but the indices of a thread, so that a C++ compiler can run it too. The maths: ../README.md.
#pragma once

#include <cstdint>
#include <cstring>

#include "memory_step/step.h"

namespace mnemos::memory_step {

// A block has a tile of columns of one memory, kColumns of them: a warp for every slice of the rows, a lane for every
// column. Value dims are multiples of 16, so that the last tile of a memory may be half empty.
constexpr int kColumns = 32;
constexpr int kSlices = 8;
constexpr int kThreads = kColumns * kSlices;

struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float load(float x) { return x; }

__device__ __forceinline__ float load(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

__device__ __forceinline__ void store(float& to, float x) { to = x; }

// To nearest, ties to even; a NaN stays one.
__device__ __forceinline__ void store(BFloat16& to, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// What the threads of a block tell each other: sums over a slice's rows, of the residual and of the read.
struct Sums {
  float residual[kSlices][kColumns], read[kSlices][kColumns];
};

inline int64_t blocks(const Step& p) { return p.memories * ((p.value_dim + kColumns - 1) / kColumns); }

template <int Dk, class T, bool Momentum>
struct Thread {
  static constexpr int kRows = Dk / kSlices;

  float m[kRows], s[kRows];
  int64_t i;
  int column, lane, slice;
  bool inside;

  __device__ __forceinline__ Thread(const Step& p, int64_t block, int thread) {
    const int tiles = (p.value_dim + kColumns - 1) / kColumns;
    i = block / tiles;
    lane = thread % kColumns;
    slice = thread / kColumns;
    column = static_cast<int>(block % tiles) * kColumns + lane;
    inside = column < p.value_dim;
  }

  __device__ __forceinline__ int64_t at(const Step& p, int row) const {
    return (i * Dk + slice * kRows + row) * p.value_dim + column;
  }

  __device__ __forceinline__ float key(const Step& p, int row) const {
    return load(static_cast<const T*>(p.k)[i * Dk + slice * kRows + row]);
  }

  // M and S into registers, all loads before the first use.
  __device__ __forceinline__ void recall(const Step& p, Sums& sums) {
    if (!inside) return;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      m[row] = p.memory[at(p, row)];
      s[row] = Momentum ? p.momentum[at(p, row)] : 0.0f;
    }
    float total = 0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) total += key(p, row) * m[row];
    sums.residual[slice][lane] = total;
  }

  __device__ __forceinline__ void write(const Step& p, Sums& sums) {
    if (!inside) return;
    float residual = -load(static_cast<const T*>(p.v)[i * p.value_dim + column]);
#pragma unroll
    for (int other = 0; other < kSlices; ++other) residual += sums.residual[other][lane];
    const float step = -p.theta[i] * residual, keep = 1 - p.alpha[i];
    float total = 0;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float momentum = key(p, row) * step;
      if (Momentum) momentum += p.eta[i] * s[row];
      const float memory = keep * m[row] + momentum;
      p.momentum[at(p, row)] = momentum;
      p.memory[at(p, row)] = memory;
      total += load(static_cast<const T*>(p.q)[i * Dk + slice * kRows + row]) * memory;
    }
    sums.read[slice][lane] = total;
  }

  __device__ __forceinline__ void read(const Step& p, const Sums& sums) {
    if (!inside || slice > 0) return;
    float y = 0;
#pragma unroll
    for (int other = 0; other < kSlices; ++other) y += sums.read[other][lane];
    store(static_cast<T*>(p.out)[i * p.value_dim + column], y);
  }
};

// Calls body.operator()<Dk, T, Momentum>() for what is at hand.
template <class T, class Body>
void with_dim(const Step& p, const Body& body) {
  const bool momentum = p.eta != nullptr;
  if (p.key_dim == 32)
    momentum ? body.template operator()<32, T, true>() : body.template operator()<32, T, false>();
  else if (p.key_dim == 64)
    momentum ? body.template operator()<64, T, true>() : body.template operator()<64, T, false>();
  else
    momentum ? body.template operator()<128, T, true>() : body.template operator()<128, T, false>();
}

template <class Body>
void with_kernel(const Step& p, const Body& body) {
  p.bfloat16 ? with_dim<BFloat16>(p, body) : with_dim<float>(p, body);
}

}  // namespace mnemos::memory_step
