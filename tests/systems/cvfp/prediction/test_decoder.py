"""Decoding gives the logits of the recurrence written out in float64, whatever the pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.systems.cvfp.prediction import decoder as module
from pipeline.systems.cvfp.prediction.decoder import CvfpDecoder
from tests.systems.cvfp.prediction.naive import VOCAB, small, states_and_contexts

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def expected(model: Any, ids: Tensor, zero: bool = False) -> Tensor:
    found = []
    for row in ids:
        states, _ = states_and_contexts(model, row, zero=zero)
        found.append(states @ model.head.weight.T + model.head.bias)
    return torch.stack(found).detach()


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "PIECE", 3)
    return small(tmp_path)[1].eval()


@pytest.mark.parametrize("zero", [False, True])
def test_reading_and_stepping_give_the_logits_of_the_recurrence(model: Any, zero: bool) -> None:
    decoder, wanted = CvfpDecoder(model, zero=zero), expected(model, IDS, zero)
    assert decoder.vocab_size == VOCAB
    torch.testing.assert_close(decoder.logits(IDS, decoder.empty(2)), wanted)
    for read in range(1, IDS.shape[1]):
        state = decoder.empty(2)
        torch.testing.assert_close(decoder.read(IDS[:, :read], state), wanted[:, read - 1])
        for place in range(read, IDS.shape[1]):
            torch.testing.assert_close(decoder.step(IDS[:, place], state), wanted[:, place])
        assert state.lengths.tolist() == [8, 8]


def test_the_state_is_one_vector_and_comes_back(model: Any) -> None:
    decoder = CvfpDecoder(model)
    sizes = []
    for tokens in (2, 7):
        state = decoder.empty(2)
        decoder.read(IDS[:, :tokens], state)
        sizes.append({name: tuple(tensor.shape) for name, tensor in state.tensors().items()})
    assert sizes[0] == sizes[1] == {"context": (2, decoder.width), "lengths": (2,)}
    again = decoder.restore(state.tensors())
    assert torch.equal(decoder.step(IDS[:, 7], again), decoder.step(IDS[:, 7], state))


def test_rows_are_apart(model: Any) -> None:
    decoder, wanted = CvfpDecoder(model), expected(model, IDS)
    one, two = decoder.empty(1), decoder.empty(1)
    decoder.read(IDS[:1, :5], one)
    decoder.read(IDS[1:, :2], two)
    state = decoder.select(decoder.join([one, two]), torch.tensor([1, 0, 1]))
    assert state.lengths.tolist() == [2, 5, 2]
    found = decoder.step(torch.stack([IDS[1, 2], IDS[0, 5], IDS[1, 2]]), state)
    torch.testing.assert_close(found, torch.stack([wanted[1, 2], wanted[0, 5], wanted[1, 2]]))
    # What was copied is as it was.
    torch.testing.assert_close(decoder.step(IDS[:1, 5], one), wanted[:1, 5])


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"lengths": torch.tensor([1.0])}, "lengths"),
        ({"lengths": torch.tensor([-1])}, "lengths"),
        ({"context": torch.zeros(1, 5, dtype=torch.float64)}, "context"),
        ({"context": torch.zeros(1, 6)}, "context"),
    ],
)
def test_a_state_of_another_model_is_refused(model: Any, changes: dict[str, Tensor], names: str) -> None:
    decoder = CvfpDecoder(model)
    with pytest.raises(ValueError, match=names):
        decoder.restore({**decoder.empty(1).tensors(), **changes})


@pytest.mark.parametrize("shape", [(2, 0), (3, 1)])
def test_ids_of_other_rows_are_refused(model: Any, shape: tuple[int, int]) -> None:
    decoder = CvfpDecoder(model)
    with pytest.raises(ValueError, match="expected"):
        decoder.read(torch.zeros(shape, dtype=torch.int64), decoder.empty(2))
