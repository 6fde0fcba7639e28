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
    """Reads with the weights that a run begins with: of its own config, or as `published`. A given embedding that is
    frozen is that of `model`, one that is trained is read again, and a random one made anew. Whole on every rank,
    without a head; collective, since ZeRO-3 gathers. Raises UserError where an embedding cannot be read."""
    device = next(model.parameters()).device
    anew = sizes.embedding if sizes.trains_embedding else None
    own = dataclasses.replace(sizes, vocab=1, embedding=anew)
    if published:
        # It has a decay and a standard deviation of its own, and refuses others.
        own = dataclasses.replace(own, as_published=True, decay=CvfpConfig.decay, initial_std=CvfpConfig.initial_std)
    # On the meta device, since PyTorch's own initialisation would draw from the process's generator.
    with torch.device("meta"):
        other = CvfpModel(own)
        other.embedding = nn.Embedding(sizes.vocab, sizes.width)
    other.to_empty(device=device)
    table = other.embedding
    initialise(other, own, seed, Topology())
    if sizes.embedding is not None and anew is None:
        trained = getattr(model, "module", model)
        assert isinstance(trained, CvfpModel)
        (given,) = trained.embedding.parameters()
        with torch.no_grad(), gathered([given]):
            assert full_shape(given) == table.weight.shape
            table.weight.copy_(given)
    return Reader(other.eval().requires_grad_(False), sizes.width, exact=True)
