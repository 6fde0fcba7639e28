"""Likelihoods by a system's forward pass are those of the model on each text alone, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipeline.config import RunConfig, replace
from pipeline.downstream import system_scorer
from pipeline.downstream.logits_scorer import LogitsScorer
from pipeline.downstream.requests import Likelihood, Request
from pipeline.downstream.system_scorer import SystemScorer
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill
from pipeline.runtime.stop import Stopped
from pipeline.runtime.sync import SyncPoint
from pipeline.system import create_system
from tests.inference import checkpoints
from tests.launch.parity_main import randomise
from tests.lm.systems import Counting

LENGTHS = ((1, 1), (40, 1), (3, 9), (64, 1), (55, 10), (20, 20), (90, 4))
"""Tokens of contexts and of continuations; the last two texts are longer than LIMIT."""


def requests(lengths: Sequence[tuple[int, int]] = LENGTHS) -> list[Request]:
    draw = torch.Generator().manual_seed(2)
    parts = [torch.randint(256, (sum(sizes),), generator=draw).tolist() for sizes in lengths]
    return [Request(ids[:size], ids[size:]) for ids, (size, _) in zip(parts, lengths, strict=True)]


def built(config: RunConfig) -> tuple[Any, Any]:
    config = replace(config, parallel__sequence=1)
    system = create_system(config)
    model = system.build()
    system.initialise(model, Topology())
    fill(model, randomise)
    return system, model.double()


def alone(logits: Any, request: Request, limit: int | None = None) -> Likelihood:
    """From the logits [1, tokens, vocabulary] of a text that is read alone, in float64."""
    text = [*request.context, *request.continuation]
    text = text if limit is None else text[-limit - 1 :]
    found = logits(torch.tensor([text[:-1]])).double().log_softmax(-1)[0, -len(request.continuation) :]
    wanted = torch.tensor(request.continuation)
    greedy = bool((found.argmax(-1) == wanted).all())
    return Likelihood(float(found.gather(1, wanted[:, None]).sum()), greedy)


def assert_same(found: Sequence[Likelihood], expected: Sequence[Likelihood], within: float = 1e-9) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=within) and one.greedy == other.greedy


def test_a_decoder_is_that_of_transformers() -> None:
    """The system's own forward pass, the logits of transformers' class beside others, and those of a text alone."""
    system, model = built(checkpoints.olmo())
    assert system.text_limit() == checkpoints.LIMIT
    reference = system.exported(model).double().eval()

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return reference(ids).logits

    asked = requests()
    with torch.no_grad():
        # One continuation is what greedy decoding gives.
        ids = asked[2].context
        for _ in range(3):
            ids = [*ids, int(logits(torch.tensor([ids]))[0, -1].argmax())]
        asked.append(Request(asked[2].context, ids[-3:]))
        expected = [alone(logits, request, checkpoints.LIMIT) for request in asked]
    assert [answer.greedy for answer in expected] == [False] * 7 + [True]
    assert_same(LogitsScorer(reference, 256, checkpoints.LIMIT).score(asked), expected)
    scorer = SystemScorer(system, model, SyncPoint(Topology()), padding=256)
    # transformers computes the angles of positions in float32.
    assert_same(scorer.score(asked), expected, within=1e-6)


@pytest.mark.parametrize("attachment", ["residual", "mac", "overflow"])
def test_a_long_text_is_read_in_pieces_through_the_carry(attachment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system, model = built(replace(checkpoints.miras(attachment=attachment), sequence_length=32))
    assert system.text_limit() is None
    asked = requests(((150, 5), (2, 1), (95, 3), (60, 2)))
    reference: Any = system.exported(model)  # type: ignore[attr-defined]
    expected = [alone(lambda ids: reference(ids).logits, request) for request in asked]
    scorer = SystemScorer(system, model, SyncPoint(Topology()), padding=256)
    assert_same(scorer.score(asked), expected)
    monkeypatch.setattr(system_scorer, "PIECE", 64)
    reads = Counting(10**6)
    scorer = SystemScorer(system, model, reads, padding=256)
    assert_same(scorer.score(asked), expected)
    assert 10**6 - reads.calls == 3 + 2 + 1, "of 192 tokens, of 128, and of two rows of 64"


def test_a_stop_ends_it_and_the_models_mode_stays() -> None:
    system, model = built(checkpoints.olmo())
    model.train()
    with pytest.raises(Stopped):
        SystemScorer(system, model, Counting(0), padding=256).score(requests())
    assert model.training
