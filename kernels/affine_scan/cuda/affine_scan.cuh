// The device code of affine_scan, and the order in which its kernels run. It uses nothing of CUDA but the indices of a
// thread, so that a C++ compiler can run it too. The maths, and why time is split the way it is: ../README.md.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace mnemos::affine_scan {

// Tokens that a thread loads at once, before it uses any: enough bytes in flight for the memory's latency. A state is
// saved before each tile, and the backward pass holds the states in between in registers.
constexpr int kTile = 16;

// Threads from which time is not split, and how many a split aims at: 2 and 8 blocks for each of an H200's 132
// multiprocessors. A split moves 1.7 times as many bytes forwards (1.4 backwards), so that it pays off below the number of
// threads that reaches 60 % of the memory's rate. Constants, not properties of the device: the split decides roundings.
constexpr int64_t kFull = 32768;
constexpr int64_t kAim = 131072;
constexpr int64_t kPieces = 256;
constexpr int64_t kPieceTokens = 64;

constexpr int kBlock = 128;

struct BFloat16 {
  uint16_t bits;
};

// What one load or store of a thread moves.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T x[V];
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

// All tensors are [batch, tokens, features] or less, contiguous.
struct Scan {
  int64_t batch, tokens, features, pieces, piece;  // piece: tokens in each piece of time, a multiple of kTile
  const void *a, *b, *grad_h;
  const uint8_t* resets;     // [batch, tokens] or null
  const float* first;        // [batch, features]: the state before the scan, in its direction
  float* last;               // [batch, features]: the one after it
  float* states;             // [batch, tiles, features]: before each tile; written forward if not null, read backward
  void *h, *grad_a, *grad_b;
  double* products;          // [batch, pieces, features]: the map of each piece is x -> product x + end
  float* ends;
  float* starts;             // [batch, pieces, features]: the state that enters each piece
  uint8_t* severed;          // [batch, pieces]: whether a segment starts within
};

// Features that a thread takes where it can: two of bfloat16, so that a warp moves 128 bytes at once.
inline int wanted_width(const Scan& p, bool a_bfloat16, bool b_bfloat16) {
  return a_bfloat16 && b_bfloat16 && p.features % 2 == 0 ? 2 : 1;
}

// How many pieces time is cut into. By the width that is wanted: where tensors lie must not change roundings.
inline void split(Scan& p, bool a_bfloat16, bool b_bfloat16) {
  const int64_t threads = p.batch * p.features / wanted_width(p, a_bfloat16, b_bfloat16);
  p.pieces = 1;
  if (threads < kFull) p.pieces = (kAim + threads - 1) / threads;
  if (p.pieces > kPieces) p.pieces = kPieces;
  if (p.pieces > p.tokens / kPieceTokens) p.pieces = p.tokens / kPieceTokens;
  if (p.pieces < 1) p.pieces = 1;
  p.piece = ((p.tokens + p.pieces - 1) / p.pieces + kTile - 1) / kTile * kTile;
  p.pieces = (p.tokens + p.piece - 1) / p.piece;
}

// A thread's share: V features of one piece of one row.
template <int V>
struct Place {
  int64_t row, piece, feature, first, stop;

  __device__ __forceinline__ Place(const Scan& p, int64_t i) {
    const int64_t groups = p.features / V;
    feature = i % groups * V;
    piece = i / groups % p.pieces;
    row = i / groups / p.pieces;
    first = piece * p.piece;
    stop = first + p.piece < p.tokens ? first + p.piece : p.tokens;
  }
};

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

template <class T, int V>
__device__ __forceinline__ Pack<T, V> get(const void* from, int64_t offset) {
  return *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(from) + offset);
}

template <class T, int V>
__device__ __forceinline__ void put(void* to, int64_t offset, const Pack<T, V>& x) {
  *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(to) + offset) = x;
}

// Up to kTile tokens of a tensor, loaded together.
template <class T, int V>
struct Tile {
  Pack<T, V> token[kTile];

  __device__ __forceinline__ void read(const void* from, int64_t offset, int64_t stride, int count) {
#pragma unroll
    for (int k = 0; k < kTile; ++k)
      if (k < count) token[k] = get<T, V>(from, offset + k * stride);
  }
};

__device__ __forceinline__ uint32_t read_resets(const Scan& p, int64_t row, int64_t t, int count) {
  uint32_t mask = 0;
  if (p.resets) {
#pragma unroll
    for (int k = 0; k < kTile; ++k)
      if (k < count && p.resets[row * p.tokens + t + k]) mask |= 1u << k;
  }
  return mask;
}

__device__ __forceinline__ int tile_size(int64_t t, int64_t stop) {
  return stop - t < kTile ? static_cast<int>(stop - t) : kTile;
}

// The map of every piece.
template <class A, class B, int V>
__global__ void maps(Scan p, int64_t threads) {
  const int64_t i = thread_index();
  if (i >= threads) return;
  const Place<V> at(p, i);
  Pack<double, V> product;
  Pack<float, V> end;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    product.x[v] = 1.0;
    end.x[v] = 0.0f;
  }
  bool severed = false;
  for (int64_t t = at.first; t < at.stop; t += kTile) {
    const int count = tile_size(t, at.stop);
    const int64_t offset = (at.row * p.tokens + t) * p.features + at.feature;
    Tile<A, V> a;
    Tile<B, V> b;
    a.read(p.a, offset, p.features, count);
    b.read(p.b, offset, p.features, count);
    const uint32_t resets = read_resets(p, at.row, t, count);
    severed = severed || resets != 0;
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      if (k >= count) break;
      const bool reset = resets >> k & 1;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = load(a.token[k].x[v]), y = load(b.token[k].x[v]);
        product.x[v] *= x;
        end.x[v] = reset ? y : fmaf(x, end.x[v], y);
      }
    }
  }
  const int64_t to = (at.row * p.pieces + at.piece) * p.features + at.feature;
  put(p.products, to, product);
  put(p.ends, to, end);
  if (at.feature == 0) p.severed[at.row * p.pieces + at.piece] = severed;
}

// The same backwards in time. What enters a token from later ones is c_t = a_{t+1} g_{t+1}: g_t = grad_h_t + c_t.
template <class A, class B, int V>
__global__ void reverse_maps(Scan p, int64_t threads) {
  const int64_t i = thread_index();
  if (i >= threads) return;
  const Place<V> at(p, i);
  Pack<double, V> product;
  Pack<float, V> c;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    product.x[v] = 1.0;
    c.x[v] = 0.0f;
  }
  bool severed = false;
  for (int64_t t = at.first + (at.stop - at.first - 1) / kTile * kTile; t >= at.first; t -= kTile) {
    const int count = tile_size(t, at.stop);
    const int64_t offset = (at.row * p.tokens + t) * p.features + at.feature;
    Tile<A, V> a;
    Tile<B, V> grad_h;
    a.read(p.a, offset, p.features, count);
    grad_h.read(p.grad_h, offset, p.features, count);
    const uint32_t resets = read_resets(p, at.row, t, count);
    severed = severed || resets != 0;
#pragma unroll
    for (int k = kTile - 1; k >= 0; --k) {
      if (k >= count) continue;
      const bool reset = resets >> k & 1;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = load(a.token[k].x[v]);
        product.x[v] *= x;
        c.x[v] = reset ? 0.0f : x * (load(grad_h.token[k].x[v]) + c.x[v]);
      }
    }
  }
  const int64_t to = (at.row * p.pieces + at.piece) * p.features + at.feature;
  put(p.products, to, product);
  put(p.ends, to, c);
  if (at.feature == 0) p.severed[at.row * p.pieces + at.piece] = severed;
}

// The state that enters every piece, in the direction of the scan; a thread per row and feature.
template <bool Reverse>
__global__ void join(Scan p, int64_t threads) {
  const int64_t i = thread_index();
  if (i >= threads) return;
  const int64_t row = i / p.features, feature = i % p.features;
  float x = p.first[i];
#pragma unroll 8
  for (int64_t k = 0; k < p.pieces; ++k) {
    const int64_t piece = row * p.pieces + (Reverse ? p.pieces - 1 - k : k);
    const int64_t at = piece * p.features + feature;
    p.starts[at] = x;
    // A product that overflows in float64 is that of a state which overflows in float32, or which is zero.
    const double end = p.ends[at];
    x = p.severed[piece] || x == 0.0f ? p.ends[at] : static_cast<float>(fma(p.products[at], double{x}, end));
  }
}

// h, and the state after the last token.
template <class A, class B, int V>
__global__ void scan(Scan p, int64_t threads) {
  const int64_t i = thread_index();
  if (i >= threads) return;
  const Place<V> at(p, i);
  const int64_t tiles = (p.tokens + kTile - 1) / kTile;
  Pack<float, V> h = get<float, V>(p.starts, (at.row * p.pieces + at.piece) * p.features + at.feature);
  for (int64_t t = at.first; t < at.stop; t += kTile) {
    const int count = tile_size(t, at.stop);
    const int64_t offset = (at.row * p.tokens + t) * p.features + at.feature;
    Tile<A, V> a;
    Tile<B, V> b;
    a.read(p.a, offset, p.features, count);
    b.read(p.b, offset, p.features, count);
    const uint32_t resets = read_resets(p, at.row, t, count);
    if (p.states) put(p.states, (at.row * tiles + t / kTile) * p.features + at.feature, h);
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      if (k >= count) break;
      const bool reset = resets >> k & 1;
      Pack<B, V> out;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = load(a.token[k].x[v]), y = load(b.token[k].x[v]);
        h.x[v] = reset ? y : fmaf(x, h.x[v], y);
        store(out.x[v], h.x[v]);
      }
      put(p.h, offset + k * p.features, out);
    }
  }
  if (at.stop == p.tokens) put(p.last, at.row * p.features + at.feature, h);
}

// grad_a_t = g_t h_{t-1} and grad_b_t = g_t; h is computed again from the state before the tile.
template <class A, class B, int V>
__global__ void reverse_scan(Scan p, int64_t threads) {
  const int64_t i = thread_index();
  if (i >= threads) return;
  const Place<V> at(p, i);
  const int64_t tiles = (p.tokens + kTile - 1) / kTile;
  Pack<float, V> c = get<float, V>(p.starts, (at.row * p.pieces + at.piece) * p.features + at.feature);
  for (int64_t t = at.first + (at.stop - at.first - 1) / kTile * kTile; t >= at.first; t -= kTile) {
    const int count = tile_size(t, at.stop);
    const int64_t offset = (at.row * p.tokens + t) * p.features + at.feature;
    Tile<A, V> a;
    Tile<B, V> b, grad_h;
    a.read(p.a, offset, p.features, count);
    b.read(p.b, offset, p.features, count);
    grad_h.read(p.grad_h, offset, p.features, count);
    const uint32_t resets = read_resets(p, at.row, t, count);
    Pack<float, V> before[kTile];  // the state that each token finds
    before[0] = get<float, V>(p.states, (at.row * tiles + t / kTile) * p.features + at.feature);
#pragma unroll
    for (int k = 0; k + 1 < kTile; ++k) {
      if (k >= count) break;
      const bool reset = resets >> k & 1;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = load(a.token[k].x[v]), y = load(b.token[k].x[v]);
        before[k + 1].x[v] = reset ? y : fmaf(x, before[k].x[v], y);
      }
    }
#pragma unroll
    for (int k = kTile - 1; k >= 0; --k) {
      if (k >= count) continue;
      const bool reset = resets >> k & 1;
      Pack<A, V> grad_a;
      Pack<B, V> grad_b;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float g = load(grad_h.token[k].x[v]) + c.x[v];
        store(grad_b.x[v], g);
        store(grad_a.x[v], reset ? 0.0f : g * before[k].x[v]);
        c.x[v] = reset ? 0.0f : load(a.token[k].x[v]) * g;
      }
      put(p.grad_a, offset + k * p.features, grad_a);
      put(p.grad_b, offset + k * p.features, grad_b);
    }
  }
  if (at.first == 0) put(p.last, at.row * p.features + at.feature, c);
}

// All of a scan's kernels in their order. launch(kernel, threads, p) runs one with that many threads.
template <class A, class B, int V, class Launch>
void run_typed(Scan& p, bool reverse, const Launch& launch) {
  const int64_t lanes = p.batch * p.features;
  const int64_t threads = lanes / V * p.pieces;
  if (p.pieces > 1) {
    launch(reverse ? reverse_maps<A, B, V> : maps<A, B, V>, threads, p);
    launch(reverse ? join<true> : join<false>, lanes, p);
  } else {
    p.starts = const_cast<float*>(p.first);
  }
  launch(reverse ? reverse_scan<A, B, V> : scan<A, B, V>, threads, p);
}

// Features that a thread takes: those that are wanted, where the tensors are aligned for it.
inline int width(const Scan& p, bool a_bfloat16, bool b_bfloat16) {
  if (wanted_width(p, a_bfloat16, b_bfloat16) == 1) return 1;
  for (const void* x : {p.a, p.b, p.grad_h, static_cast<const void*>(p.h), static_cast<const void*>(p.grad_a),
                        static_cast<const void*>(p.grad_b)})
    if (reinterpret_cast<uintptr_t>(x) % 4) return 1;
  for (const float* x : {p.first, static_cast<const float*>(p.last), static_cast<const float*>(p.states)})
    if (reinterpret_cast<uintptr_t>(x) % 8) return 1;
  return 2;
}

template <class Launch>
void run(Scan& p, bool reverse, bool a_bfloat16, bool b_bfloat16, const Launch& launch) {
  if (width(p, a_bfloat16, b_bfloat16) == 2)
    run_typed<BFloat16, BFloat16, 2>(p, reverse, launch);
  else if (a_bfloat16 && b_bfloat16)
    run_typed<BFloat16, BFloat16, 1>(p, reverse, launch);
  else if (a_bfloat16)
    run_typed<BFloat16, float, 1>(p, reverse, launch);
  else if (b_bfloat16)
    run_typed<float, BFloat16, 1>(p, reverse, launch);
  else
    run_typed<float, float, 1>(p, reverse, launch);
}

}  // namespace mnemos::affine_scan
