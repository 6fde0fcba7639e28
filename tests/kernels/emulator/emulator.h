// A block of CUDA threads on a CPU: what platform.cuh defines for a device, defined for g++.
//
// Every thread is a fiber with a stack of its own, so a barrier is a barrier: between two of them threads run one after another,
// in an order that can be chosen. A result that depends on the order shows a barrier that is missing. Shared memory starts as NaN
// and is exactly as large as the launch asked for; an asynchronous copy arrives when it is waited for, not before. Global memory
// starts as words of kNeverWritten, a NaN that no arithmetic makes by itself: a vector load or a copy of one is a failure,
// also where nothing uses it.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define MNEMOS_DEVICE inline

struct Dimensions {
  unsigned x, y, z;
  constexpr Dimensions(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using dim3 = Dimensions;

namespace emulator {

struct Lane {
  Dimensions thread;
  int index;
};

constexpr uint32_t kNeverWritten = 0xffffffffu;

// The thread that runs now, and the block it is of.
extern Lane* current;
extern Dimensions block;

void block_barrier();
// Leaves ``count`` words and waits until all lanes of the warp have done so; returns theirs, [lane][8].
// ``operation`` is checked to be the same in all lanes.
const uint32_t (*exchange(int operation, const uint32_t* words, int count))[8];
unsigned char* shared_memory();
void check_shared(const void* address, int bytes, int alignment);
// Of what a thread loads: words of global memory that nothing has written are a failure.
void check_load(const void* address, size_t bytes);
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(int pending);
// The device lets a kernel have so much shared memory; a launch without it is a failure.
void admit(const char* name, int shared_bytes);
void run(const char* name, Dimensions grid, int threads, int shared_bytes, const std::function<void()>& body);
[[noreturn]] void fail(const char* format, ...);

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block)

inline void __syncthreads() { emulator::block_barrier(); }

namespace mnemos::miras_scan {

using Stream = int;

struct alignas(8) Words2 {
  uint32_t x[2];
};
struct alignas(16) Words4 {
  uint32_t x[4];
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class Vector>
inline Vector load_vector(const void* source) {
  if (reinterpret_cast<uintptr_t>(source) % sizeof(Vector)) emulator::fail("load of %zu bytes is not aligned", sizeof(Vector));
  emulator::check_load(source, sizeof(Vector));
  Vector value;
  std::memcpy(&value, source, sizeof value);
  return value;
}
template <class Vector>
inline void store_vector(void* destination, const Vector& value) {
  if (reinterpret_cast<uintptr_t>(destination) % sizeof(Vector)) {
    emulator::fail("store of %zu bytes is not aligned", sizeof(Vector));
  }
  std::memcpy(destination, &value, sizeof value);
}

inline int forget(int x) { return x; }
inline unsigned char* shared_memory() { return emulator::shared_memory(); }

uint32_t round_tf32(float value);
uint32_t pack_bfloat16(float low, float high);
uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector);
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);
template <bool Transposed>
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  load_matrices(r, row, Transposed);
}
inline void copy_async(void* shared, const void* global, bool valid) { emulator::copy_async(shared, global, valid); }
inline void copy_commit() { emulator::copy_commit(); }
template <int Pending>
inline void copy_wait() {
  emulator::copy_wait(Pending);
}
float shuffle_xor(float value, int mask);

template <class... Parameters>
void admit(const char* name, void (*)(Parameters...), int shared_bytes) {
  emulator::admit(name, shared_bytes);
}
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, Stream,
            const Arguments&... arguments) {
  emulator::run(name, grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace mnemos::miras_scan
