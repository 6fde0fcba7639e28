"""What the engine is told: losses and what they average over, held-out numbers, sizes, costs and refusals."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.capabilities import Compiles, CountsEpochs
from pipeline.config import replace
from pipeline.errors import UserError
from pipeline.load import decide
from pipeline.parallel.topology import Topology
from pipeline.plan.command import render
from pipeline.plan.estimate import PlanOptions, make_plan
from pipeline.recipes import all_recipes
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.mimir import losses
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.costs import denoiser_flops, step_bytes
from pipeline.systems.mimir.diffusion.floor import floor
from pipeline.systems.mimir.held_out import measure
from pipeline.systems.mimir.losses import CE, UNIT, VB
from pipeline.systems.mimir.peptides import PeptideBatch, Peptides, chosen
from tests.systems.mimir.harness import (
    ALONE,
    PEPTIDES,
    built,
    created,
    evaluated,
    first_batch,
    forward,
    peptides,
    small,
)

ABSORBING = {"model__kernel": "absorbing", "model__timesteps": 20}
CASES: dict[str, dict[str, Any]] = {
    "uniform": {"model__hybrid_loss_coeff": 0.3},
    "absorbing": {**ABSORBING, "model__mask_weight": 1.5, "model__hybrid_loss_coeff": 0.3},
    "encoder and head": {"model__target": "encoder", "model__length": "head", "model__loss": "bound"},
}
every_case = pytest.mark.parametrize("case", CASES)


def part(batch: PeptideBatch, rows: slice, **changes: Tensor) -> PeptideBatch:
    names = [field.name for field in dataclasses.fields(batch) if field.name != "domain"]
    return PeptideBatch(**{**{name: getattr(batch, name)[rows] for name in names}, **changes}, domain=batch.domain)


@every_case
def test_terms_add_up_over_micro_batches(case: str) -> None:
    system = created(small(**CASES[case]))
    model, batch = built(system, torch.float64), first_batch(system)
    whole, counts = forward(system, model, batch).sums, system.count(batch)
    parts = [part(batch, slice(0, 11)), part(batch, slice(11, 32))]
    sums = [forward(system, model, piece).sums for piece in parts]
    assert whole.keys() == counts.keys()
    for term in whole:
        torch.testing.assert_close(sums[0][term] + sums[1][term], whole[term], rtol=1e-9, atol=1e-9)
        assert sum(system.count(piece)[term] for piece in parts) == pytest.approx(counts[term], abs=1)


@every_case
def test_rows_that_fill_a_batch_change_nothing(case: str) -> None:
    system = created(small(**CASES[case]))
    model, batch = built(system, torch.float64), first_batch(system)
    kept = part(batch, slice(0, 20))
    weights = torch.cat([torch.ones(20), torch.zeros(12)])
    filled = part(batch, slice(None), weights=weights)
    assert system.count(filled) == system.count(kept)
    expected, found = forward(system, model, kept), forward(system, model, filled)
    for term, value in expected.sums.items():
        torch.testing.assert_close(found.sums[term], value, rtol=1e-9, atol=1e-9)
    for name, (value, number) in expected.metrics.items():
        torch.testing.assert_close(found.metrics[name][0], value, rtol=1e-9, atol=1e-9)
        assert float(found.metrics[name][1]) == pytest.approx(float(number))


def test_the_cross_entropy_is_that_of_the_logits() -> None:
    """Against a loop over residues, in float64, of the noise and the prediction that the system makes."""
    system = created(small(**{**ABSORBING, "model__label_dropout": 0.0, "model__target_dropout": 0.0}))
    model, batch = built(system, torch.float64), first_batch(system)
    t = losses.noise_levels(system.sizes, system.kernel, batch, system.config.seed)
    xt = system.kernel.corrupt(batch.letters, t, batch.lengths, system.config.seed, batch.domain, batch.draws)
    logits = model(xt, t.double(), batch.lengths, batch.labels, batch.targets).logits.detach()
    total, counted = 0.0, 0
    for row in range(batch.rows):
        for place in range(int(batch.lengths[row])):
            if xt[row, place] == len(system.sizes.letters):
                shares = logits[row, place].exp() / logits[row, place].exp().sum()
                total -= math.log(float(shares[batch.letters[row, place]]))
                counted += 1
    output, counts = forward(system, model, batch), system.count(batch)
    assert counts[CE] == counted * UNIT and counts[VB] == int(batch.lengths.sum())
    assert output.sums[CE].item() / counts[CE] == pytest.approx(total / counted, rel=1e-9)
    assert float(output.metrics[CE][0] / output.metrics[CE][1]) == pytest.approx(total / counted, rel=1e-9)


@pytest.mark.parametrize(
    "loss, coefficient, ce, vb",
    [("hybrid", 0.25, 1.0, 0.25), ("cross_entropy", 0.25, 1.0, 0.0), ("bound", 0.25, 0.0, 1.0)],
)
def test_the_loss_is_the_one_that_is_named(loss: str, coefficient: float, ce: float, vb: float) -> None:
    system = created(small(model__loss=loss, model__hybrid_loss_coeff=coefficient))
    model, batch = built(system), first_batch(system)
    output, counts = forward(system, model, batch), system.count(batch)
    for term, weight in ((CE, ce), (VB, vb)):
        value, number = output.metrics[term]
        mean = float(value / number)
        assert mean > 0.5
        assert output.sums[term].item() / counts[term] == pytest.approx(weight * mean, rel=1e-5)
        assert output.sums[term].requires_grad == (weight > 0)


def test_labels_and_targets_are_withheld_as_often_as_asked_for() -> None:
    system = created(small(model__label_dropout=0.2, model__target_dropout=0.3))
    batch = first_batch(system)
    rows = 20_000
    many = part(
        batch, slice(0, 1), labels=torch.ones(rows, dtype=torch.int64), targets=torch.full((rows,), 3),
        draws=torch.arange(rows),
    )  # fmt: skip
    labels, targets = losses.withheld(system.sizes, many, 0)
    no_label, no_target = labels == -1, targets == -1
    assert float(no_label.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert bool(no_target[no_label].all())
    assert float(no_target[~no_label].float().mean()) == pytest.approx(0.3, abs=0.01)
    assert set(labels.tolist()) == {-1, 1} and set(targets.tolist()) == {-1, 3}
    again = losses.withheld(system.sizes, part(many, slice(7, 99)), 0)
    assert torch.equal(again[0], labels[7:99]) and torch.equal(again[1], targets[7:99])
    assert not torch.equal(losses.withheld(system.sizes, many, 1)[0], labels)


def test_a_curriculum_goes_from_little_noise_to_all() -> None:
    system = created(small(**ABSORBING, model__curriculum_epochs=2.0))
    batch = first_batch(system)
    draws = torch.arange(4000)
    for epoch, most in ((0.0, 1), (1.0, 10), (2.0, 20), (5.0, 20)):
        many = part(batch, slice(0, 1), lengths=torch.full((4000,), 12), draws=draws, epochs=torch.full((4000,), epoch))
        t = losses.noise_levels(system.sizes, system.kernel, many, 0)
        assert (int(t.min()), int(t.max())) == (1, most)


def test_a_model_that_knows_nothing_has_the_bound_of_even_letters() -> None:
    system = created(small(**ABSORBING, model__length="head"))
    model = built(system)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.get_parameter("lengths.out.weight"))
    found = evaluated(system, model).scalars
    even = math.log(len(system.sizes.letters))
    for name in ("bound", "ce", "bound/interacting", "bound/background"):
        assert found[name] == pytest.approx(even, rel=1e-5), name
    assert found["bits_per_residue"] == pytest.approx(math.log2(24), rel=1e-5)
    # Of an absorbing kernel the floor is the entropy of the residues.
    assert found["ce_floor"] == pytest.approx(found["entropy_of_residues"]) and 2.5 < found["ce_floor"] < even
    assert found["gap_to_floor"] == pytest.approx(even - found["ce_floor"], rel=1e-5)
    assert found["length_nats"] == pytest.approx(math.log(17), rel=1e-5)
    assert found["loss"] == pytest.approx(even + math.log(17), rel=1e-5)


def test_held_out_numbers_do_not_depend_on_the_batch() -> None:
    expected: dict[str, float] = {}
    for rows in (32, 7):
        system = created(small(evaluation__batch_size=rows, model__target="encoder", model__held_out_peptides=40))
        model = built(system)
        model.train()
        found = evaluated(system, model).scalars
        assert model.training
        expected = expected or found
        assert found == pytest.approx(expected, rel=1e-5)
    assert expected["unseen_targets/bound"] > 0 and "bound 8" in system.headline(evaluated(system, model))


@pytest.mark.parametrize("balanced", [True, False])
def test_an_evaluation_reads_the_same_peptides_on_every_layout_and_with_every_seed(balanced: bool) -> None:
    def read(degree: int, **changes: Any) -> list[tuple[list[int], int]]:
        """Peptides with the numbers that their noise is a function of."""
        config = small(model__held_out_peptides=23, model__balanced=balanced, **changes)
        loaders = [created(config).held_out_loader(Topology(world=degree, rank=rank)) for rank in range(degree)]
        batches = [batch for loader in loaders for _ in range(loader.steps_per_epoch) for batch in loader.next_step()]
        return sorted(
            (letters, draw)
            for batch in batches
            for letters, draw, weight in zip(
                batch.letters.tolist(), batch.draws.tolist(), batch.weights.tolist(), strict=True
            )
            if weight
        )

    expected = read(1, batch_size=8, grad_accum=2)
    assert len(expected) == 23 < len(peptides().held_out)
    assert read(2, batch_size=8) == expected == read(3, batch_size=5, evaluation__batch_size=4, seed=3)
    # Files are often sorted, by label to begin with.
    assert [letters for letters, _ in expected] != peptides().held_out.letters[:23].tolist()


@pytest.mark.parametrize("balanced", [True, False])
def test_the_floor_is_that_of_the_peptides_that_are_read(balanced: bool) -> None:
    system = created(small(**ABSORBING, model__held_out_peptides=23, model__balanced=balanced))
    loader = system.held_out_loader(ALONE)
    entropies, weights = [], []
    (batch,) = loader.next_step()
    assert loader.steps_per_epoch == 1 and int(batch.weights.sum()) == 23 < len(peptides().held_out)
    for label in (0, 1):
        rows = (batch.labels == label) & (batch.weights > 0)
        texts = [letters[:length] for letters, length in zip(batch.letters[rows].tolist(), batch.lengths[rows].tolist(),
                                                            strict=True)]  # fmt: skip
        shares = np.bincount(np.concatenate(texts), minlength=24) / sum(map(len, texts))
        entropies.append(-sum(share * math.log(share) for share in shares if share))
        weights.append(sum(map(len, texts)) / (len(texts) if balanced else 1))
    found = evaluated(system, built(system)).scalars
    expected = np.average(entropies, weights=weights)
    assert found["ce_floor"] == pytest.approx(expected, rel=1e-9) == found["entropy_of_residues"]
    assert found["gap_to_floor"] == pytest.approx(found["ce"] - expected, rel=1e-6)


@pytest.mark.parametrize("balanced", [True, False])
def test_the_held_out_bound_weighs_labels_as_training_draws_them(balanced: bool) -> None:
    """Of a set that is nearly all background."""
    held_out = peptides().held_out
    kinds = [chosen(held_out, held_out.labels == label) for label in (0, 1)]
    few = [kinds[0], chosen(kinds[1], np.arange(2))]
    rare = Peptides(*(np.concatenate([getattr(kind, name) for kind in few]) for name in Peptides.__annotations__))
    system = created(
        small(model__balanced=balanced, **CASES["encoder and head"]), dataclasses.replace(peptides(), held_out=rare)
    )
    model = built(system)
    with torch.no_grad():
        model.get_parameter("labels.embedding.weight")[1] *= 50
    found = evaluated(system, model).scalars
    weights = [kind.lengths.mean() if balanced else kind.lengths.sum() for kind in few]
    expected = np.average([found["bound/background"], found["bound/interacting"]], weights=weights)
    assert found["bound"] == pytest.approx(expected, rel=1e-9)
    assert found["loss"] == pytest.approx(found["bound"] + found["length_nats"], rel=1e-9)
    apart = abs(found["bound"] - found["bound/background"])
    whole = abs(found["bound/interacting"] - found["bound/background"])
    assert whole > 0.1 and (0.4 if balanced else 0.0) < apart / whole < (0.6 if balanced else 0.15)
    # Of every peptide by itself, as the model is told its label.
    assert 0 < found["ce"] < 10 and found["ce_floor"] > 0


def test_the_bound_is_the_average_over_timesteps_of_what_training_estimates() -> None:
    config = small(model__label_dropout=0.0, model__target_dropout=0.0, model__timesteps=4, evaluation__batch_size=128)
    system = created(replace(config, model__balanced=False))
    model, sync_point = built(system), SyncPoint(ALONE)
    loader = system.held_out_loader(ALONE)
    bound = measure(system._predict_batch, model, system.kernel, loader, 15 * loader.steps_per_epoch, sync_point)[
        "bound"
    ]
    estimates = torch.zeros(100 * loader.steps_per_epoch, 2, dtype=torch.float64)
    loader.reset()
    with torch.no_grad():
        for estimate in estimates:
            (batch,) = loader.next_step()
            estimate += torch.stack([value.double() for value in forward(system, model, batch).metrics[VB]])
    nats, residues = estimates.sum(0)
    error = float((estimates[:, 0] / estimates[:, 1]).std()) / len(estimates) ** 0.5
    assert error < 0.02 * bound
    assert float(nats / residues) == pytest.approx(bound, abs=4 * error)


def test_the_data_decides_the_table_and_the_length_of_an_epoch() -> None:
    found = peptides()
    system = created(small())
    assert isinstance(system, CountsEpochs) and isinstance(system, Compiles)
    assert system.sizes.targets == found.training_targets > 20
    assert built(system).get_parameter("targets.embedding.weight").shape[0] == found.training_targets + 1
    assert system.steps_per_epoch(ALONE) == math.ceil(len(found.training) / 32)
    assert system.steps_per_epoch(Topology(world=2)) == math.ceil(len(found.training) / 64)
    config = small(epochs__train=2.0, epochs__evaluate=0.5)
    fresh = created(config)
    decided = decide(fresh, ALONE).config
    assert decided.steps == 2 * system.steps_per_epoch(ALONE) and decided.model.targets == found.training_targets  # type: ignore[attr-defined]


def test_the_log_says_what_is_left_out_of_the_data() -> None:
    notes = ("3 copies", "1,234 background within 2 edits of interacting peptides that are held out")
    system = created(small(), dataclasses.replace(peptides(), notes=notes))
    assert system.describe("cpu", torch.float32)["left out"] == "; ".join(notes)
    system.files = dataclasses.replace(peptides(), notes=())
    assert "left out" not in system.describe("cpu", torch.float32)


@pytest.mark.parametrize("kernel", ["uniform", "absorbing"])
def test_the_log_says_the_floor_of_the_data(kernel: str) -> None:
    system = created(small(model__kernel=kernel, model__timesteps=20, model__balanced=False))
    training = peptides().training
    kinds = np.zeros((2, 24))
    for letters, length, label in zip(training.letters, training.lengths, training.labels, strict=True):
        np.add.at(kinds[label], letters[:length], 1)
    least = floor(system.kernel, kinds)
    said = system.describe("cpu", torch.float32)["floor"]
    assert said.startswith(f"cross-entropy {least.ce:.4f}, entropy {least.entropy:.4f} nats per residue")
    assert (least.ce < least.entropy - 1) == (kernel == "uniform")
    system.files = None
    assert "floor" not in system.describe("cpu", torch.float32)


def test_times_of_larger_models_are_computed_from_their_flops() -> None:
    """Those of the page, from the guide's 1.5 minutes for an epoch of the small one."""
    page = (Path(__file__).parents[3] / "docs" / "mimir.md").read_text()
    recipes = all_recipes()
    flops = {}
    for size in ("small", "medium", "large"):
        model = recipes[f"mimir_{size}"]().model
        assert isinstance(model, MimirConfig)
        flops[size] = denoiser_flops(model, 20).forward
    medium, large = (1.5 * flops[size] / flops["small"] for size in ("medium", "large"))
    assert f"| {medium:.1f} min; 75 epochs in {75 * medium / 60:.1f} h |" in page
    assert f"| {large:.0f} min; 150 epochs in {150 * large / 60 / 24:.1f} days |" in page


def test_lengths_are_those_of_the_training_data() -> None:
    system = created(small())
    model = built(system)
    training = peptides().training
    assert int(model.get_buffer("lengths.counts").sum()) == len(training) < PEPTIDES
    interacting = training.lengths[training.labels == 1]
    shares = model.log_lengths(torch.tensor([1]), torch.tensor([0]))[0].exp()
    assert float(shares[10]) == pytest.approx((interacting == 10).mean(), rel=1e-5)


def test_weights_depend_on_seed_and_name_alone() -> None:
    system = created(small())
    one, other = built(system), built(created(small(batch_size=8)))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    seeded = built(created(small(seed=1)))
    same = [name for name, value in one.named_parameters() if torch.equal(value, seeded.get_parameter(name))]
    assert all(name.endswith(".bias") or "norm" in name for name in same)
    deviate = float(one.residues.weight.std())
    assert 0.08 < deviate < 0.12


def test_matrices_alone_are_decayed() -> None:
    system = created(small(weight_decay=0.1, **CASES["encoder and head"]))
    (phase,) = system.phases(system.build())
    decayed, others = phase.groups
    assert (decayed.weight_decay, others.weight_decay) == (0.1, 0.0)
    assert {"blocks.0.qkv.weight", "head.weight", "targets.encoder.convolutions.1.weight"} <= set(decayed.parameters)
    assert {"residues.weight", "targets.nothing.weight", "norm.weight", "head.bias"} <= set(others.parameters)
    assert len({*decayed.parameters, *others.parameters}) == len(list(system.build().parameters()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sequence_length": 64}, "--sequence-length 64: peptides have up to --model.max-length 20"),
        ({"model__mask_weight": 1.0}, "--model.mask-weight 1.0: .* absorbing"),
        ({"model__kernel": "absorbing"}, "--model.timesteps 10: the absorbing kernel masks a residue"),
        ({"parallel__sequence": 2}, "--parallel.sequence 2: peptides are too short"),
        ({"evaluation__steps": 9}, "--evaluation.steps 9: .* give --model.held-out-peptides, and leave .* at 8"),
        ({"model__held_out_peptides": -1}, "--model.held-out-peptides is -1: give 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(changes: dict[str, Any], message: str) -> None:
    topology = Topology(world=2, sequence=changes.get("parallel__sequence", 1))
    with pytest.raises(UserError, match=message):
        created(small(**changes)).check(topology)


@every_case
def test_flops_are_those_that_torch_counts(case: str) -> None:
    system = created(small(**CASES[case]))
    model, batch = built(system), first_batch(system)
    with FlopCounterMode(display=False) as counter:
        forward(system, model, batch)
    found = denoiser_flops(system.sizes, 20).forward * 20 * batch.rows
    # The counter has no formula for attention on a CPU, and an encoder reads each target of the batch once.
    attention = 4.0 * 16 * 20 * 2 * 20 * batch.rows
    if "encoder" not in case:
        assert counter.get_total_flops() == pytest.approx(found - attention, rel=1e-6)
    else:
        assert counter.get_total_flops() < found


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_a_step_is_what_autograd_keeps(recompute: bool) -> None:
    """Of the preset `small`, which is wide enough for its activations to be most of it."""
    system = created(small(model__width=128, model__layers=3, model__heads=4, activation_checkpointing=recompute))
    model, batch = built(system), first_batch(system)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward(system, model, batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    size = sum(number for place, number in kept.items() if place not in weights)
    estimate = step_bytes(system.sizes, batch.rows, 4, recompute=False)["kept activations"]
    assert output.sums[CE].requires_grad
    if recompute:
        assert size < 0.4 * estimate
    else:
        assert size == pytest.approx(estimate, rel=0.15)


@pytest.mark.parametrize(
    "name, epochs, lr, warmup, parameters",
    [
        ("mimir_small", 20, 5e-4, 500, 838_937),
        ("mimir_medium", 75, 3e-4, 1000, 3_909_401),
        ("mimir_large", 150, 1e-4, 2000, 21_463_577),
    ],
)
def test_the_presets_are_the_guides(name: str, epochs: int, lr: float, warmup: int, parameters: int) -> None:
    config = all_recipes()[name]()
    assert (config.epochs.train, config.lr, config.warmup_steps) == (epochs, lr, warmup)
    assert (config.batch_size, config.steps) == (256, epochs * 3920)
    plan = make_plan(config, PlanOptions(device="L4"))
    assert plan.counts.parameters == plan.counts.trainable == parameters
    assert plan.fits and plan.held["kept activations"] > plan.held["working set"] > 0


def test_a_plan_says_apart_what_other_choices_add() -> None:
    config = small(model__target="encoder", model__length="head")
    parts = created(config).parameter_parts()
    shown = dict(re.findall(r"^ +(\w[\w ]*?)  +([\d,]+)$", render(config, PlanOptions(device="L4")), re.MULTILINE))
    assert {name: shown[name] for name in parts} == {name: f"{number:,}" for name, number in parts.items()}
    assert sum(parts.values()) == int(shown["parameters"].replace(",", ""))
    assert "denoiser" not in render(all_recipes()["mimir_small"](), PlanOptions(device="L4"))
