"""The bench of a decoding step: its figures agree, it refuses in one line, and on two threads it keeps to its goal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bench import decode
from pipeline.bench.decode import FLOOR, GOAL, Shape, parse_shape, step_error
from pipeline.cli import main
from tests.launch.harness import single

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_shape_and_backend_is_measured_beside_the_floor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "decode.json"
    words = ["--shapes", "1x2x32", "2x1x24", "--layers", "1", "3", "--repeats", "3", "--threads", "1"]
    assert main(["bench", "decode", *words, "--json", str(out)]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    measured = [(row["shape"], row["layers"], row["backend"]) for row in found["rows"]]
    assert measured == [
        (shape, layers, backend)
        for shape, backends in (("1x2x32", (FLOOR, "torch", "cpu")), ("2x1x24", (FLOOR, "torch")))
        for layers in (1, 3)
        for backend in backends
    ]
    (note,) = found["notes"]
    assert note.startswith("cpu at 2x1x24: q is float32") and "left out: cpu at 2x1x24" in text
    for row in found["rows"]:
        shape = parse_shape(row["shape"])
        assert row["bytes"] == 4 * 2 * 2 * shape.rows * shape.heads * shape.dim**2
        assert 0 < row["best"] <= row["low"] <= row["seconds"] <= row["high"] and row["samples"] == 3
        assert row["byte_s"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["goal"] == (GOAL if row["backend"] == "cpu" else None)
        if row["backend"] == FLOOR:
            assert row["floors"] == 1 and row["error"] is None
        else:
            assert row["floors"] > 0 and row["error"] < 1e-6
    assert found["machine"]["threads"] == 1 and "3 layers in turn" in text
    assert max(map(len, text.splitlines())) <= 100


@given(st.integers(1, 999), st.integers(1, 64), st.integers(1, 256))
def test_a_shape_is_read_as_it_is_written(rows: int, heads: int, dim: int) -> None:
    assert parse_shape(str(Shape(rows, heads, dim))) == Shape(rows, heads, dim)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_error_is_seen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(1, 2, 32)
    assert step_error(shape, torch.float32, CPU, backend) < 1e-6
    assert 1e-5 < step_error(shape, torch.bfloat16, CPU, backend) < 1e-2
    step = decode.memory_step

    def wrong(*arguments: Any, backend: str) -> torch.Tensor:
        y = step(*arguments, backend=backend)
        if arguments[0].dtype == torch.float32:
            arguments[-1][..., 0, 0] += 1.0
        return y

    monkeypatch.setattr(decode, "memory_step", wrong)
    assert step_error(shape, torch.float32, CPU, backend) > 1e-2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shapes", "16x128"), "--shapes has '16x128': write rows x heads x head dimension, as in 1x16x128"),
        (("--shapes", "1x0x64"), "--shapes has '1x0x64'"),
        (("--layers", "0"), "--layers is 0: give numbers above 0"),
        (("--dtype", "float16"), "--dtype is 'float16': one of float32, bfloat16"),
        (("--repeats", "0"), "--repeats is 0: give a number above 0"),
        (("--threads", "-1"), "--threads is -1: "),
        (("--json", "/nowhere/at/all.json"), "--json /nowhere/at/all.json: there is no folder /nowhere/at"),
        (("--colour", "blue"), "--colour"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_native_step_is_close_to_its_floor(tmp_path: Path, record_property: Any) -> None:
    """On two threads, 8 memories of 64 and 16 of 128: at most 3 times as long as to read and write M and S once."""
    out = tmp_path / "decode.json"
    done = single("pipeline", "bench", "decode", "--threads", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows = [row for row in json.loads(out.read_text())["rows"] if row["goal"] is not None]
    assert [row["shape"] for row in rows] == ["1x8x64", "1x16x128"]
    for row in rows:
        record_property(f"{row['shape']}, times the floor", f"{row['floors']:.2f} ({1e6 * row['seconds']:.0f} us)")
    assert [(row["shape"], row["floors"]) for row in rows if row["floors"] > row["goal"]] == []
