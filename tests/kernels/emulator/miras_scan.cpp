// miras_scan's launches on the emulator, for ctypes. Every buffer is copied into memory of exactly its size, between
// guards where a sanitizer is on; outputs and scratch memory start as never written.
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "miras_scan/cuda/program.cuh"

namespace {

using namespace mnemos::miras_scan;

class Buffers {
 public:
  // A copy of ``count`` elements; what is written is copied back at the end if ``back``.
  template <class T>
  T* copy(const void* p, int64_t count, bool back) {
    if (p == nullptr) return nullptr;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes)) throw std::bad_alloc();
    held_.push_back({std::unique_ptr<unsigned char, void (*)(void*)>(static_cast<unsigned char*>(memory), std::free),
                     const_cast<void*>(p), bytes, back});
    unsigned char* mine = held_.back().memory.get();
    if (back) {
      std::memset(mine, 0xff, bytes);
    } else {
      std::memcpy(mine, p, bytes);
    }
    return reinterpret_cast<T*>(mine);
  }
  float* allocate(int64_t count) {
    scratch_.emplace_back(static_cast<size_t>(count), as_float(emulator::kNeverWritten));
    return scratch_.back().data();
  }
  void give_back() {
    for (const Held& held : held_) {
      if (held.back) std::memcpy(held.original, held.memory.get(), held.bytes);
    }
  }

 private:
  struct Held {
    std::unique_ptr<unsigned char, void (*)(void*)> memory;
    void* original;
    size_t bytes;
    bool back;
  };
  std::vector<Held> held_;
  std::vector<std::vector<float>> scratch_;
};

struct Sizes {
  explicit Sizes(const int* shape) : s{shape[0], shape[1], shape[2], shape[3], shape[4]} {}
  Shape s;
  int64_t rows() const { return static_cast<int64_t>(s.batch) * s.tokens * s.heads; }
  int64_t keys() const { return rows() * s.key_dim; }
  int64_t values() const { return rows() * s.value_dim; }
  int64_t state() const { return s.rows() * s.state(); }
  int64_t states(int interval) const { return (s.tokens + interval - 1) / interval * 2 * state(); }
};

Gates gates_of(Buffers& buffers, const Sizes& n, const void* const* p) {
  return {buffers.copy<float>(p[0], n.rows(), false), buffers.copy<float>(p[1], n.rows(), false),
          buffers.copy<float>(p[2], n.rows(), false),
          buffers.copy<unsigned char>(p[3], static_cast<int64_t>(n.s.batch) * n.s.tokens, false)};
}

// p: q, k, v, alpha, eta, theta, resets or null, memory, momentum; y, memory_after, momentum_after, residuals, states
template <class In>
void forward(const int* shape, int interval, bool save, int64_t workspace, void* const* p) {
  const Sizes n(shape);
  Buffers b;
  ForwardCall<In> call;
  call.shape = n.s;
  call.q = b.copy<In>(p[0], n.keys(), false);
  call.k = b.copy<In>(p[1], n.keys(), false);
  call.v = b.copy<In>(p[2], n.values(), false);
  call.gates = gates_of(b, n, p + 3);
  call.memory = b.copy<float>(p[7], n.state(), false);
  call.momentum = b.copy<float>(p[8], n.state(), false);
  call.interval = interval;
  call.save = save;
  call.y = b.copy<In>(p[9], n.values(), true);
  call.memory_after = b.copy<float>(p[10], n.state(), true);
  call.momentum_after = b.copy<float>(p[11], n.state(), true);
  call.residuals = save ? b.copy<float>(p[12], n.values(), true) : nullptr;
  call.states = save ? b.copy<float>(p[13], n.states(interval), true) : nullptr;
  run_forward<In>(call, workspace, [&](int64_t count) { return b.allocate(count); }, Stream{});
  b.give_back();
}

// p: grad_y, grad_memory, grad_momentum, q, k, alpha, eta, theta, resets or null, residuals, states;
//    the gradients of q, k, v, alpha, eta, theta, memory, momentum
template <class In>
void backward(const int* shape, int interval, int64_t workspace, void* const* p) {
  const Sizes n(shape);
  Buffers b;
  BackwardCall<In> call;
  call.shape = n.s;
  call.grad_y = b.copy<In>(p[0], n.values(), false);
  call.grad_memory = b.copy<float>(p[1], n.state(), false);
  call.grad_momentum = b.copy<float>(p[2], n.state(), false);
  call.q = b.copy<In>(p[3], n.keys(), false);
  call.k = b.copy<In>(p[4], n.keys(), false);
  call.gates = gates_of(b, n, p + 5);
  call.residuals = b.copy<float>(p[9], n.values(), false);
  call.states = b.copy<float>(p[10], n.states(interval), false);
  call.interval = interval;
  call.grad_q = b.copy<In>(p[11], n.keys(), true);
  call.grad_k = b.copy<In>(p[12], n.keys(), true);
  call.grad_v = b.copy<In>(p[13], n.values(), true);
  call.grad_alpha = b.copy<float>(p[14], n.rows(), true);
  call.grad_eta = b.copy<float>(p[15], n.rows(), true);
  call.grad_theta = b.copy<float>(p[16], n.rows(), true);
  call.grad_memory_before = b.copy<float>(p[17], n.state(), true);
  call.grad_momentum_before = b.copy<float>(p[18], n.state(), true);
  run_backward<In>(call, workspace, [&](int64_t count) { return b.allocate(count); }, Stream{});
  b.give_back();
}

}  // namespace

// shape: batch, tokens, heads, key dim, value dim
extern "C" void emulated_forward(bool bf16, const int* shape, int interval, bool save, int64_t workspace, void** p) {
  if (bf16) {
    forward<bfloat16>(shape, interval, save, workspace, p);
  } else {
    forward<float>(shape, interval, save, workspace, p);
  }
}
extern "C" void emulated_backward(bool bf16, const int* shape, int interval, int64_t workspace, void** p) {
  if (bf16) {
    backward<bfloat16>(shape, interval, workspace, p);
  } else {
    backward<float>(shape, interval, workspace, p);
  }
}

extern "C" int emulator_admitted();

namespace {

template <class In>
int shared_memory_of(int key_dim, bool backward) {
  emulator_admitted();
  switch (key_dim) {
    case 32: backward ? admit_backward<In, 32>() : admit_forward<In, 32>(); break;
    case 64: backward ? admit_backward<In, 64>() : admit_forward<In, 64>(); break;
    default: backward ? admit_backward<In, 128>() : admit_forward<In, 128>();
  }
  return emulator_admitted();
}

}  // namespace

// The shared memory of the most demanding block of a pass, as a device is asked for it.
extern "C" int emulated_shared_memory(bool bf16, int key_dim, bool backward) {
  return bf16 ? shared_memory_of<bfloat16>(key_dim, backward) : shared_memory_of<float>(key_dim, backward);
}
