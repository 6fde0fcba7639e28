"""Models that were not trained, beside which the figures of a trained one stand."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_shape, gathered
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.model.model import CvfpModel
from pipeline.systems.cvfp.model.reader import Reader
from pipeline.systems.cvfp.model.weights import initialise


def untrained_reader(model: nn.Module, sizes: CvfpConfig, seed: int, *, published: bool) -> Reader:
    """Reads with the blocks that a run begins with: of its own config, or as `published`. A given embedding is that of
    `model`, a random one is made anew. Whole on every rank, without a head; collective, since ZeRO-3 gathers."""
    device = next(model.parameters()).device
    own = dataclasses.replace(sizes, vocab=1, embedding=None, as_published=published or sizes.as_published)
    # On the meta device, since PyTorch's own initialisation would draw from the process's generator.
    with torch.device("meta"):
        other = CvfpModel(own)
        other.embedding = nn.Embedding(sizes.vocab, sizes.width)
    other.to_empty(device=device)
    table = other.embedding
    initialise(other, own, seed, Topology())
    if sizes.embedding is not None:
        trained = getattr(model, "module", model)
        assert isinstance(trained, CvfpModel)
        (given,) = trained.embedding.parameters()
        with torch.no_grad(), gathered([given]):
            assert full_shape(given) == table.weight.shape
            table.weight.copy_(given)
    return Reader(other.eval().requires_grad_(False), sizes.width, exact=True)
