#include "common/cpu/isa.h"

#include <cstdlib>
#include <string>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

namespace mnemos {
namespace {

bool has(Isa isa) {
  if (isa == Isa::generic) return true;
#if defined(__x86_64__)
  // These ask the operating system too: the registers must survive a context switch.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 && (isa == Isa::avx512 || __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

constexpr Isa kWidestFirst[] = {Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::generic};

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(isa)];
}

Isa cpu_isa() {
  const char* asked = std::getenv("MNEMOS_CPU_ISA");
  if (asked == nullptr || *asked == '\0') {
    static const Isa widest = [] {
      for (Isa isa : kWidestFirst)
        if (has(isa)) return isa;
      return Isa::generic;
    }();
    return widest;
  }
  for (Isa isa : kWidestFirst) {
    if (std::string(asked) != isa_name(isa)) continue;
    STD_TORCH_CHECK(has(isa), "MNEMOS_CPU_ISA is ", asked, ", which this CPU does not have");
    return isa;
  }
  STD_TORCH_CHECK(false, "MNEMOS_CPU_ISA is ", asked, "; expected generic, avx2, avx512 or avx512_bf16");
  return Isa::generic;
}

}  // namespace mnemos
