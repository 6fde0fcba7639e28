"""The instruction sets of the native kernels for CPUs, from the narrowest on."""

ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
