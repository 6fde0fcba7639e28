"""All measures together, on one rank and on several."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.evals.command import render, write
from pipeline.systems.cvfp.evaluation import measures as module
from pipeline.systems.cvfp.evaluation.baselines import first_rows, gaussian_figures
from pipeline.systems.cvfp.evaluation.passes import by_position
from pipeline.systems.cvfp.evaluation.pictures import places
from pipeline.systems.cvfp.evaluation.pieces import Reading, padded
from pipeline.systems.cvfp.evaluation.rank import effective_rank
from tests.launch.forked import forked
from tests.systems.cvfp.evaluation.reading import CARRIES, ONE, Recurrence, documents, measures


def test_the_ranks_are_of_equally_many_tokens_beside_both_baselines() -> None:
    suite, model = measures()
    found = suite.evaluate(model, ONE)
    data, width = suite.documents, 8
    # Held out are 7 documents of at most 12 tokens; of training as many tokens are taken, though there are more.
    held_out = [data.document(index)[:12] for index in range(17, 24)]
    tokens = sum(map(len, held_out))
    assert found.scalars["effective_rank/tokens"] == tokens < suite.reading.available(training=True)
    training = suite.reading.chosen(tokens, training=True)
    assert sum(map(len, training)) == tokens
    readers = {"": model, "random_init_": suite.untrained(False), "published_init_": suite.untrained(True)}
    for name, reader in readers.items():
        for side, sequences in (("train", training), ("val", held_out)):
            contexts = torch.cat([reader.contexts(*padded([one], model.device))[0] for one in sequences])
            expected = effective_rank(torch.linalg.svdvals(contexts)) / width
            assert found.scalars[f"effective_rank/{name}{side}"] == pytest.approx(expected, rel=1e-6)
    norms = torch.cat([model.contexts(*padded([one], model.device))[0] for one in held_out]).norm(dim=-1)
    assert found.scalars["norm"] == pytest.approx(float(norms.mean()))
    assert found.scalars["final_diff"] < 1e-9 < 1e-2 < found.scalars["final_diff/published_init"]
    assert found.scalars["attractor"] == 0


def test_a_long_hold_out_is_cut_where_training_has_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 29)
    suite, model = measures()
    assert suite.evaluate(model, ONE).scalars["effective_rank/tokens"] == 29


def test_beside_one_held_out_document_there_is_another_row() -> None:
    """The end of a document itself is no other document's end."""
    reading = Reading(documents([5, 9, 4, 7], 3), "document", 4, 6)
    ids, mask = first_rows(reading, reading.available(training=False), torch.device("cpu"))
    assert mask.sum(1).tolist() == [6, 5] and ids[0].tolist() == reading.documents.document(3)[:6].tolist()
    assert ids[1, :5].tolist() == reading.documents.document(0).tolist()
    model = Recurrence(factor=4.0)
    assert float(by_position(model, ids, mask, ONE).squares[0]) > 1e-2
    with pytest.raises(AssertionError):
        by_position(model, ids[:1], mask[:1], ONE)


def test_baselines_are_measured_once() -> None:
    suite, model = measures()
    suite.evaluate(model, ONE)
    calls = [suite.untrained(published).calls for published in (False, True)]  # type: ignore[attr-defined]
    suite.evaluate(model, ONE)
    assert calls == [suite.untrained(published).calls for published in (False, True)]  # type: ignore[attr-defined]


def test_everything_is_written_and_drawn(tmp_path: Path) -> None:
    suite, model = measures()
    found = suite.suite(model, ONE)
    write(found, tmp_path, {})
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "attractor", "effective_rank", "final_diff", "forgetting", "identity", "norms", "probe", "spectrum",
    }  # fmt: skip
    assert "Token two back" in render(found)
    scalars = json.loads((tmp_path / "evaluation.json").read_text())["scalars"]
    # What is not finite is written as nothing.
    assert [name for name, value in scalars.items() if value is None] == []
    assert scalars["tokens/train"] == suite.reading.available(training=True)
    assert set(scalars) >= {
        "probe/context",
        "probe/embedding",
        "probe/ratio/random_init",
        "probe/context/published_init",
    }
    forgetting = json.loads((tmp_path / "forgetting.json").read_text())["series"]
    assert forgetting["trained"][-1] < forgetting["random init"][-1] < forgetting["published init"][-1]
    checks = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("identity", "attractor")}
    named = ["trained", "random init", "published init", "independent normal numbers"]
    assert all(check["names"] == named for check in checks.values())
    suffixes = ("", "/random_init", "/published_init", "/gaussian")
    for series, scalar in (
        ("context before and after the blocks", "identity_cosine"),
        ("held-out context and embedding", "embedding_cosine"),
    ):
        assert checks["identity"]["series"][series] == [scalars[scalar + suffix] for suffix in suffixes]
    drawn = checks["attractor"]["series"]
    for series, scalar in (("distance of two contexts", "distance_of_contexts"), ("norm", "norm")):
        expected = [math.log10(scalars[scalar + suffix]) for suffix in suffixes]
        assert drawn[series] == pytest.approx(expected, rel=1e-12)
    apart = [1 - scalars[f"cosine_of_contexts{suffix}"] for suffix in suffixes]
    assert drawn["1 - cosine of two contexts"] == pytest.approx([math.log10(value) for value in apart], rel=1e-12)
    # What is an attractor lies below all of the lines.
    assert sorted(checks["attractor"]["levels"].values()) == pytest.approx([-2, -1])
    assert places(12) == [0, 1, 2, 3, 5, 7, 11] and places(1) == [0] and places(768)[-1] == 767


def test_the_gaussian_baseline_is_that_of_drawn_contexts() -> None:
    drawn = torch.randn(2, 20_000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = gaussian_figures(500, 6, threshold=0.5)
    distances = (drawn[0] - drawn[1]).norm(dim=-1)
    assert found["final_diff"] == pytest.approx(float(distances.mean()), rel=0.01)
    assert found["final_diff_relative"] == pytest.approx(float(distances.mean()) / 6**0.5, rel=0.01)
    assert found["converged"] == pytest.approx(float((distances.square() / 6 < 0.5).double().mean()), rel=0.1)
    assert 0.95 < found["effective_rank"] < 1
    assert found["norm"] == pytest.approx(float(drawn.norm(dim=-1).mean()), rel=0.01)
    assert found["spread"] == pytest.approx(float(drawn[0].square().sum(-1).mean().sqrt()), rel=0.01)
    apart = float((drawn[0] - drawn[1]).square().sum(-1).mean().sqrt())
    assert found["distance_of_contexts"] == pytest.approx(apart, rel=0.01)
    cosine = float(torch.nn.functional.cosine_similarity(drawn[0], drawn[1], dim=-1).mean())
    assert found["cosine_of_contexts"] == found["identity_cosine"] == pytest.approx(cosine, abs=0.01)


def test_several_ranks_measure_what_one_does(tmp_path: Path) -> None:
    """Documents, and tokens of the stream, do not divide by the ranks; where a stream is cut, contexts agree to the
    tolerance of its borders."""
    done = forked(2, "tests.systems.cvfp.evaluation.measures_main", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    everyone = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(one == everyone[0] for one in everyone)
    for carry in CARRIES:
        suite, model = measures(carry)
        alone = (suite.suite if carry == "document" else suite.evaluate)(model, ONE).scalars
        tolerance = 1e-9 if carry == "document" else 1e-3
        # A recurrence that forgets nothing has no ring that it settles in.
        kept = {name for name in alone if carry != "circular" or "published" not in name}
        assert {name: everyone[0][carry][name] for name in kept} == pytest.approx(
            {name: alone[name] for name in kept}, rel=tolerance, abs=1e-9
        ), carry
