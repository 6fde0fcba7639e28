// What the kernels need from the machine: the instructions that C++ has no words for, and how a kernel is started.
//
// tests/kernels/emulator/emulator.h defines the same names on a CPU, so that one source is compiled by nvcc for a device and by
// g++ for the tests.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef MNEMOS_EMULATOR
#include "emulator.h"
#else

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#define MNEMOS_DEVICE __device__ __forceinline__

namespace mnemos::miras_scan {

using Stream = cudaStream_t;

struct alignas(8) Words2 {
  uint32_t x[2];
};
struct alignas(16) Words4 {
  uint32_t x[4];
};

MNEMOS_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MNEMOS_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// 2, 4, 8 or 16 bytes in one access; the address is a multiple of the size.
template <class Vector>
MNEMOS_DEVICE Vector load_vector(const void* source) {
  return *static_cast<const Vector*>(source);
}
template <class Vector>
MNEMOS_DEVICE void store_vector(void* destination, const Vector& value) {
  *static_cast<Vector*>(destination) = value;
}

// The same number, of which the compiler knows nothing: what is computed from it is computed again at every use instead of
// being kept in registers in between.
MNEMOS_DEVICE int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

MNEMOS_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Ten bits of mantissa, ties away from zero.
MNEMOS_DEVICE uint32_t round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// Two bfloat16, ties to even; ``low`` in the lower half.
MNEMOS_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Bytes of (b, a) chosen by four nibbles of ``selector``, a holding bytes 0 to 3.
MNEMOS_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// d += a b for a tile of 16 x 8, by a warp; 8 deep in tf32, 16 deep in bfloat16.
MNEMOS_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MNEMOS_DEVICE void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 tiles of 16-bit elements; lane i gives the address of row i % 8 of tile i / 8.
template <bool Transposed>
MNEMOS_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// 16 bytes from global to shared memory, zeros where not ``valid``; there after the wait that covers its group.
MNEMOS_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
MNEMOS_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most ``Pending`` groups are under way.
template <int Pending>
MNEMOS_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

MNEMOS_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// Throws where a kernel cannot start on the current device; else lets its blocks have so much shared memory there. Launches
// nothing, and leaves no error behind: what runs next on the device finds it as it was.
template <class... Parameters>
void admit(const char* name, void (*kernel)(Parameters...), int shared_bytes) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // Loads the kernel, which fails where the library has no code for the device.
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && shared_bytes <= most) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  if (error != cudaSuccess) cudaGetLastError();  // taken back: a later launch is checked by the same call
  STD_TORCH_CHECK(error == cudaSuccess, "miras_scan: kernel ", name, " cannot start on this device: ",
                  cudaGetErrorString(error));
  STD_TORCH_CHECK(shared_bytes <= most, "miras_scan: kernel ", name, " needs ", shared_bytes,
                  " bytes of shared memory per block, and this device has ", most);
}

// Of a kernel that was admitted.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, Stream stream,
            const Arguments&... arguments) {
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "miras_scan: kernel ", name, " did not start (grid ", grid.x, " x ", grid.y,
                  " x ", grid.z, ", ", threads, " threads): ", cudaGetErrorString(error));
}

}  // namespace mnemos::miras_scan

#endif
