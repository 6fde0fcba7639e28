#include "affine_scan/cpu/work.h"

#include "affine_scan/cpu/tiles.h"
#include "common/cpu/isa.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace mnemos::affine_scan {
namespace {

struct Unit {
  int64_t row, piece, first, stop, feature, width;  // tokens [first, stop), features [feature, feature + width)
};

INLINE Unit unit(const Job& job, int64_t i) {
  Unit u;
  u.feature = i % job.cut.blocks * job.cut.width;
  u.piece = i / job.cut.blocks % job.cut.pieces;
  u.row = i / job.cut.blocks / job.cut.pieces;
  u.first = u.piece * job.cut.piece;
  u.stop = std::min(job.n.tokens, u.first + job.cut.piece);
  u.width = std::min(job.cut.width, job.n.features - u.feature);
  return u;
}

// [row, position, feature] of a tensor [batch, positions, features].
template <class T>
INLINE T* at(T* x, const Job& job, int64_t positions, int64_t row, int64_t position, int64_t feature) {
  return x + (row * positions + position) * job.n.features + feature;
}

template <class T, class Void>
INLINE Rows<T> tokens(Void* x, const Job& job, const Unit& u, int64_t t) {
  return {at(static_cast<T*>(x), job, job.n.tokens, u.row, t, u.feature), job.n.features};
}

template <class T>
INLINE T* piece(T* x, const Job& job, const Unit& u) {
  return at(x, job, job.cut.pieces, u.row, u.piece, u.feature);
}

INLINE const uint8_t* resets(const Job& job, const Unit& u, int64_t t) {
  return job.resets ? job.resets + u.row * job.n.tokens + t : nullptr;
}

INLINE int64_t last_tile(const Job& job, const Unit& u) {
  return u.first + (u.stop - u.first - 1) / job.n.interval * job.n.interval;
}

INLINE void copy(const float* from, float* to, int64_t width) { std::memcpy(to, from, width * sizeof(float)); }

// Rows shorter than a few vectors follow each other without a gap where a unit has all features: they are turned to
// float32 several at once, and their width is a constant where it is a usual one.
constexpr int64_t kShort = 64;

INLINE bool is_short(const Job& job) { return job.cut.blocks == 1 && job.n.features < kShort; }

template <class T>
class AsFloats {
 public:
  explicit AsFloats(const Job& job)
      : buffer_(is_short(job) && !std::is_same_v<T, float> ? job.n.interval * job.n.features : 0) {}

  INLINE Rows<const float> read(Rows<const T> x, int64_t tokens) {
    if constexpr (std::is_same_v<T, float>) {
      return x;
    } else {
      convert(x.data, buffer_.data(), tokens * x.stride);
      return {buffer_.data(), x.stride};
    }
  }

  // Where to put what `write` then turns to T.
  INLINE Rows<float> room(Rows<T> x) {
    if constexpr (std::is_same_v<T, float>)
      return x;
    else
      return {buffer_.data(), x.stride};
  }

  INLINE void write(Rows<T> x, int64_t tokens) {
    if constexpr (!std::is_same_v<T, float>) convert(buffer_.data(), x.data, tokens * x.stride);
  }

 private:
  std::vector<float> buffer_;
};

#define BODY(...) [&](auto w) __attribute__((always_inline)) { constexpr int W = decltype(w)::value; __VA_ARGS__; }

template <class Body>
INLINE void with_width(int64_t width, const Body& body) {
  switch (width) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 4: return body(std::integral_constant<int, 4>());
    case 8: return body(std::integral_constant<int, 8>());
    default: return body(std::integral_constant<int, 0>());
  }
}

template <class A, class B>
INLINE void maps(const Job& job, int64_t begin, int64_t end) {
  AsFloats<A> floats_a(job);
  AsFloats<B> floats_b(job);
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit(job, i);
    double* product = piece(job.products, job, u);
    float* last = piece(job.ends, job, u);
    std::fill_n(product, u.width, 1.0);
    std::fill_n(last, u.width, 0.0f);
    for (int64_t t = u.first; t < u.stop; t += job.n.interval) {
      const int64_t count = std::min(job.n.interval, u.stop - t);
      const auto a = tokens<const A>(job.a, job, u, t);
      const auto b = tokens<const B>(job.b, job, u, t);
      const uint8_t* starts = resets(job, u, t);
      if (is_short(job)) {
        const auto fa = floats_a.read(a, count), fb = floats_b.read(b, count);
        with_width(u.width, BODY(map_tile<W>(fa, fb, product, last, starts, count, u.width)));
      } else {
        map_tile<0>(a, b, product, last, starts, count, u.width);
      }
    }
  }
}

template <class A, class B>
INLINE void reverse_maps(const Job& job, int64_t begin, int64_t end) {
  AsFloats<A> floats_a(job);
  AsFloats<B> floats_g(job);
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit(job, i);
    double* product = piece(job.products, job, u);
    float* c = piece(job.ends, job, u);
    std::fill_n(product, u.width, 1.0);
    std::fill_n(c, u.width, 0.0f);
    for (int64_t t = last_tile(job, u); t >= u.first; t -= job.n.interval) {
      const int64_t count = std::min(job.n.interval, u.stop - t);
      const auto a = tokens<const A>(job.a, job, u, t);
      const auto g = tokens<const B>(job.grad_h, job, u, t);
      const uint8_t* starts = resets(job, u, t);
      if (is_short(job)) {
        const auto fa = floats_a.read(a, count), fg = floats_g.read(g, count);
        with_width(u.width, BODY(reverse_map_tile<W>(fa, fg, product, c, starts, count, u.width)));
      } else {
        reverse_map_tile<0>(a, g, product, c, starts, count, u.width);
      }
    }
  }
}

template <class A, class B>
INLINE void scan(const Job& job, int64_t begin, int64_t end) {
  AsFloats<A> floats_a(job);
  AsFloats<B> floats_b(job), floats_h(job);
  std::vector<float> state(job.cut.width);
  float* h = state.data();
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit(job, i);
    copy(piece(job.starts, job, u), h, u.width);
    for (int64_t t = u.first; t < u.stop; t += job.n.interval) {
      if (job.save) copy(h, at(job.save, job, job.n.states(), u.row, t / job.n.interval, u.feature), u.width);
      const int64_t count = std::min(job.n.interval, u.stop - t);
      const auto a = tokens<const A>(job.a, job, u, t);
      const auto b = tokens<const B>(job.b, job, u, t);
      const auto out = tokens<B>(job.h, job, u, t);
      const uint8_t* starts = resets(job, u, t);
      if (is_short(job)) {
        const auto fa = floats_a.read(a, count), fb = floats_b.read(b, count);
        const auto fh = floats_h.room(out);
        with_width(u.width, BODY(scan_tile<W>(fa, fb, fh, h, starts, count, u.width)));
        floats_h.write(out, count);
      } else {
        scan_tile<0>(a, b, out, h, starts, count, u.width);
      }
    }
    if (u.stop == job.n.tokens) copy(h, at(job.last, job, 1, u.row, 0, u.feature), u.width);
  }
}

template <class A, class B>
INLINE void reverse_scan(const Job& job, int64_t begin, int64_t end) {
  AsFloats<A> floats_a(job), floats_ga(job);
  AsFloats<B> floats_b(job), floats_g(job), floats_gb(job);
  const int64_t interval = job.n.interval;
  std::vector<float> carried(2 * job.cut.width), found(job.cut.width * (interval + 1));
  float* c = carried.data();
  float* h = carried.data() + job.cut.width;
  for (int64_t i = begin; i < end; ++i) {
    const Unit u = unit(job, i);
    copy(piece(job.starts, job, u), c, u.width);
    for (int64_t t = last_tile(job, u); t >= u.first; t -= interval) {
      const int64_t count = std::min(interval, u.stop - t);
      const auto a = tokens<const A>(job.a, job, u, t);
      const auto b = tokens<const B>(job.b, job, u, t);
      const auto g = tokens<const B>(job.grad_h, job, u, t);
      const auto grad_a = tokens<A>(job.grad_a, job, u, t);
      const auto grad_b = tokens<B>(job.grad_b, job, u, t);
      const uint8_t* starts = resets(job, u, t);
      // The state that each token finds: the saved one before the first, and what these tokens made of it.
      const Rows<const float> before{found.data(), u.width};
      const Rows<float> after{found.data() + u.width, u.width};
      copy(at(job.states, job, job.n.states(), u.row, t / interval, u.feature), h, u.width);
      copy(h, found.data(), u.width);
      if (is_short(job)) {
        const auto fa = floats_a.read(a, count), fb = floats_b.read(b, count), fg = floats_g.read(g, count);
        const auto ga = floats_ga.room(grad_a), gb = floats_gb.room(grad_b);
        with_width(u.width, BODY(scan_tile<W>(fa, fb, after, h, starts, count - 1, u.width)));
        with_width(u.width, BODY(reverse_tile<W>(fa, fb, fg, before, ga, gb, c, starts, count, u.width, 0)));
        floats_ga.write(grad_a, count);
        floats_gb.write(grad_b, count);
      } else {
        scan_tile<0>(a, b, after, h, starts, count - 1, u.width);
        const int64_t again = t > u.first ? interval : 0;
        reverse_tile<0>(a, b, g, before, grad_a, grad_b, c, starts, count, u.width, again);
      }
    }
    if (u.first == 0) copy(c, at(job.last, job, 1, u.row, 0, u.feature), u.width);
  }
}

// One name per loop and instruction set: what is inlined into a function is compiled for that function's target.
#define VARIANT(SET, TARGET)                                                                                   \
  namespace SET {                                                                                              \
  template <class A, class B>                                                                                  \
  TARGET void run_maps(const Job& job, int64_t begin, int64_t end) { maps<A, B>(job, begin, end); }            \
  template <class A, class B>                                                                                  \
  TARGET void run_scan(const Job& job, int64_t begin, int64_t end) { scan<A, B>(job, begin, end); }            \
  template <class A, class B>                                                                                  \
  TARGET void run_reverse_maps(const Job& job, int64_t begin, int64_t end) {                                   \
    reverse_maps<A, B>(job, begin, end);                                                                       \
  }                                                                                                            \
  template <class A, class B>                                                                                  \
  TARGET void run_reverse_scan(const Job& job, int64_t begin, int64_t end) {                                   \
    reverse_scan<A, B>(job, begin, end);                                                                       \
  }                                                                                                            \
  template <class A, class B>                                                                                  \
  Kernels typed() { return {run_maps<A, B>, run_scan<A, B>, run_reverse_maps<A, B>, run_reverse_scan<A, B>}; } \
  Kernels kernels(bool a_bfloat16, bool b_bfloat16) {                                                          \
    if (a_bfloat16) return b_bfloat16 ? typed<BFloat16, BFloat16>() : typed<BFloat16, float>();                \
    return b_bfloat16 ? typed<float, BFloat16>() : typed<float, float>();                                      \
  }                                                                                                            \
  }

VARIANT(generic, )
#if defined(__x86_64__)
VARIANT(avx2, __attribute__((target("avx2,fma"))))
VARIANT(avx512, __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

}  // namespace

Kernels kernels(bool a_bfloat16, bool b_bfloat16) {
#if defined(__x86_64__)
  const Isa isa = cpu_isa();
  if (isa >= Isa::avx512) return avx512::kernels(a_bfloat16, b_bfloat16);
  if (isa == Isa::avx2) return avx2::kernels(a_bfloat16, b_bfloat16);
#endif
  return generic::kernels(a_bfloat16, b_bfloat16);
}

}  // namespace mnemos::affine_scan
