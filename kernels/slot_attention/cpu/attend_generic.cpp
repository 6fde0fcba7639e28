// What every CPU of the architecture has: SSE2 on x86-64, NEON on 64-bit ARM.
#define MNEMOS_ISA generic
#define MNEMOS_VL 4
#define MNEMOS_NV 2
#define MNEMOS_MR 4
#include "slot_attention/cpu/backward.h"

namespace mnemos::slot_attention {
Kernels kernels_generic(bool bfloat16) {
  using namespace mnemos::generic;
  return bfloat16 ? Kernels{run_forward<Floats, Bfloat16>, run_backward<Floats, Bfloat16>, 1}
                  : Kernels{run_forward<Floats, float>, run_backward<Floats, float>, 1};
}
}  // namespace mnemos::slot_attention
