"""Steps and held-out numbers of the second phase are those of a recurrence written out in float64."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.system import Carry, create_system
from pipeline.systems.cvfp.phase import PREDICTION
from pipeline.systems.cvfp.prediction.phase import STALENESS, Prediction
from pipeline.systems.cvfp.prediction.unigram import unigram
from tests.systems.cvfp.prediction.naive import (
    SYNC,
    batches,
    context,
    data_of,
    documents,
    model_of,
    nats,
    rows,
    run_config,
    small,
    states_and_contexts,
)

CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
"""Contexts pass between calls in float32."""


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("section", [{}, {"context": "zero"}], ids=["contexts", "zero"])
def test_a_step_is_the_loss_and_gradient_of_the_recurrence_with_contexts_detached(
    tmp_path: Path, section: dict[str, Any]
) -> None:
    prediction, model = small(tmp_path, **section)
    for batch in batches(prediction):
        output = prediction.forward(model, batch, {}, context())
        expected = [nats(model, ids, zero=bool(section))[0].sum() for ids in rows(batch) if len(ids) > 1]
        total = output.sums["cross_entropy"]
        torch.testing.assert_close(total.double(), torch.stack(expected).sum(), **CLOSE)
        found, wanted = gradients(total, model), gradients(torch.stack(expected).sum(), model)
        for name, gradient in wanted.items():
            if gradient is None or not gradient.any():
                assert found[name] is None or not found[name].any(), name  # type: ignore[union-attr]
            else:
                torch.testing.assert_close(found[name], gradient, msg=name, **CLOSE)
        counted = prediction.count(batch)["cross_entropy"]
        assert counted == sum(max(0, len(ids) - 1) for ids in rows(batch))


def test_what_is_trained_is_reached_by_the_loss_and_the_rest_is_not(tmp_path: Path) -> None:
    """In the last block nothing reaches what makes a context: of its weights these rows stay as they are."""
    prediction, model = small(tmp_path)
    system = create_system(prediction.config)
    phase = next(phase for phase in system.phases(model) if phase.name == PREDICTION)
    trained = {name for group in phase.groups for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    sums = [prediction.forward(model, batch, {}, context()).sums["cross_entropy"] for batch in batches(prediction)]
    found = gradients(torch.stack(sums).sum(), model)
    assert {name for name, gradient in found.items() if gradient is not None and gradient.any()} == trained
    width = prediction.sizes.width
    last = found["blocks.1.linear.weight"]
    assert last is not None and not last[:width].any() and last[width:].any()


def test_a_micro_batch_without_any_label_gives_zeros(tmp_path: Path) -> None:
    """Ranks whose rows have run out take part in the step all the same."""
    prediction, model = small(tmp_path)
    whole = batches(prediction)[0]
    empty = dataclasses.replace(whole, lengths=torch.zeros_like(whole.lengths))
    total = prediction.forward(model, empty, {}, context()).sums["cross_entropy"]
    found = gradients(total, model)
    assert total.item() == 0 and prediction.count(empty)["cross_entropy"] == 0
    assert not found["head.weight"].any() and not found["blocks.0.linear.weight"].any()  # type: ignore[union-attr]


def test_what_is_behind_a_row_has_no_part_in_it(tmp_path: Path) -> None:
    prediction, model = small(tmp_path)
    batch = next(batch for batch in batches(prediction) if not batch.mask.all())
    other = dataclasses.replace(batch, ids=torch.where(batch.mask, batch.ids, 3))
    one, two = (prediction.forward(model, x, {}, context()).sums["cross_entropy"] for x in (batch, other))
    assert torch.equal(one, two)


def one_pass(prediction: Prediction, model: Any, carry: Carry, which: int) -> tuple[Carry, list[Any], list[Any]]:
    loader = prediction.data.open(SYNC.topology, False)
    sums, metrics = [], []
    for batch in batches(prediction, passes=which + 1)[which * loader.slots :]:
        assert batch.iteration == which
        output = prediction.forward(model, batch, carry, context())
        carry = output.carry
        sums.append(output.sums["cross_entropy"].item())
        metrics.append(output.metrics)
    return carry, sums, metrics


def test_contexts_are_kept_for_as_many_epochs_as_asked_and_staleness_is_what_they_moved(tmp_path: Path) -> None:
    prediction, model = small(tmp_path, refresh=2)
    old = {batch.slot: [states_and_contexts(model, ids)[1].detach() for ids in rows(batch) if len(ids)]
           for batch in batches(prediction)}  # fmt: skip
    carry, _, metrics = one_pass(prediction, model, {}, 0)
    assert not any(metrics)
    kept = {name: entry.tensor.clone() for name, entry in carry.items() if name.startswith("contexts/")}
    with torch.no_grad():
        model.blocks[0].linear.weight += 0.3
    carry, _, metrics = one_pass(prediction, model, carry, 1)
    assert not any(metrics)
    for name, tensor in kept.items():
        assert torch.equal(carry[name].tensor, tensor)
    carry, _, metrics = one_pass(prediction, model, carry, 2)
    for batch, found in zip(batches(prediction), metrics, strict=True):
        moved, tokens = [], 0
        for ids, before in zip((ids for ids in rows(batch) if len(ids)), old[batch.slot], strict=True):
            now = states_and_contexts(model, ids)[1].detach()
            # What enters: nothing has moved before a first token.
            moved.append((now - before)[:-1].square().mean(-1).sum())
            tokens += len(ids)
        value, count = found[STALENESS]
        assert int(count) == tokens
        torch.testing.assert_close(value.double(), torch.stack(moved).sum(), **CLOSE)
        assert value > 0


def test_contexts_that_are_computed_for_every_step_are_not_stale(tmp_path: Path) -> None:
    prediction, model = small(tmp_path)
    carry, _, _ = one_pass(prediction, model, {}, 0)
    assert set(carry) == {"ends"}
    with torch.no_grad():
        model.blocks[0].linear.weight += 0.3
    _, _, metrics = one_pass(prediction, model, carry, 1)
    assert [float(found[STALENESS][0]) for found in metrics] == [0.0] * len(metrics)


def expected_numbers(prediction: Prediction, model: Any, *, zero: bool) -> dict[str, float]:
    found = prediction.data.documents
    table, likeliest = unigram(found)
    losses, hits, without, tokens = [], [], [], []
    for index in range(found.training, len(found.ends)):
        ids = torch.from_numpy(found.document(index).astype("int64"))
        loss, right = nats(model, ids, zero=zero)
        losses.append(loss)
        hits.append(right)
        without.append(nats(model, ids, zero=True)[0])
        tokens += ids[1:].tolist()
    mean = torch.cat(losses).mean().item()
    return {
        "loss": mean,
        "ppl": math.exp(mean),
        "accuracy": float(torch.cat(hits).double().mean()),
        "unigram_ppl": math.exp(sum(table[token] for token in tokens) / len(tokens)),
        "unigram_accuracy": tokens.count(likeliest) / len(tokens),
        "context_zero_ppl": math.exp(torch.cat(without).mean().item()),
        "labels": float(len(tokens)),
    }


@pytest.mark.parametrize("section", [{}, {"context": "zero"}], ids=["contexts", "zero"])
@pytest.mark.parametrize("rows_of, accum", [(3, 1), (1, 2)])
def test_held_out_numbers_are_those_of_every_document(
    tmp_path: Path, section: dict[str, Any], rows_of: int, accum: int
) -> None:
    config = dataclasses.replace(run_config(tmp_path, **section), batch_size=rows_of, grad_accum=accum)
    prediction, model = Prediction(config, data_of(config, documents())), model_of(config)
    found = prediction.evaluate(model, SYNC).scalars
    assert found == pytest.approx(expected_numbers(prediction, model, zero=bool(section)), rel=1e-6)
    if section:
        assert found["ppl"] == found["context_zero_ppl"]


def test_held_out_numbers_are_of_the_weights_as_they_are(tmp_path: Path) -> None:
    """Whatever contexts training keeps."""
    prediction, model = small(tmp_path, refresh=5)
    prediction.evaluate(model, SYNC)
    one_pass(prediction, model, {}, 0)
    with torch.no_grad():
        model.blocks[0].linear.weight += 0.3
    found = prediction.evaluate(model, SYNC).scalars
    assert found == pytest.approx(expected_numbers(prediction, model, zero=False), rel=1e-6)
