"""The suite on the exact denoiser of a known process, whose answers are known, and on one that knows nothing."""

from __future__ import annotations

import dataclasses
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.evals.command import render, write
from pipeline.evaluation_result import Evaluation
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.data.build import build_set
from pipeline.systems.mimir.data.encode import decode
from pipeline.systems.mimir.data.process import Process, ProcessSettings
from pipeline.systems.mimir.data.synthetic import synthetic_table
from pipeline.systems.mimir.diffusion.bound import peptide_bound
from pipeline.systems.mimir.diffusion.choice import create_kernel
from pipeline.systems.mimir.evaluation.bits import bits_per_residue
from pipeline.systems.mimir.evaluation.held_out import by_cluster, by_target
from pipeline.systems.mimir.evaluation.likelihoods import decoys, likelihoods, target_ratios
from pipeline.systems.mimir.evaluation.pictures import compositions
from pipeline.systems.mimir.evaluation.rows import Rows
from pipeline.systems.mimir.evaluation.suite import Options, PeptideSuite
from pipeline.systems.mimir.model import ModelOutput
from pipeline.systems.mimir.peptides import INTERACTING, NO_TARGET, Peptides, chosen, some
from tests.systems.mimir.evaluation.sets import peptides
from tests.systems.mimir.exact import ExactDenoiser

PROCESS = Process(ProcessSettings(targets=8, max_length=12))
SIZES = MimirConfig(timesteps=12, targets=7, max_length=12)
DATA = build_set(
    synthetic_table(PROCESS, 2000), SIZES, 0.1, dict(zip(PROCESS.target_names, PROCESS.target_sequences, strict=True))
)
OPTIONS = Options(samples=200, peptides=80, decoys=4)


class ExactSystem:
    """Says of noisy peptides what the process makes of them; with `ignores`, as if all were background."""

    def __init__(self, *, ignores: bool = False) -> None:
        self.sizes, self.peptides, self.kernel, self.ignores = SIZES, DATA, create_kernel(SIZES), ignores
        self.denoiser = ExactDenoiser(PROCESS, self.kernel, SIZES.letters)
        # Last: the number of no target.
        self.places = torch.tensor([*(PROCESS.target_names.index(name) for name in DATA.target_names), -1])

    def predict(
        self, model: nn.Module, states: Tensor, t: Tensor, lengths: Tensor, labels: Tensor, targets: Tensor, *rest: Any
    ) -> ModelOutput:
        told = torch.zeros_like(labels) if self.ignores else labels
        logits = self.denoiser(states, t, lengths, told, self.places[targets])
        log_lengths = torch.full((len(states), SIZES.max_length + 1), -torch.inf)
        log_lengths[:, 8:] = -math.log(5)
        return ModelOutput(logits, log_lengths)


def suite(system: ExactSystem, options: Options = OPTIONS) -> PeptideSuite:
    return PeptideSuite(system, nn.Linear(1, 1), SyncPoint(Topology()), options)


@pytest.fixture(scope="module")
def exact() -> Evaluation:
    return suite(ExactSystem()).run()


def cell(evaluation: Evaluation, measure: str, of: str) -> Any:
    (found,) = [row for row in evaluation.tables["measures"] if (row["measure"], row["of"]) == (measure, of)]
    return found


def test_the_bound_is_the_entropy_of_the_process(exact: Evaluation) -> None:
    for of, label in (("interacting", 1), ("background", 0)):
        found, entropy = cell(exact, "bits per residue", of), PROCESS.entropy_per_residue(label) / math.log(2)
        # T steps that draw residues one by one lose a little of what they say of each other.
        assert found["low"] < 1.04 * entropy and entropy < found["high"]
    background = cell(exact, "bits per residue", "background")
    assert background["low"] < background["beside"] < background["high"], "residues are independent there"
    interacting = cell(exact, "bits per residue", "interacting")
    assert interacting["high"] < interacting["beside"], "a model that knows the motifs knows more"
    ce = cell(exact, "cross-entropy, nats", "background")
    assert ce["value"] == pytest.approx(ce["beside"], rel=0.03), "no gap to the floor"


def test_bounds_are_those_of_whole_peptides() -> None:
    system, held_out = ExactSystem(), some(DATA.held_out, 100)
    rows = Rows(system, nn.Linear(1, 1), SyncPoint(Topology()), 128)
    found = likelihoods(rows, held_out, "test").nats
    lengths, x0 = rows.tensor(held_out.lengths), rows.tensor(held_out.letters)
    labels, targets = rows.tensor(held_out.labels), rows.tensor(held_out.targets)
    wanted = peptide_bound(
        system.kernel, lambda xt, t: system.predict(nn.Identity(), xt, t, lengths, labels, targets).logits, x0, lengths,
        seed=3, domain="another", draw=torch.arange(len(x0)),
    )  # fmt: skip
    difference = found - wanted.numpy()
    assert abs(difference.mean()) < 3 * difference.std() / math.sqrt(len(difference)), "two estimates of one bound"
    assert abs(difference.mean()) < 0.03 * wanted.mean()


def test_true_targets_come_before_decoys(exact: Evaluation) -> None:
    # One peptide in twenty has no motif, and no more can be said of it.
    assert cell(exact, "target AUROC within a peptide", "interacting")["low"] > 0.9
    first = cell(exact, "true target first", "interacting")
    assert first["low"] > 0.85 and first["beside"] == pytest.approx(0.2)


def test_exact_samples_are_as_what_is_held_out(exact: Evaluation) -> None:
    for of in ("interacting", "background"):
        assert cell(exact, "validity", of)["value"] == 1.0
        assert cell(exact, "uniqueness", of)["value"] > 0.98
        assert cell(exact, "novelty", of)["value"] > 0.98
        for name in ("composition", "2-mer", "3-mer", "length"):
            found = cell(exact, f"{name} distance", of)
            assert found["value"] < found["beside"] + 2.5 * (found["beside_up_to"] - found["beside"]), (name, of)
    assert cell(exact, "diversity", "background")["value"] == pytest.approx(
        cell(exact, "diversity", "background")["beside"], abs=0.03
    )


def test_labels_and_targets_are_recovered_from_exact_samples(exact: Evaluation) -> None:
    for what, of in (("label", "both labels"), ("target", "interacting")):
        drawn, held_out = cell(exact, f"{what} recovered", of), cell(exact, f"{what} recovered", f"{of}, held out")
        assert drawn["low"] > drawn["beside_up_to"], "above what shuffled ones have"
        assert drawn["value"] == pytest.approx(held_out["value"], abs=0.12)
    assert cell(exact, "target recovered", "interacting")["value"] > 0.7


def test_a_model_that_is_told_nothing_is_found_out() -> None:
    found = suite(ExactSystem(ignores=True), Options(samples=120, peptides=40, decoys=2)).run()
    bits = cell(found, "bits per residue", "interacting")
    assert bits["value"] > 1.15 * PROCESS.entropy_per_residue(INTERACTING) / math.log(2)
    assert cell(found, "target AUROC", "interacting")["value"] == 0.5
    assert cell(found, "true target first", "interacting")["value"] == pytest.approx(1 / 3)
    recovered = cell(found, "target recovered", "interacting")
    assert recovered["value"] < recovered["beside_up_to"] + 0.05
    motif = cell(found, "3-mer distance", "interacting")
    assert motif["value"] > motif["beside_up_to"]


def test_every_measure_has_a_picture(exact: Evaluation, tmp_path: Any) -> None:
    write(exact, tmp_path, {})
    names = {
        "bits_by_length", "cross_entropy_by_timestep", "target_roc", "residues", "lengths", "distances", "uniqueness",
        "nearest", "quality", "recovery", "targets_interacting",
    }  # fmt: skip
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert (tmp_path / "samples" / "drawn.json").is_file()
    text = render(exact)
    assert "bits per residue" in text and "target AUROC" in text


def test_intervals_are_over_clusters() -> None:
    """Of held-out peptides that are of few families, each of many that differ in their last residue."""
    interacting = DATA.held_out.labels == INTERACTING
    heads = some(chosen(DATA.held_out, interacting & (DATA.held_out.targets >= 0)), 8)
    family = chosen(heads, np.repeat(np.arange(len(heads)), 20))
    family.letters[np.arange(len(family)), family.lengths.astype(int) - 1] = np.tile(np.arange(20), len(heads))
    both = (family, chosen(DATA.held_out, ~interacting))
    held_out = Peptides(*(np.concatenate([getattr(x, name) for x in both]) for name in Peptides.__annotations__))
    system = ExactSystem()
    system.peptides = dataclasses.replace(DATA, held_out=held_out)
    found = suite(system, Options(samples=200, peptides=200, decoys=4))
    groups = found.held_out["interacting"].groups
    assert len(np.unique(groups)) <= 8 < len(groups) == 160, "two heads may be near each other"
    assert len(np.unique(found.held_out["background"].groups)) > 0.9 * len(found.held_out["background"])
    found.score()
    found.rank()
    found.describe({kind: found.held_out[kind].peptides for kind in ("interacting", "background")})
    rows = {(row["measure"], row["of"]): row for row in found.table}
    nats = likelihoods(found.rows, found.held_out["interacting"].peptides, "interacting").nats
    lengths = found.held_out["interacting"].peptides.lengths
    apart, together = (bits_per_residue(nats, lengths, of) for of in (None, groups))
    row: Any = rows["bits per residue", "interacting"]
    assert (row["value"], row["low"], row["high"]) == (together.value, together.low, together.high)
    assert (together.low, together.high) != (apart.low, apart.high)
    shares = found.curves["residues"].intervals
    widths = {kind: np.subtract(*shares[f"interacting, {kind}"][::-1]).mean() for kind in ("drawn", "held out")}
    assert widths["held out"] > 2 * widths["drawn"], "the same peptides, as independent ones"
    by_length = found.curves["bits_by_length"]
    assert by_length.interval_over == dict.fromkeys(("interacting", "background"), "clusters of peptides")
    assert found.curves["residues"].interval_over == {
        f"{kind}, {name}": over
        for name, over in (("drawn", "peptides"), ("held out", "clusters of peptides"))
        for kind in ("interacting", "background")
    }
    alone = np.isnan(by_length.intervals["interacting"][0]) & ~np.isnan(by_length.series["interacting"])
    assert alone.any(), "lengths of one family have no interval"


def test_intervals_of_unseen_targets_are_over_targets_and_of_one_target_there_is_none() -> None:
    """Of a set of one target, each as a set of peptides whose targets training has not seen."""
    drawn, targets = peptides(["ABCD", "ABCA"]), np.zeros(3, np.int32)
    unseen = by_target(dataclasses.replace(peptides(["ABCD", "ABBB", "CCCD"]), targets=targets))
    curve = compositions({"unseen targets, drawn": drawn}, {"unseen targets, held out": unseen}, "ABCD")
    assert curve.interval_over == {"unseen targets, drawn": "peptides", "unseen targets, held out": "targets"}
    assert np.isnan(curve.intervals["unseen targets, held out"]).all()
    assert np.isfinite(curve.intervals["unseen targets, drawn"]).all()
    assert curve.series["unseen targets, held out"] == pytest.approx((2 / 12, 4 / 12, 4 / 12, 2 / 12))


def test_clusters_of_what_is_held_out_are_those_of_the_split() -> None:
    texts = ["".join(row) for row in product("ACDE", repeat=5)][::3]
    whole = peptides(texts, "ACDE")
    clusters = by_cluster(whole, "ACDE").groups
    kept = np.isin(clusters, np.unique(clusters)[::3])
    part = by_cluster(chosen(whole, np.flatnonzero(kept)), "ACDE").groups
    assert 1 < len(np.unique(part)) < len(part)
    same = clusters[kept][:, None] == clusters[kept]
    assert ((part[:, None] == part) == same).all()


def test_decoys_are_no_targets_of_the_peptide() -> None:
    found = some(DATA.held_out, 300)
    found = peptides(decode(found.letters, found.lengths, SIZES.letters), SIZES.letters, width=12)
    targets = np.arange(len(found)) % 5
    found = type(found)(found.letters, found.lengths, found.labels, targets)
    known = type(found)(found.letters, found.lengths, found.labels, (targets + 1) % 5)
    drawn = decoys(found, known, np.arange(5), 9)
    assert drawn.shape == (len(found), 4), "of five targets one is the true one, and one more is known"
    assert (drawn[:, 0] == targets).all()
    assert all(row[0] not in row[1:] and (row[0] + 1) % 5 not in row[1:] for row in drawn.tolist())
    assert all(len(set(row)) == len(row) for row in drawn.tolist())


def test_a_peptide_of_many_targets_leaves_the_others_their_decoys() -> None:
    found = peptides(["ABCD", "ABCA", "ABCB"])
    found = type(found)(found.letters, found.lengths, found.labels, np.array([0, 1, 2]))
    many = chosen(found, np.array([0] * 8 + [1, 2]))
    known = type(found)(many.letters, many.lengths, many.labels, np.array([*range(8), 1, 2]))
    drawn = decoys(found, known, np.arange(9), 5)
    assert drawn.shape == (3, 6) and (drawn[1:] >= 0).all()
    assert drawn[0].tolist() == [0, 8, *[NO_TARGET] * 4]
    system = ExactSystem()
    held_out = some(chosen(DATA.held_out, DATA.held_out.targets >= 0), 3)
    ratios = target_ratios(Rows(system, nn.Linear(1, 1), SyncPoint(Topology()), 8), held_out,
                           np.array([[0, 1, NO_TARGET], [1, 2, 3], [2, 0, NO_TARGET]]), "test")  # fmt: skip
    assert np.isnan(ratios).tolist() == [[False, False, True], [False] * 3, [False, False, True]]


def test_ranks_divide_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    system, count = ExactSystem(), 300
    rows = Rows(system, nn.Linear(1, 1), SyncPoint(Topology()), 64)
    (alone,) = rows("test", count, lambda places: (rows.tensor(places) * 2,))
    assert alone.tolist() == [2 * place for place in range(count)]
