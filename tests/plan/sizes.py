"""Sizes of OLMo2-1B and of its memories, by hand."""

WIDTH, FFN, LAYERS, VOCABULARY = 2048, 8192, 16, 100_352
BACKBONE = 1_484_916_736


def memory_parameters(width: int, layers: int, heads: int, dim: int, conv: int, persistent: int, rank: int) -> int:
    inner = heads * dim
    projections = 4 * width * inner
    gates = 2 * (width * heads + heads) + heads
    convolution = 3 * inner * conv
    norms = width + inner
    output_gate = width * rank + rank * inner + inner
    return layers * (projections + gates + convolution + norms + 2 * persistent * inner + output_gate)
