// The kernels of each instruction set.
#pragma once

#include "memory_step/step.h"

namespace mnemos::memory_step {

// The columns [first, end) of memory i; both are multiples of kValueMultiple.
using Kernel = void (*)(const Step&, int64_t i, int first, int end);

Kernel step_generic();
#if defined(__x86_64__)
Kernel step_avx2();
Kernel step_avx512();
#endif

}  // namespace mnemos::memory_step
