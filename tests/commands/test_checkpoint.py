"""`checkpoint verify`, `list` and `convert`, as a person types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoint.manifest import BEST, LATEST, MANIFEST, commit, point
from pipeline.commands import checkpoint as command
from pipeline.commands.checkpoint import run_checkpoint
from pipeline.errors import UserError
from tests.checkpoint.whole import write_whole

FACTS = {"world": 4, "data": 2, "sequence": 2, "zero_stage": 3}
Run = Callable[..., tuple[list[str], str | None]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with three whole checkpoints."""
    for step in (5, 100, 20):
        folder = tmp_path / "run" / "checkpoints" / f".checkpoint-{step}.partial"
        (folder / "shards").mkdir(parents=True)
        (folder / "weights.bin").write_bytes(b"w" * 5000)
        (folder / "shards" / "rank0.bin").write_bytes(b"0" * 300)
        write_whole(folder, {"step": step, **FACTS})
        commit(folder, folder.with_name(f"checkpoint-{step}"), folder.with_name(LATEST))
    return tmp_path / "run"


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: (the lines that it printed, the line of its error or None)."""

    def call(*words: object) -> tuple[list[str], str | None]:
        error = None
        try:
            run_checkpoint([str(word) for word in words])
        except UserError as raised:
            error = str(raised)
            assert "\n" not in error
        return capsys.readouterr().out.splitlines(), error

    return call


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"checkpoint-{step}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- verify


def test_all_checkpoints_of_a_run_are_verified(run: Path, run_command: Run) -> None:
    lines, error = run_command("verify", run)
    assert error is None and len(lines) == 4
    assert lines[0].split() == ["checkpoint", "step", "size", "ranks", "ZeRO", "format", "state"]
    assert [line.split()[0] for line in lines[1:]] == ["checkpoint-5", "checkpoint-20", "checkpoint-100"]
    assert all(line.endswith("OK") for line in lines[1:])
    assert lines[3].split() == [
        "checkpoint-100", "100", "5.2", "KiB", "4", "(data", "2", "x", "sequence", "2)", "3", "shards", "OK",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["run", "checkpoints", "one"])
def test_what_a_path_may_be(run: Path, run_command: Run, name: str) -> None:
    path = {"run": run, "checkpoints": run / "checkpoints", "one": checkpoint(run, 20)}[name]
    lines, error = run_command("verify", path)
    assert error is None and len(lines) == (2 if name == "one" else 4)
    lines, error = run_command("verify", path, checkpoint(run, 5))
    assert error is None and len(lines) == (3 if name == "one" else 5)


def test_a_flipped_byte_is_found_unless_quick(run: Path, run_command: Run) -> None:
    path = checkpoint(run, 20) / "shards" / "rank0.bin"
    flip(path)
    lines, error = run_command("verify", run)
    assert lines[2].endswith(f"{path}: content differs from its hash")
    assert [line.endswith("OK") for line in lines[1:]] == [True, False, True]
    assert error is not None and error.startswith(f"1 of 3 checkpoints is not whole ({path}: content differs")
    assert "restore the file" in error
    assert run_command("verify", run, "--quick")[1] is None
    lines, error = run_command("verify", "--quick", checkpoint(run, 20))
    assert error is None and lines[1].endswith("OK")


def test_every_problem_has_a_line(run: Path, run_command: Run) -> None:
    (checkpoint(run, 5) / "weights.bin").write_bytes(b"w" * 4999)
    (checkpoint(run, 5) / "shards" / "rank0.bin").unlink()
    (checkpoint(run, 20) / MANIFEST).unlink()
    (checkpoint(run, 100) / MANIFEST).write_text('{"step": 100, "fil')
    lines, error = run_command("verify", run)
    text = "\n".join(lines)
    assert "weights.bin: 4999 bytes instead of 5000" in text and "rank0.bin: missing" in text
    assert f"no {MANIFEST}: the save did not finish" in text and f"{MANIFEST}: damaged" in text
    assert error is not None and error.startswith("3 of 3 checkpoints are not whole")


def test_a_shard_that_the_manifest_does_not_list_is_a_problem(run: Path, run_command: Run) -> None:
    extra = checkpoint(run, 5) / "shards" / "rank1.bin"
    extra.write_bytes(b"0")
    (checkpoint(run, 5) / ".nfs0001").write_bytes(b"")
    lines, error = run_command("verify", checkpoint(run, 5))
    assert lines[1].endswith(f"{extra}: not in the manifest") and error is not None


def test_a_file_that_cannot_be_read_is_a_problem(run: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *, hashes: bool) -> list[str]:
        raise OSError(5, "Input/output error", str(folder / "weights.bin"))

    monkeypatch.setattr(command, "problems", fail)
    lines, error = run_command("verify", checkpoint(run, 5))
    assert lines[1].endswith("weights.bin: Input/output error") and error is not None


def test_a_checkpoint_that_goes_meanwhile_is_no_damage(
    run: Path, run_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = command.check

    def vanish(path: Path, *, hashes: bool) -> list[str]:
        if path.name == "checkpoint-5":
            path.rename(path.with_name(".checkpoint-5.removed"))
        return check(path, hashes=hashes)

    monkeypatch.setattr(command, "check", vanish)
    lines, error = run_command("verify", run)
    assert error is None and lines[1].endswith("removed meanwhile")


def test_what_saves_left_behind_is_named(run: Path, run_command: Run) -> None:
    folder = run / "checkpoints"
    for name in (".checkpoint-120.partial", ".checkpoint-20.replaced", ".checkpoint-1.removed", ".checkpoint-9.other"):
        (folder / name).mkdir()
    checkpoint(run, 5).rename(folder / ".checkpoint-5.replaced")
    lines, error = run_command("verify", run)
    assert error is None, "they are no checkpoints, and no resume takes them for any"
    notes = {Path(line.partition(": ")[0]).name: line for line in lines[3:]}
    assert set(notes) == {
        ".checkpoint-1.removed", ".checkpoint-120.partial", ".checkpoint-20.replaced", ".checkpoint-5.replaced",
    }  # fmt: skip
    assert "a save that did not finish" in notes[".checkpoint-120.partial"]
    assert "the next start restores it" in notes[".checkpoint-5.replaced"]
    assert "removes it" in notes[".checkpoint-20.replaced"]
    _, error = run_command("verify", folder / ".checkpoint-120.partial")
    assert error is not None and "no checkpoint: a save that did not finish" in error


def test_only_an_unfinished_save_is_no_checkpoint(tmp_path: Path, run_command: Run) -> None:
    (tmp_path / "checkpoints" / ".checkpoint-1.partial").mkdir(parents=True)
    lines, error = run_command("verify", tmp_path)
    assert ".checkpoint-1.partial" in lines[1]
    assert error is not None and "no complete checkpoint" in error


@pytest.mark.parametrize("name", ["checkpoint-7", "checkpoint-5", "", "../elsewhere"])
def test_latest_that_names_no_complete_checkpoint_is_a_problem(run: Path, run_command: Run, name: str) -> None:
    (run / "checkpoints" / LATEST).write_text(f"{name}\n")
    (checkpoint(run, 5) / MANIFEST).unlink()
    (run / "elsewhere").mkdir()
    (run / "elsewhere" / MANIFEST).write_text("{}")
    lines, error = run_command("verify", run)
    assert f"{run / 'checkpoints' / LATEST}: names {name!r}, which is no complete checkpoint" in "\n".join(lines)
    assert error is not None
    assert any("no complete checkpoint" in line for line in run_command("list", run)[0])


def test_a_stale_latest_alone_fails(run: Path, run_command: Run) -> None:
    (run / "checkpoints" / LATEST).write_text("checkpoint-7\n")
    lines, error = run_command("verify", run)
    assert error is not None and error.startswith(f"{run / 'checkpoints' / LATEST}: names 'checkpoint-7'")
    assert all(line.endswith("OK") for line in lines[1:4])


# --- list


def test_list_is_a_table(run: Path, run_command: Run) -> None:
    lines, error = run_command("list", run)
    assert error is None and len(lines) == 4
    assert [line.split()[1] for line in lines[1:]] == ["5", "20", "100"]
    assert [line.endswith("latest") for line in lines[1:]] == [False, True, False]
    assert "4 (data 2 x sequence 2)" in lines[1] and "shards" in lines[1]


def test_list_says_which_is_the_best(run: Path, run_command: Run) -> None:
    point(run / "checkpoints" / BEST, "checkpoint-5")
    lines, error = run_command("list", run)
    assert error is None and [line.split()[-1] for line in lines[1:3]] == ["best", "latest"]
    found = json.loads("\n".join(run_command("list", run, "--json")[0]))
    assert found["best"] == "checkpoint-5" and [row["best"] for row in found["checkpoints"]] == [True, False, False]
    lines, error = run_command("verify", run / "checkpoints" / BEST)
    assert error is None and len(lines) == 2 and lines[1].startswith("checkpoint-5 ")
    point(run / "checkpoints" / BEST, "checkpoint-7")
    lines, error = run_command("verify", run)
    assert error is not None and "best: names 'checkpoint-7', which is no complete checkpoint" in error


def test_list_as_json(run: Path, run_command: Run) -> None:
    (checkpoint(run, 5) / MANIFEST).write_text("")
    lines, error = run_command("list", run, "--json")
    assert error is None
    found = json.loads("\n".join(lines))
    assert found["latest"] == "checkpoint-20" and found["folder"] == str(run / "checkpoints")
    damaged, latest, last = found["checkpoints"]
    assert "damaged" in damaged["problem"]
    assert latest["latest"] and not last["latest"]
    assert {key: last[key] for key in (*FACTS, "step", "bytes", "files", "format", "problem")} == {
        **FACTS, "step": 100, "bytes": 5300, "files": 2, "format": "shards", "problem": None,
    }  # fmt: skip
    assert last["written"] > 10**18
    assert "damaged" in run_command("list", run)[0][1]


def test_list_of_one_checkpoint_has_no_latest(run: Path, run_command: Run) -> None:
    lines, error = run_command("list", checkpoint(run, 20))
    assert error is None and len(lines) == 2 and not lines[1].endswith("latest")


# --- convert


def test_convert_takes_the_newest_of_a_run(
    run: Path, run_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.checkpoint import universal

    asked = []

    def convert(source: Path, out: Path) -> None:
        asked.append(source)
        out.mkdir()
        (out / "x.bin").write_bytes(b"x" * 2048)
        write_whole(out, {"step": 20, **FACTS, "format": "universal"})

    monkeypatch.setattr(universal, "convert", convert)
    lines, error = run_command("convert", run, tmp_path / "out")
    assert error is None and asked == [checkpoint(run, 20)]
    assert "in the universal format" in lines[0] and str(tmp_path / "out") in lines[0]
    assert f"--resume {tmp_path / 'out'}" in lines[1]
    assert "universal" in run_command("list", tmp_path / "out")[0][1]
    assert run_command("verify", tmp_path / "out")[0][1].endswith("OK")
    run_command("convert", checkpoint(run, 5), tmp_path / "out2")
    assert asked[1:] == [checkpoint(run, 5)]


# --- the command line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "checkpoint needs one of verify, list, convert (got none)"),
        (["check"], "(got 'check')"),
        (["verify"], "needs the folder of a checkpoint"),
        (["verify", "absent"], "absent: no such folder"),
        (["verify", "{empty}"], "no checkpoint there"),
        (["verify", "{run}", "--fast"], "checkpoint verify has no --fast (see mnemos checkpoint verify --help)"),
        (["list", "{run}", "--quick"], "checkpoint list has no --quick"),
        (["list"], "takes one run directory or checkpoint, got 0"),
        (["convert", "{run}"], "needs CHECKPOINT and the new folder DIR"),
        (["convert", "{empty}", "out"], "no checkpoint there"),
    ],
)
def test_refusals(run: Path, tmp_path: Path, run_command: Run, words: list[str], part: str) -> None:
    (tmp_path / "empty").mkdir()
    lines, error = run_command(*(word.format(run=run, empty=tmp_path / "empty") for word in words))
    assert error is not None and part in error
    assert not lines


@pytest.mark.parametrize("words", [["-h"], ["verify", "--help"], ["list", "x", "-h"], ["convert", "--help"]])
def test_help(run_command: Run, words: list[str]) -> None:
    lines, error = run_command(*words)
    assert error is None and lines[0].startswith("usage: mnemos checkpoint")


def test_verify_needs_no_deepspeed(run: Path) -> None:
    script = (
        "import sys; from pipeline.commands.checkpoint import run_checkpoint;"
        f"run_checkpoint(['verify', {str(run)!r}]); run_checkpoint(['list', {str(run)!r}]);"
        "assert not {'deepspeed', 'transformers'} & set(sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
