"""The decoder is the model: its logits give the losses of training, with the same parameters."""

from __future__ import annotations

import pytest
import torch

from pipeline.capabilities import Generates
from pipeline.config import replace
from pipeline.lm.dense_decoder import DenseDecoder
from tests.launch.parity_main import LENGTH, VOCABULARY
from tests.systems.olmo.harness import LENGTHS, built, run, small


@pytest.mark.parametrize("kind", ["olmo", "olmo2"])
@torch.no_grad()
def test_its_logits_give_the_losses_of_training(kind: str) -> None:
    """olmo: one text; olmo2: of each of two documents by itself."""
    system, model = built(small(kind), torch.float64)
    assert isinstance(system, Generates)
    model.eval()
    ids = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(3))
    wanted = run(system, model, ids, predict=True).tokens
    decoder = system.decoder(model)
    starts = [ids] if kind == "olmo" else ids.split(LENGTHS)
    found = torch.cat([decoder.logits(text.unsqueeze(0), decoder.empty(1))[0] for text in starts])
    counted = wanted["losses"][0, :-1] != 0
    losses = torch.nn.functional.cross_entropy(found[:-1], ids[1:], reduction="none")
    # transformers rotates in float32, whatever the model is in.
    torch.testing.assert_close(losses[counted], wanted["losses"][0, :-1][counted], rtol=0, atol=1e-6)
    assert torch.equal(found[:-1].argmax(dim=1)[counted], wanted["predictions"][0, :-1][counted])
    assert counted.sum() >= LENGTH - 2


@torch.no_grad()
def test_it_shares_the_parameters() -> None:
    """What training changes, it has."""
    system, model = built(small())
    decoder = system.decoder(model)
    assert isinstance(decoder, DenseDecoder) and not decoder.model.training
    places = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in decoder.model.parameters()} == places
    # Training goes on with its own attention.
    assert model.backbone.config._attn_implementation != decoder.model.config._attn_implementation


def test_it_takes_texts_as_long_as_those_of_the_training() -> None:
    for length in (64, 4096):
        system, model = built(replace(small(), sequence_length=length))
        assert system.decoder(model).limit == length
