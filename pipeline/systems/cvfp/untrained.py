"""Models that were not trained, beside which the figures of a trained one stand."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import full_shape, gathered, is_sharded
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.model.model import CvfpModel
from pipeline.systems.cvfp.model.reader import Reader
from pipeline.systems.cvfp.model.weights import EMBEDDING, initial_value, initialise


def untrained_reader(model: nn.Module, sizes: CvfpConfig, seed: int, *, published: bool) -> Reader:
    """Reads with the weights that a run begins with: of its own config, or as `published`. A given embedding that is
    frozen is that of `model`, one that is trained is read again, and a random one made anew. Whole on every rank,
    without a head; collective, since ZeRO-3 gathers. Raises UserError where an embedding cannot be read.

    An embedding that no training has changed is not there twice, where `model` holds it whole: it is most of what a
    reader takes. So a reader is to be used before `model` is trained further.
    """
    trained = getattr(model, "module", model)
    assert isinstance(trained, CvfpModel)
    device = next(model.parameters()).device
    anew = sizes.embedding if sizes.trains_embedding else None
    own = dataclasses.replace(sizes, vocab=1, embedding=anew)
    if published:
        # It has a decay and a standard deviation of its own, and refuses others.
        own = dataclasses.replace(own, as_published=True, decay=CvfpConfig.decay, initial_std=CvfpConfig.initial_std)
    # On the meta device, since PyTorch's own initialisation would draw from the process's generator.
    with torch.device("meta"):
        other = CvfpModel(own)
        if anew is not None:
            other.embedding = nn.Embedding(sizes.vocab, sizes.width)
    other.to_empty(device=device)
    initialise(other, own, seed, Topology())
    if anew is None:
        table = _random(trained, own, seed) if sizes.embedding is None else _given(trained)
        other.embedding = nn.Embedding.from_pretrained(table.to(device))
    return Reader(other.eval().requires_grad_(False), sizes.width, exact=True)


def _given(model: CvfpModel) -> Tensor:
    """The model's embedding, float32."""
    (weight,) = model.embedding.parameters()
    with gathered([weight]):
        return (weight.detach().clone() if is_sharded(weight) else weight.detach()).float()


def _random(model: CvfpModel, sizes: CvfpConfig, seed: int) -> Tensor:
    """The random embedding that seed and sizes decide: the model's own, where that is still the one."""
    (weight,) = model.embedding.parameters()
    made = initial_value(sizes, seed, EMBEDDING, full_shape(weight)).to(weight.device)
    same = not is_sharded(weight) and weight.dtype == made.dtype and torch.equal(weight, made)
    return weight.detach() if same else made
