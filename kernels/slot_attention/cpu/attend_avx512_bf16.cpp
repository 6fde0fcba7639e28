// AVX-512 with products of bfloat16, for tensors of bfloat16. Compiled for it whatever the build's flags are; runs only
// where the CPU has it.
#if defined(__x86_64__)
// Before the instruction set is switched: inline functions of the standard library are shared with the rest.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "slot_attention/cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define MNEMOS_ISA avx512_bf16
#define MNEMOS_VL 16
#define MNEMOS_NV 4
#define MNEMOS_MR 6
#define MNEMOS_BF16
#include "slot_attention/cpu/backward.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace mnemos::slot_attention {
Kernels kernels_avx512_bf16(bool bfloat16) {
  using namespace mnemos::avx512_bf16;
  if (!bfloat16) return kernels_avx512(false);
  return {run_forward<Pairs, Bfloat16>, run_backward<Pairs, Bfloat16>, 2};
}
}  // namespace mnemos::slot_attention
#endif
