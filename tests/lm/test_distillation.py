"""Which tokens are compared: those that see something beyond the window, drawn by global position alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.lm.distillation import choose, comparable, count_compared, places, reach_in_step

# Row 0 goes on with a document of the step before; row 1 is one document.
SEGMENTS = torch.tensor([[3, 3, 3, 4, 4, 4, 4, 5], [9] * 8])


def test_a_token_reaches_the_start_of_its_document_or_of_the_step() -> None:
    assert reach_in_step(SEGMENTS).tolist() == [[1, 2, 3, 1, 2, 3, 4, 1], list(range(1, 9))]


def test_compared_is_what_sees_more_than_the_window_and_no_more_than_was_trained() -> None:
    assert comparable(SEGMENTS, 3, None).int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert comparable(SEGMENTS, 3, 6).int().tolist()[1] == [0, 0, 0, 1, 1, 1, 0, 0]


def drawn(tokens: int, seed: int = 0, step: int = 1, streams: tuple[int, ...] = (0, 1, 2), length: int = 400) -> Tensor:
    eligible = torch.arange(length).expand(len(streams), -1) >= 100
    return choose(eligible, tokens, seed=seed, step=step, streams=torch.tensor(streams))


def test_as_many_are_drawn_in_each_row_as_asked_for_or_there_are() -> None:
    for tokens, each in ((1, 1), (37, 37), (300, 300), (399, 300), (400, 300), (0, 300)):
        found = drawn(tokens)
        assert found.sum(1).tolist() == [each] * 3
        assert not found[:, :100].any()
        assert count_compared(torch.arange(400).expand(3, -1) >= 100, tokens) == 3 * each


def test_what_is_drawn_depends_on_seed_step_stream_and_place_alone() -> None:
    one = drawn(37)
    assert torch.equal(drawn(37), one)
    assert torch.equal(drawn(37, streams=(2, 0))[[1, 0]], one[[0, 2]])
    for other in (drawn(37, seed=1), drawn(37, step=2), drawn(37, streams=(5, 6, 7))):
        assert (other != one).any(dim=1).all()
    assert (one[0] != one[1]).any()


def test_every_place_is_drawn_about_equally_often() -> None:
    """2,000 draws of 30 of 300 places: 200 each, with a standard deviation of 13."""
    often = sum(drawn(30, step=step, streams=tuple(range(20))).sum(0) for step in range(100))
    assert isinstance(often, Tensor)
    counts = often[100:].double()
    assert float(counts.mean()) == 200
    assert float(counts.min()) > 130 and float(counts.max()) < 270
    assert 11 < float(counts.std()) < 16


def test_places_are_those_of_the_chosen_in_token_order() -> None:
    chosen = torch.tensor([[False, True, False, True], [False, False, False, True]])
    for tokens in (0, 2, 3):
        index, counted = places(chosen, tokens)
        assert index.tolist() == [1, 3, 7] and counted.all()


def test_on_a_gpu_there_are_as_many_places_whatever_was_chosen() -> None:
    """On the meta device, which knows no values either."""
    chosen = torch.zeros(2, 5, dtype=torch.bool, device="meta")
    assert [x.shape for x in places(chosen, 3)] == [torch.Size([6])] * 2
    assert [x.shape for x in places(chosen, 0)] == [torch.Size([10])] * 2
