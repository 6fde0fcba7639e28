// What every CPU of the architecture has: SSE2 on x86-64, NEON on 64-bit ARM.
#define MNEMOS_ISA generic
#define MNEMOS_VL 4
#define MNEMOS_NV 2
#define MNEMOS_MR 4
#include "store_slots/cpu/nearest.h"

namespace mnemos::store_slots {
Kernels kernels_generic() { return generic::kKernels; }
}  // namespace mnemos::store_slots
