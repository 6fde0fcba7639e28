"""The steps of the first phase: gradients, statistics, contexts that are carried."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, StepContext
from pipeline.systems.cvfp.config import SolveConfig
from pipeline.systems.cvfp.fixed_point import phase as module
from pipeline.systems.cvfp.fixed_point.diversity import diversity_gradient, diversity_terms
from pipeline.systems.cvfp.fixed_point.phase import DISTANCE, DIVERSITY
from pipeline.systems.cvfp.model.reader import shifted
from pipeline.systems.cvfp.phase import FIXED_POINT, Data
from tests.systems.cvfp.fixed_point.small import LENGTHS, ONE, ROWS, WIDTH, Small


def first_weight(small: Small) -> Tensor:
    return small.model.get_parameter("blocks.0.linear.weight")


def contexts_of(small: Small, ids: Tensor, start: Tensor) -> Tensor:
    """Token after token, one application of all blocks each."""
    context, found = start, []
    with torch.no_grad():
        for place in range(ids.shape[1]):
            context = small.model(ids[:, place : place + 1], context[:, None]).contexts[:, 0]
            found.append(context)
    return torch.stack(found, 1)


def passes(small: Small, count: int, **layout: int) -> list[tuple[dict[str, Tensor], dict[str, tuple[float, float]]]]:
    """Gradients and metrics of each step of some passes; the weights stay."""
    ranks = layout.get("data_degree", 1)
    loaders = [small.open(ONE, False, **(layout | {"data_rank": rank})) for rank in range(ranks)]
    carries: dict[tuple[int, int], Carry] = {}
    small.begin()
    return [small.step(loaders, carries, step) for step in range(1, count * loaders[0].slots + 1)]


def test_the_statistics_begin_as_the_second_moments_of_all_training_contexts() -> None:
    small = Small()
    small.model.train()
    small.begin()
    assert small.model.training
    everything = []
    for index in range(10):
        ids = torch.from_numpy(small.documents.document(index).astype("int64"))[None]
        everything.append(contexts_of(small, ids, torch.zeros(1, WIDTH, dtype=torch.float64))[0])
    found = torch.cat(everything)
    assert len(found) == sum(LENGTHS[:10])
    moments = small.model.statistics.moments
    assert torch.allclose(moments, found.T @ found / len(found), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("diversity", ["variance", "log_det"])
@pytest.mark.parametrize("distance", ["raw", "cosine"])
def test_a_step_has_the_gradient_and_the_values_of_the_loss_of_all_its_tokens_at_once(
    diversity: str, distance: str
) -> None:
    """At statistics that are this step's own moments, the gradient is that of Lambda(moments), by autograd."""
    # One slot: the moments of all contexts are those of the step.
    small = Small(
        lengths=[9, 3, 9, 7, 5], training=4, diversity=diversity, distance=distance, noise=0.0, start="zero",
        diversity_weight=0.3,
    )  # fmt: skip
    loader, carries = small.open(ONE), {}  # type: ignore[var-annotated]
    small.begin()
    small.step([loader], carries, 1)
    previous = carries[0, 0]["contexts/0"].tensor.double()
    # So that the pass before was one of other weights.
    with torch.no_grad():
        first_weight(small).add_(0.1)
    small.begin()
    gradients, metrics = small.step([loader], carries, 2)
    batch = small.open(ONE).next_step()[0]
    small.model.zero_grad()
    start = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    exact = contexts_of(small, batch.ids, start)
    found = small.model(batch.ids, shifted(exact, start)).contexts[batch.mask]
    before = previous[batch.mask]
    cosine = 2 - 2 * (found * before).sum(1) / found.norm(dim=1) / before.norm(dim=1)
    apart = ((found - before) ** 2).mean(1) if distance == "raw" else cosine
    value = torch.stack(list(diversity_terms(found.T @ found / len(found), diversity).values())).sum()
    (0.7 * apart.mean() + 0.3 * value).backward()
    compared = 0
    for name, parameter in small.model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-9, atol=1e-10), name
            compared += 1
    assert compared > 10
    assert metrics[DISTANCE][0] / metrics[DISTANCE][1] == pytest.approx(float(apart.detach().mean()), rel=1e-12)
    parts = [total / count for name, (total, count) in metrics.items() if name.startswith(f"{DIVERSITY}/")]
    assert sum(parts) == pytest.approx(float(value.detach()), rel=1e-12)


def test_micro_batches_and_ranks_change_nothing() -> None:
    """Gradients, metrics and statistics of three passes, the second of which begins at other documents' ends. Of a
    stream, see tests/launch: what crosses a border takes ranks."""
    whole = Small()
    expected = passes(whole, 3)
    assert {DISTANCE, "norm", f"{DIVERSITY}/log_det"} <= expected[-1][1].keys()
    for layout in (
        {"rows": 1, "grad_accum": 4},
        {"rows": 2, "data_degree": 2},
        {"rows": 1, "grad_accum": 2, "data_degree": 2},
    ):
        small = Small()
        found = passes(small, 3, **layout)
        assert len(found) == len(expected)
        for (gradients, metrics), (others, other_metrics) in zip(found, expected, strict=True):
            assert gradients.keys() == others.keys()
            for name, gradient in gradients.items():
                assert torch.allclose(gradient, others[name], rtol=1e-8, atol=1e-10), name
            for name, (total, count) in metrics.items():
                assert (total, count) == pytest.approx(other_metrics[name], rel=1e-9, abs=1e-12), name
        moments, others_moments = small.model.statistics.moments, whole.model.statistics.moments
        assert torch.allclose(moments, others_moments, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_step_is_the_mean_of_those_of_its_tokens() -> None:
    small = Small(noise=0.0)
    (whole, _), *_ = passes(small, 1)
    small.begin()
    one = Small(noise=0.0)
    one.begin()
    batch = one.open(ONE).next_step()[0]
    start = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    before = shifted(contexts_of(one, batch.ids, start), start)
    moments = one.model.statistics.moments.clone().requires_grad_()
    value = torch.stack(list(diversity_terms(moments, one.work.section.diversity).values())).sum()
    (slope,) = torch.autograd.grad(value, moments)
    count = int(batch.lengths.sum())
    one.model.zero_grad()
    for row, place in batch.mask.nonzero().tolist():
        context = one.model(batch.ids[row : row + 1, place : place + 1], before[row : row + 1, place : place + 1])
        vector = context.contexts[0, 0]
        (one.work.section.diversity_weight * (vector @ slope @ vector) / count).backward()
    for name, parameter in one.model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, whole[name], rtol=1e-9, atol=1e-10), name


def test_every_block_changes_in_the_first_step_by_contexts_and_by_tokens() -> None:
    """The prototype made no step at all: its loss is negative, and only a positive one was followed."""
    small = Small()
    before = {name: value.clone() for name, value in small.model.named_parameters()}
    optimizer = torch.optim.Adam(small.model.parameters(), lr=1e-3)
    small.begin()
    small.step([small.open(ONE)], {}, 1)
    optimizer.step()
    for index in range(2):
        for name in ("linear.weight", "linear.bias", "norm_context.weight"):
            parameter = small.model.get_parameter(f"blocks.{index}.{name}")
            moved = (parameter - before[f"blocks.{index}.{name}"]).abs()
            assert float(moved.detach().max()) > 1e-4, (index, name)
    first = (small.model.get_parameter("blocks.0.linear.weight") - before["blocks.0.linear.weight"]).detach()
    # Of both halves that go in, and of both that come out.
    for rows in (slice(0, WIDTH), slice(WIDTH, None)):
        for columns in (slice(0, WIDTH), slice(WIDTH, None)):
            assert float(first[rows, columns].abs().max()) > 1e-4
    for name in ("head.weight", "head.bias"):
        assert torch.equal(small.model.get_parameter(name), before[name])


def test_larger_contexts_are_no_way_to_a_lower_loss() -> None:
    small = Small(noise=0.0)

    def loss_of(gain: float) -> float:
        with torch.no_grad():
            small.model.get_parameter("blocks.1.norm_context.weight").fill_(gain)
        small.begin()
        batch = small.open(ONE).next_step()[0]
        sums = small.work.forward(small.model, batch, {}, StepContext(ONE, 0, FIXED_POINT, 1)).sums
        return float(sum(sums.values()))

    assert 0 < loss_of(1.0) < loss_of(3.0) < loss_of(30.0)


def test_noise_changes_the_gradient_alone_and_not_the_contexts_that_are_carried() -> None:
    found = {}
    for noise in (0.0, 0.05):
        small, carries = Small(noise=noise), {}  # type: ignore[var-annotated]
        small.begin()
        gradients, _ = small.step([small.open(ONE)], carries, 1)
        found[noise] = gradients, carries[0, 0]["contexts/0"].tensor
    assert torch.equal(found[0.0][1], found[0.05][1])
    assert not torch.allclose(found[0.0][0]["blocks.0.linear.weight"], found[0.05][0]["blocks.0.linear.weight"])


def test_a_pass_in_two_begins_at_the_end_of_another_document_and_contexts_are_kept_by_slot() -> None:
    small, carries = Small(), {}  # type: ignore[var-annotated]
    loader = small.open(ONE)
    small.begin()
    ends = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for step in range(1, 3 * loader.slots + 1):
        held = dict(carries.get((0, 0), {}))
        tensors = {name: entry.tensor.clone() for name, entry in held.items()}
        peek = small.open(ONE)
        peek.load_state_dict(loader.state_dict())
        batch = peek.next_step()[0]
        small.step([loader], carries, step)
        # What was carried before is as it was: a step that is abandoned leaves no trace.
        assert all(torch.equal(held[name].tensor, tensors[name]) for name in held)
        start = ends if batch.iteration == 1 else torch.zeros_like(ends)
        expected = contexts_of(small, batch.ids, start)
        found = carries[0, 0][f"contexts/{batch.slot}"]
        assert found.streams == 0
        assert torch.allclose(found.tensor[batch.mask], expected[batch.mask], rtol=1e-12, atol=1e-12)
        for row, length in enumerate(batch.lengths.tolist()):
            if length:
                ends[row] = expected[row, length - 1]
    assert {name for name in carries[0, 0] if name.startswith("contexts/")} == {
        "contexts/0",
        "contexts/1",
        "contexts/2",
    }


@pytest.mark.parametrize(("count", "slots"), [(3, 1), (5, 2)])
def test_with_few_documents_a_pass_begins_at_the_end_of_another_one_too(count: int, slots: int) -> None:
    """Streams of one document, and of two or one: what such a stream has read before may be the document itself."""
    small = Small(lengths=[9, 3, 9, 7, 5, 6][: count + 1], training=count)
    ids = [torch.from_numpy(small.documents.document(index).astype("int64"))[None] for index in range(count)]
    zero = torch.zeros(1, WIDTH, dtype=torch.float64)
    ends = [contexts_of(small, document, zero)[0, -1] for document in ids]
    for layout in ({}, {"rows": 1, "grad_accum": 4}, {"rows": 2, "data_degree": 2}):
        loaders = [
            small.open(ONE, False, **(layout | {"data_rank": rank})) for rank in range(layout.get("data_degree", 1))
        ]
        assert loaders[0].slots == slots
        carries: dict[tuple[int, int], Carry] = {}
        small.begin()
        for step in range(1, slots + 2):
            small.step(loaders, carries, step)
        seen = 0
        for (rank, micro), carry in carries.items():
            batch = small.open(ONE, False, **(layout | {"data_rank": rank})).next_step()[micro]
            for row in batch.lengths.nonzero()[:, 0].tolist():
                index = int((torch.from_numpy(small.documents.ends) <= batch.first[row]).sum())
                expected = contexts_of(small, ids[index], ends[index - 1 if index else count - 1][None])[0]
                found = carry["contexts/0"].tensor[row, : len(expected)]
                assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
                seen += 1
        assert seen == min(count, ROWS)


def test_a_document_alone_has_no_other_end_to_begin_at() -> None:
    small, carries = Small(lengths=[9, 3], training=1), {}  # type: ignore[var-annotated]
    loader = small.open(ONE)
    small.begin()
    found = []
    for step in (1, 2):
        small.step([loader], carries, step)
        found.append(carries[0, 0]["contexts/0"].tensor[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("way", ["jacobi", "newton"])
def test_a_pass_by_sweeps_makes_the_steps_of_one_token_after_token(way: str) -> None:
    expected = passes(Small(), 2)
    found = passes(Small(solve=SolveConfig(way, tolerance=1e-14)), 2)  # type: ignore[arg-type]
    for (gradients, metrics), (others, other_metrics) in zip(found, expected, strict=True):
        sweeps, count = metrics.pop("sweeps")
        assert 1 <= sweeps / count <= 10
        assert math.isfinite(metrics.pop("residual")[0])
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, others[name], rtol=1e-8, atol=1e-10), name
        for name, pair in metrics.items():
            assert pair == pytest.approx(other_metrics[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("way", ["jacobi", "newton"])
@pytest.mark.parametrize("carry", ["stream", "circular"])
def test_sweeps_over_a_stream_find_the_contexts_of_its_tokens_one_after_the_other(way: str, carry: str) -> None:
    """In the first pass already: borders of rows and of steps are those of these weights, and none is a pass late."""
    small = Small(carry=carry, solve=SolveConfig(way, tolerance=1e-13), noise=0.0)  # type: ignore[arg-type]
    loader, carries = small.open(ONE), {}  # type: ignore[var-annotated]
    small.begin()
    whole = torch.from_numpy(small.documents.tokens[: small.documents.ends[9]].astype("int64"))[None]
    start = torch.zeros(1, WIDTH, dtype=torch.float64)
    assert loader.slots == 2
    for iteration in range(2):
        expected = contexts_of(small, whole, start)[0]
        places: list[int] = []
        for slot in range(loader.slots):
            peek = small.open(ONE)
            peek.load_state_dict(loader.state_dict())
            batch = peek.next_step()[0]
            small.step([loader], carries, iteration * loader.slots + slot + 1)
            found = carries[0, 0][f"contexts/{slot}"].tensor[batch.mask]
            rows = zip(batch.first.tolist(), batch.lengths.tolist(), strict=True)
            places += [place for first, length in rows for place in range(first, first + length)]
            assert torch.allclose(found, expected[places[-len(found) :]], rtol=0, atol=1e-10)
        assert places == list(range(whole.shape[1]))
        # The circle goes on from the last context of the pass before.
        start = expected[-1:] if carry == "circular" else start


@pytest.mark.parametrize("way", ["jacobi", "newton"])
def test_a_circle_in_one_step_is_an_orbit_in_the_first_pass(way: str) -> None:
    small = Small(lengths=[9, 3, 9, 7, 5], training=4, carry="circular", solve=SolveConfig(way, 1e-13))  # type: ignore[arg-type]
    loader, carries = small.open(ONE), {}  # type: ignore[var-annotated]
    small.begin()
    small.step([loader], carries, 1)
    assert loader.slots == 1
    found = carries[0, 0]["contexts/0"].tensor[small.open(ONE).next_step()[0].mask]
    whole = torch.from_numpy(small.documents.tokens[: small.documents.ends[3]].astype("int64"))[None]
    assert torch.allclose(contexts_of(small, whole, found[-1:])[0], found, rtol=0, atol=1e-10)


def test_a_circle_is_read_token_after_token_too() -> None:
    """The first part begins at the end of the last one, of the pass before."""
    small, carries = Small(carry="circular"), {}  # type: ignore[var-annotated]
    loader = small.open(ONE)
    small.begin()
    for step in range(1, loader.slots + 1):
        small.step([loader], carries, step)
    ends = carries[0, 0]["ends"].tensor.clone()
    batch = small.open(ONE).next_step()[0]
    small.step([loader], carries, loader.slots + 1)
    expected = contexts_of(small, batch.ids, ends.roll(1, 0))
    found = carries[0, 0]["contexts/0"].tensor
    assert torch.allclose(found[batch.mask], expected[batch.mask], rtol=1e-12, atol=1e-12)


def test_sweeps_that_run_out_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    small = Small(solve=SolveConfig("jacobi", tolerance=1e-13, most=2))
    found = [metrics for _, metrics in passes(small, 1)]
    assert all(metrics["sweeps"] == (2.0, 1.0) and metrics["residual"][0] > 1e-13 for metrics in found)
    said = [line for line in capsys.readouterr().err.splitlines() if "sweeps" in line]
    assert len(said) == 1 and "--model.solve.most" in said[0]
    passes(Small(solve=SolveConfig("jacobi", tolerance=1e-13)), 1)
    assert "sweeps" not in capsys.readouterr().err


def test_a_step_that_was_abandoned_leaves_nothing_in_the_statistics() -> None:
    """As where an update is skipped: the next step's contexts alone go into the averages."""
    found = []
    for abandoned in (False, True):
        small = Small(momentum=0.5)
        small.begin()
        loader = small.open(ONE)
        if abandoned:
            # The contexts of other weights, of a step that was not followed.
            with torch.no_grad():
                first_weight(small).mul_(2)
            small.work.forward(small.model, small.open(ONE).next_step()[0], {}, StepContext(ONE, 0, FIXED_POINT, 1))
            with torch.no_grad():
                first_weight(small).div_(2)
        small.step([loader], {}, 2)
        found.append(small.model.statistics.moments.clone())
    assert torch.equal(*found)


def test_after_a_skipped_update_the_distance_counts_no_token_that_has_no_context_before() -> None:
    small = Small(noise=0.0)
    small.begin()
    loader, carry = small.open(ONE), {}  # type: ignore[var-annotated]
    counts = []
    for step in range(1, 3 * loader.slots + 1):
        (batch,) = loader.next_step()
        counts.append(small.work.count(batch)[DISTANCE])
        output = small.work.forward(small.model, batch, carry, StepContext(ONE, 0, FIXED_POINT, step))
        assert bool(counts[-1]) == (DISTANCE in output.metrics)
        # The engine leaves the second update out, and what it would have carried on.
        if step != 2:
            carry = output.carry
            small.work.after_step(small.model, StepContext(ONE, 0, FIXED_POINT, step))
    assert [bool(count) for count in counts] == [False] * 3 + [True, False, True] + [True] * 3


@pytest.mark.parametrize("layout", [{}, {"rows": 1, "grad_accum": 4}])
def test_an_evaluation_has_the_rule_of_the_guide_beside_the_exact_one(layout: dict[str, Any]) -> None:
    """Of the contexts that training left behind, and those of the present weights from zero."""
    small = Small(noise=0.0, threshold=0.01)
    small.work.data = Data(small.documents, lambda topology, held_out: small.open(topology, held_out, **layout))
    loader, carries = small.open(ONE, **layout), {}  # type: ignore[var-annotated]

    def found() -> float | None:
        return small.work.evaluate(small.model, SyncPoint(ONE)).scalars.get("converged_pass_to_pass")

    small.begin()
    assert found() is None
    for step in range(1, loader.slots + 1):
        small.step([loader], carries, step)
    # All of the first pass began at zero, and no weight has moved.
    assert found() == 1
    with torch.no_grad():
        first_weight(small).mul_(1.5)
    # What a step that the engine skips would leave behind are the present weights' contexts.
    for micro, batch in enumerate(loader.next_step()):
        small.work.forward(small.model, batch, carries[0, micro], StepContext(ONE, 0, FIXED_POINT, step + 1))
    moved, again = [], small.open(ONE, **layout)
    for slot in range(again.slots):
        for micro, batch in enumerate(again.next_step()):
            exact = contexts_of(small, batch.ids, torch.zeros(batch.rows, WIDTH, dtype=torch.float64))
            left = carries[0, micro][f"contexts/{slot}"].tensor
            moved.append((exact - left).square().mean(-1)[batch.mask])
    near = torch.cat(moved) < 0.01
    assert found() == pytest.approx(float(near.double().mean()), abs=1e-12) and 0 < near.sum() < len(near)
    small.work.end()
    assert found() is None


def test_the_determinant_is_taken_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return diversity_gradient(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "diversity_gradient", counted)
    found = passes(Small(), 2, rows=1, grad_accum=4)
    assert len(calls) == len(found) == 6


def test_moving_averages_go_by_the_momentum() -> None:
    small = Small(momentum=0.75)
    small.begin()
    before, carries = small.model.statistics.moments.clone(), {}  # type: ignore[var-annotated]
    loader = small.open(ONE)
    small.step([loader], carries, 1)
    batch = small.open(ONE).next_step()[0]
    found = carries[0, 0]["contexts/0"].tensor[batch.mask]
    # A step of as many tokens as one has on average counts for a quarter, and one of twice as many as two of them do.
    kept = 0.75 ** (len(found) / (sum(LENGTHS[:10]) / 3))
    assert 0.6 < kept < 0.75
    expected = kept * before + (1 - kept) * found.T @ found / len(found)
    assert torch.allclose(small.model.statistics.moments, expected, rtol=1e-12, atol=1e-12)


def test_a_few_passes_spread_contexts_and_make_them_forget_where_they_began() -> None:
    small = Small(start="other")
    loader, carries = small.open(ONE), {}  # type: ignore[var-annotated]
    optimizer = torch.optim.Adam(small.model.blocks.parameters(), lr=1e-2)
    small.begin()
    first = small.work.evaluate(small.model, SyncPoint(Topology())).scalars
    history = []
    for step in range(1, 8 * loader.slots + 1):
        _, metrics = small.step([loader], carries, step)
        optimizer.step()
        history.append({name: total / count for name, (total, count) in metrics.items()})
    last = small.work.evaluate(small.model, SyncPoint(Topology())).scalars
    assert history[-1]["diversity/log_det"] < 0.7 * history[0]["diversity/log_det"]
    assert last["start_distance"] < first["start_distance"]
    assert math.isfinite(history[-1][DISTANCE])
