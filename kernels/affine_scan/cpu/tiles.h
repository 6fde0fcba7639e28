// The recurrence over a few tokens, and its adjoint. Inlined into functions for one instruction set each.

#pragma once

#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))

// Rows of different tensors do not overlap, which a compiler would otherwise check anew at every row.
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace mnemos::affine_scan {
namespace {

struct BFloat16 {
  uint16_t bits;
};

INLINE float load(float x) { return x; }

INLINE float load(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

INLINE void store(float& to, float x) { to = x; }

// To nearest, ties to even; a NaN stays one.
INLINE void store(BFloat16& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

template <class From, class To>
INLINE void convert(const From* __restrict from, To* __restrict to, int64_t count) {
  INDEPENDENT
  for (int64_t i = 0; i < count; ++i) store(to[i], load(from[i]));
}

// Tokens of a tensor: rows of features, `stride` elements apart.
template <class T>
struct Rows {
  T* data;
  int64_t stride;

  INLINE T* operator[](int64_t t) const { return data + t * stride; }
};

// Memory that will be needed an interval later, before the hardware can know: rows are visited backwards.
template <class T>
INLINE void fetch(Rows<T> x, int64_t t, int64_t width, bool write) {
  T* row = x[t];
  for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) {
    if (write)
      __builtin_prefetch(row + i, 1, 2);
    else
      __builtin_prefetch(row + i, 0, 2);
  }
}

// A row that is carried from token to token: in registers where its width is known (W > 0), else in memory.
template <class T, int W>
struct Carried {
  T* memory;
  T x[W];

  INLINE explicit Carried(T* from) : memory(from) { std::memcpy(x, from, sizeof x); }
  INLINE void finish() { std::memcpy(memory, x, sizeof x); }
  INLINE T& operator[](int64_t i) { return x[i]; }
};

template <class T>
struct Carried<T, 0> {
  T* __restrict x;

  INLINE explicit Carried(T* from) : x(from) {}
  INLINE void finish() {}
  INLINE T& operator[](int64_t i) { return x[i]; }
};

// resets: of these tokens, or null.
INLINE bool starts_segment(const uint8_t* resets, int64_t t) { return resets && resets[t]; }

// h, from the state before the first of these tokens to that after the last, and out, its value at each.
template <int W, class A, class B, class O>
INLINE void scan_tile(
    Rows<const A> as, Rows<const B> bs, Rows<O> outs, float* h, const uint8_t* resets, int64_t tokens, int64_t width) {
  if (W) width = W;
  Carried<float, W> x(h);
  for (int64_t t = 0; t < tokens; ++t) {
    const A* __restrict a = as[t];
    const B* __restrict b = bs[t];
    O* __restrict out = outs[t];
    if (starts_segment(resets, t)) {
      INDEPENDENT
      for (int64_t i = 0; i < width; ++i) {
        x[i] = load(b[i]);
        store(out[i], x[i]);
      }
    } else {
      INDEPENDENT
      for (int64_t i = 0; i < width; ++i) {
        x[i] = load(a[i]) * x[i] + load(b[i]);
        store(out[i], x[i]);
      }
    }
  }
  x.finish();
}

// The map of these tokens after that of the ones before: x -> product x + end.
template <int W, class A, class B>
INLINE void map_tile(
    Rows<const A> as,
    Rows<const B> bs,
    double* products,
    float* ends,
    const uint8_t* resets,
    int64_t tokens,
    int64_t width) {
  if (W) width = W;
  Carried<double, W> product(products);
  Carried<float, W> end(ends);
  for (int64_t t = 0; t < tokens; ++t) {
    const A* __restrict a = as[t];
    const B* __restrict b = bs[t];
    if (starts_segment(resets, t)) {
      // What the product is does not matter from here on: the piece is severed.
      INDEPENDENT
      for (int64_t i = 0; i < width; ++i) end[i] = load(b[i]);
    } else {
      INDEPENDENT
      for (int64_t i = 0; i < width; ++i) {
        product[i] *= load(a[i]);
        end[i] = load(a[i]) * end[i] + load(b[i]);
      }
    }
  }
  product.finish();
  end.finish();
}

// The same, backwards. What enters a token from later ones is c_t = a_{t+1} g_{t+1}, so that g_t = grad_h_t + c_t.
template <int W, class A, class B>
INLINE void reverse_map_tile(
    Rows<const A> as,
    Rows<const B> grads,
    double* products,
    float* ends,
    const uint8_t* resets,
    int64_t tokens,
    int64_t width) {
  if (W) width = W;
  Carried<double, W> product(products);
  Carried<float, W> c(ends);
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const A* __restrict a = as[t];
    const B* __restrict grad_h = grads[t];
    if (starts_segment(resets, t)) {
      for (int64_t i = 0; i < width; ++i) c[i] = 0.0f;
    } else {
      INDEPENDENT
      for (int64_t i = 0; i < width; ++i) {
        product[i] *= load(a[i]);
        c[i] = load(a[i]) * (load(grad_h[i]) + c[i]);
      }
    }
  }
  product.finish();
  c.finish();
}

// grad_a_t = g_t h_{t-1} and grad_b_t = g_t; before: the state that each token finds. again: how many rows before
// these tokens their tensors will be needed next, 0 for never.
template <int W, class A, class B>
INLINE void reverse_tile(
    Rows<const A> as,
    Rows<const B> bs,
    Rows<const B> grads,
    Rows<const float> before,
    Rows<A> grads_a,
    Rows<B> grads_b,
    float* carried,
    const uint8_t* resets,
    int64_t tokens,
    int64_t width,
    int64_t again) {
  if (W) width = W;
  Carried<float, W> c(carried);
  for (int64_t t = tokens - 1; t >= 0; --t) {
    const A* __restrict a = as[t];
    const B* __restrict grad_h = grads[t];
    const float* __restrict h = before[t];
    A* __restrict grad_a = grads_a[t];
    B* __restrict grad_b = grads_b[t];
    if (again) {
      fetch(as, t - again, width, false);
      fetch(bs, t - again, width, false);
      fetch(grads, t - again, width, false);
      fetch(grads_a, t - again, width, true);
      fetch(grads_b, t - again, width, true);
    }
    if (starts_segment(resets, t)) {
      INDEPENDENT
      for (int64_t i = 0; i < width; ++i) {
        store(grad_b[i], load(grad_h[i]) + c[i]);
        store(grad_a[i], 0.0f);
        c[i] = 0.0f;
      }
    } else {
      INDEPENDENT
      for (int64_t i = 0; i < width; ++i) {
        const float g = load(grad_h[i]) + c[i];
        store(grad_b[i], g);
        store(grad_a[i], g * h[i]);
        c[i] = load(a[i]) * g;
      }
    }
  }
  c.finish();
}

}  // namespace
}  // namespace mnemos::affine_scan
