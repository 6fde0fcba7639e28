"""Weights that were not trained are those that a run began with, whatever training has made of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.model.model import CvfpModel
from pipeline.systems.cvfp.model.weights import initialise
from pipeline.systems.cvfp.untrained import untrained_reader


@pytest.mark.parametrize("given", ["random", "frozen", "trained"])
def test_contexts_are_those_before_training(tmp_path: Path, given: str) -> None:
    save_file({"wte.weight": torch.randn(9, 6)}, tmp_path / "model.safetensors")
    embedding = None if given == "random" else str(tmp_path)
    sizes = CvfpConfig(
        width=6, layers=2, vocab=9, embedding=embedding, train_embedding=given == "trained", decay=0.4, initial_std=0.3
    )
    model = CvfpModel(sizes)
    initialise(model, sizes, 5, Topology())
    ids = torch.arange(9)[None]
    before = model(ids, start=torch.zeros(1, 6)).contexts
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if sizes.trains_embedding or name != "embedding.weight":
                parameter.add_(0.2 * torch.randn_like(parameter))
    found = untrained_reader(model, sizes, 5, published=False).contexts(ids, torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(found, before)
    published = untrained_reader(model, sizes, 5, published=True)
    blocks = published.model.blocks
    assert blocks[0].decay == 1.0 and 0.08 < float(blocks[0].linear.weight.std()) < 0.12  # type: ignore[index,union-attr]


@pytest.mark.parametrize("given", [False, True])
def test_an_embedding_that_was_not_trained_is_not_there_twice(tmp_path: Path, given: bool) -> None:
    save_file({"wte.weight": torch.randn(9, 6)}, tmp_path / "model.safetensors")
    sizes = CvfpConfig(width=6, layers=2, vocab=9, embedding=str(tmp_path) if given else None)
    model = CvfpModel(sizes)
    initialise(model, sizes, 5, Topology())
    for published in (False, True):
        other = untrained_reader(model, sizes, 5, published=published).model
        assert isinstance(other, CvfpModel)
        assert other.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
        assert not other.embedding.weight.requires_grad and model.embedding.weight.requires_grad
        # Another seed's is another one, and is made anew.
        other = untrained_reader(model, sizes, 6, published=published).model
        assert isinstance(other, CvfpModel)
        assert torch.equal(other.embedding.weight, model.embedding.weight) == given
