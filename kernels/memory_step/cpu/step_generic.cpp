// What every CPU of the architecture has: SSE2 on x86-64, NEON on 64-bit ARM.
#define MNEMOS_ISA generic
#define MNEMOS_VL 4
#define MNEMOS_NV 4
#define MNEMOS_MR 1
#include "memory_step/cpu/blocks.h"

namespace mnemos::memory_step {
Kernel step_generic() { return generic::run_step; }
}  // namespace mnemos::memory_step
