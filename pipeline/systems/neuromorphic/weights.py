"""Initial weights, which the seed and a parameter's name alone decide, and what each parameter is for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.parallel.weights import fill, full_shape, generator_for
from pipeline.systems.neuromorphic.memory.neuromodulators import initial_value

EMBEDDING = 0.5
"""Standard deviation of embeddings. The surprise of a span and what memories say, which its tokens share, are as large:
next to them small embeddings are lost, and all that the memories write is alike."""
TOKEN = 0.02
"""Standard deviation of learned tokens of the decoder, and of the weights of surprise."""
DECODER_OUTPUT = 0.01
"""Standard deviation of the map that adds the decoder's result to the columns': small, so that it begins near zero."""

PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embedding and head", ("embedding.", "head.")),
    ("working memory", ("working.", "working_input.")),
    ("procedural memory", ("procedural.",)),
    ("episodic memory", ("episodic.", "episodic_input.", "decoder.from_episodic.")),
    ("decoder", ("decoder.",)),
    ("gates", ()),
    ("columns", ("column_input.", "layers.")),
)
"""Parts of the model and how the names of their parameters begin; the first that fits has it."""
WRITES_EPISODES = ("episodic.neuromodulator.", "episodic.novelty.")
GAINS = ("norm.weight", "norm_weight")
LEARNED = ("decoder.layers", "decoder.summary", "decoder.kinds", "decoder.columns", "decoder.thalamic")


def initialise(model: nn.Module, seed: int) -> None:
    """Fills a `NeuromorphicModel`, sharded or not, with random weights. Collective."""
    fill(model, lambda name, shape: random_weight(name, shape, seed))


def random_weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Of the neuromodulators' heads what calibrates them; of matrices Glorot's uniform, within sqrt(6 / (inputs +
    outputs)) as published; gains of norms ones, biases zeros; embeddings and learned tokens normal."""
    generator = generator_for(seed, name)
    calibrated = initial_value(name, shape, generator)
    if calibrated is not None:
        return calibrated
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith(GAINS):
        return torch.ones(shape)
    if name == "decoder.output.weight":
        return DECODER_OUTPUT * torch.randn(shape, generator=generator)
    if name == "embedding.weight":
        return EMBEDDING * torch.randn(shape, generator=generator)
    if name in LEARNED or name.endswith(".surprise"):
        return TOKEN * torch.randn(shape, generator=generator)
    bound = math.sqrt(6 / (shape[-2] + shape[-1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    if name.startswith("layers.") and (".gates." in name or name.endswith(".surprise")):
        return "gates"
    return next(part for part, starts in PARTS if name.startswith(starts))


def is_vector(name: str) -> bool:
    """Whether a parameter is a bias, the gain of a norm or a learned vector, which weight decay leaves alone: those of
    all columns are matrices of as many rows, so that the number of dimensions does not say it."""
    return name.endswith(("bias", ".surprise", *GAINS)) or name in LEARNED


def trained(name: str, phase: str) -> bool:
    """Whether a phase, A, B or C, trains a parameter: in A there is no episodic memory."""
    return phase != "A" or part_of(name) != "episodic memory"


def published(model: nn.Module, phase: str) -> int:
    """Parameters that the published system builds in a phase: what writes episodic memory only from phase B on."""
    left_out = WRITES_EPISODES if phase == "A" else ()
    return sum(full_shape(x).numel() for name, x in model.named_parameters() if not name.startswith(left_out))


def parameter_parts(model: nn.Module) -> Mapping[str, int]:
    """Parameters by part, of a model that may be sharded; they add up to all of them."""
    counts = {part: 0 for part, _ in PARTS}
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += full_shape(parameter).numel()
    return counts
