// Which instruction set the CPU kernels run with, and how denormal numbers are treated while they do.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace mnemos {

// Each has what those before it have.
enum class Isa { generic, avx2, avx512, avx512_bf16 };

// The widest that this CPU has, or the one that MNEMOS_CPU_ISA (generic, avx2, avx512 or avx512_bf16) asks for. Read anew at every
// call, so that a test can run them all. Throws where the name is unknown or this CPU lacks it.
Isa cpu_isa();

const char* isa_name(Isa isa);

// Long products of gates underflow, and arithmetic on denormal numbers is a hundred times as slow: they count as zero
// while an object of this type lives. It belongs to the thread that made it.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_ = 0;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif

 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace mnemos
