// AVX2 with FMA. Compiled for it whatever the build's flags are; runs only where the CPU has it.
#if defined(__x86_64__)
// Before the instruction set is switched: inline functions of the standard library are shared with the rest.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "store_slots/cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define MNEMOS_ISA avx2
#define MNEMOS_VL 8
#define MNEMOS_NV 2
#define MNEMOS_MR 6
#include "store_slots/cpu/nearest.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace mnemos::store_slots {
Kernels kernels_avx2() { return avx2::kKernels; }
}  // namespace mnemos::store_slots
#endif
