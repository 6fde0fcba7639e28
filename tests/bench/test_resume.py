"""The resume bench saves and loads a real run, and sets it against plain files of the same size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.bench.resume import DEFAULT, _existing, render, run_resume, summary
from pipeline.commands.flags import parse_run
from pipeline.errors import UserError


def test_two_ranks_save_and_load(tmp_path: Path, bench: Callable) -> None:
    out = tmp_path / "bench.json"
    done = bench(
        "resume", "--repeats", "1", "--bench-steps", "1", "--json", str(out), "miras_tiny",
        "--batch-size", "1", "--sequence-length", "128", "--output-dir", str(tmp_path / "runs" / "one"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["machine"]["ranks"] == 2 and result["versions"]["torch"]
    size = result["bytes"]
    assert size["shards"] > 12 * result["parameters"]["trained"] and size["frozen"] == 0
    assert 0 < size["trainable"] - 4 * result["parameters"]["trained"] < 2**16
    assert size["carry"] > 0 and size["total"] == sum(size[kind] for kind in ("shards", "trainable", "carry", "other"))
    (found,) = result["rounds"]
    assert len(found["alone"]) == 2 and len(found["meanwhile"]) >= 1
    assert 0 < found["copied"] <= found["stall"] <= found["committed"]
    assert result["save_ratio"] == pytest.approx(found["save"] / found["plain"])
    assert "save, synchronous" in done.stdout and "--save-every 100" in done.stdout
    assert list(tmp_path.iterdir()) == [out], "nothing of it stays"


ROUND = {
    "alone": [1.0, 1.0, 1.0], "plain": 2.0, "plain_load": 1.0, "save": 3.0, "stall": 0.2, "copied": 0.1,
    "committed": 3.5, "meanwhile": [1.5, 1.5], "load": 2.5,
}  # fmt: skip


def test_the_summary_is_medians_and_ratios_within_rounds() -> None:
    slow = {key: [2 * x for x in value] if isinstance(value, list) else 2 * value for key, value in ROUND.items()}
    result = summary([ROUND, ROUND, slow], save_every=10)
    assert result["step"] == 1.0 and result["save"] == 3.0 and result["stall"] == 0.2
    assert result["save_ratio"] == 1.5 and result["stall_ratio"] == pytest.approx(0.1) and result["load_ratio"] == 2.5
    assert result["slow_down"] == 1.5 and result["steps_meanwhile"] == 2
    assert result["lost"] == pytest.approx(0.2 + 3.0 - 2.0)
    assert result["share_save"] == pytest.approx(3 / 13)
    assert result["share_background"] == pytest.approx(1.2 / 11.2)
    assert "share_save" not in summary([ROUND], save_every=0)


def test_the_table_fits_a_terminal() -> None:
    result = {
        "recipe": "miras_tiny", "machine": {"ranks": 2, "device": {"name": "a CPU"}}, "versions": {"torch": "2"},
        "bytes": {"shards": 12e6, "trainable": 4e6, "carry": 1e6, "other": 0, "total": 17e6, "frozen": 0},
        "parameters": {"trained": 1000, "all": 1000}, "rounds": [ROUND], "first_stall": 0.3, "save_every": 10,
        **summary([ROUND], 10),
    }  # fmt: skip
    lines = render(result).splitlines()
    assert all(len(line) <= 120 for line in lines)
    (line,) = [line for line in lines if line.startswith("save, synchronous")]
    assert line.split()[-3:] == ["3.000-3.000", "6", "1.50"]


def test_the_default_is_more_than_half_a_gigabyte() -> None:
    config = parse_run(list(DEFAULT), "bench resume")
    model = config.model.backbone  # type: ignore[attr-defined]
    weights = model.layers * (4 * model.width**2 + 3 * model.width * model.ffn)
    assert 16 * weights > 500e6


def test_it_saves_where_the_run_would(tmp_path: Path) -> None:
    assert _existing(tmp_path / "a" / "b") == tmp_path
    assert _existing(Path("absent") / "run") == Path.cwd()


@pytest.mark.parametrize("flag", ["--ranks", "--repeats", "--bench-steps"])
def test_refusals(flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag} is 0: give 1 or more"):
        run_resume([flag, "0"])


def test_words_that_are_refused(tmp_path: Path) -> None:
    for words, part in (
        (["nothing"], "unknown recipe"),
        (["--repeat", "3"], "--repeats?"),
        (["--json", str(tmp_path / "absent" / "x.json")], "no such folder"),
        (["--output-dir", "/proc/none"], "name a folder that can be written with --output-dir"),
    ):
        with pytest.raises(UserError, match=part):
            run_resume(words)
