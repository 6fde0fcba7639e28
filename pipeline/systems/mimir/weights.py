"""Initial weights of the denoiser, which the seed, a parameter's name and the sizes alone decide."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.parallel.weights import fill, generator_for
from pipeline.systems.mimir.model.lengths import EmpiricalLengths
from pipeline.systems.mimir.peptides import BACKGROUND, INTERACTING, Peptides

EMBEDDING = 0.1
"""Standard deviation of embeddings, several of which are added up. With torch's own, 1, the first blocks' outputs are a
small part of their sum, and mimir_tiny's held-out bound after 600 steps was higher: 2.841 against 2.826 nats."""


def initialise(model: nn.Module, seed: int, training: Peptides) -> None:
    """Fills a `MimirModel`, sharded or not, with random weights and the lengths of the training data. Collective."""
    kinds = {name: kind for kind, module in _leaves(model) for name in module}
    fill(model, lambda name, shape: random_weight(name, shape, kinds[name], seed))
    lengths = model.lengths
    if isinstance(lengths, EmpiricalLengths):
        lengths.counts.copy_(length_counts(training, lengths.counts.shape[1]))


def _leaves(model: nn.Module) -> list[tuple[type[nn.Module], list[str]]]:
    """The kinds of modules that hold parameters, and the whole names of these."""
    return [
        (type(module), [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)])
        for prefix, module in model.named_modules()
    ]


def random_weight(name: str, shape: torch.Size, kind: type[nn.Module], seed: int) -> Tensor:
    """Of embeddings normal, `EMBEDDING` wide; of matrices and convolutions torch's own, uniform within
    1 / sqrt(inputs); of norms ones; biases are zero."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if kind is nn.LayerNorm:
        return torch.ones(shape)
    if kind is nn.Embedding:
        return EMBEDDING * torch.randn(shape, generator=generator_for(seed, name))
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator_for(seed, name))


def length_counts(peptides: Peptides, size: int) -> Tensor:
    """Peptides of each label by length, [2, size] int64; all are shorter than `size`."""
    counts = [
        np.bincount(peptides.lengths[peptides.labels == label], minlength=size) for label in (BACKGROUND, INTERACTING)
    ]
    return torch.from_numpy(np.stack(counts))
