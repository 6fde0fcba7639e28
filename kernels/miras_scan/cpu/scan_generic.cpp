// What every CPU of the architecture has: SSE2 on x86-64, NEON on 64-bit ARM.
#include "miras_scan/cpu/scan.h"

#define MNEMOS_ISA generic
#define MNEMOS_VL 4
#define MNEMOS_NV 4
#if defined(__aarch64__)
#define MNEMOS_MR 4
#else
#define MNEMOS_MR 2
#endif
#include "miras_scan/cpu/kernels.h"

namespace mnemos {
Kernels scan_generic() { return generic::kernels(); }
}  // namespace mnemos
