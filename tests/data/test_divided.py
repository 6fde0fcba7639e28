"""A corpus of one document: its end is held out, and the streams share the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loader import PackedLoader
from pipeline.data.sources.base import Order
from pipeline.data.sources.divided import DividedText, WholeText
from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from tests.data.conftest import local_files
from tests.data.test_loader import step
from tests.data.test_sources import order


def parts(data: bytes, **options: object) -> list[str]:
    return [document.text for document in DividedText(WholeText("x", data, False), order(**options)).scan()]


def test_the_held_out_end_begins_at_a_line(tmp_path: Path) -> None:
    data = b"".join(b"line %03d\n" % number for number in range(100))  # 9 bytes each
    (held,) = parts(data, holdout=0.1, held_out=True)
    (training,) = parts(data, holdout=0.1)
    assert held == "".join(f"line {number:03}\n" for number in range(90, 100))
    (held,) = parts(data, holdout=0.105, held_out=True)
    assert held.startswith("line 090"), "the first line that begins in the last 10.5 %"
    assert (training + parts(data, holdout=0.1, held_out=True)[0]).encode() == data


def test_without_lines_it_begins_at_a_character() -> None:
    data = ("é" * 50).encode()
    (held,) = parts(data, holdout=0.05, held_out=True)
    assert held == "é" * 2, "byte 95 is the second one of a character"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("ab\n\U0001f9e0é"), min_size=2), st.integers(1, 9), st.floats(0.01, 0.99))
def test_the_parts_are_the_text(text: str, streams: int, holdout: float) -> None:
    data = text.encode()
    start = max(int(len(data) * (1 - holdout)), 1)
    last_character = len(data) - len(text[-1].encode())
    if start > last_character and b"\n" not in data[start - 1 : -1]:
        with pytest.raises(UserError, match="cannot be divided"):  # what is held out is less than a character
            parts(data, streams=streams, holdout=holdout)
        return
    sides = [parts(data, streams=streams, holdout=holdout, held_out=held_out) for held_out in (False, True)]
    assert all(len(side) == streams for side in sides)
    training, held = ("".join(side) for side in sides)
    assert training + held == text and training and held
    if b"\n" in data[start - 1 : -1]:
        assert training.endswith("\n") and len(training.encode()) >= start


def test_every_stream_reads_its_own_part_and_all_of_them_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "enwik8"
    text = "".join(f"<{number:05}>\n" for number in range(4000))
    (path.with_suffix(".txt")).write_text(text)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for given_path in (path.with_suffix(".txt"), tmp_path / "rows.jsonl"):
        source = local_files([str(given_path)])

        def loader(**options: object) -> PackedLoader:
            plain = {"sequence_length": 128, "batch_size": 4, "vocab_size": 257}
            return PackedLoader(source, ByteTokenizer(), **{**plain, **options})  # type: ignore[arg-type] # noqa: B023

        training = loader()
        first = training.next_step()[0].input_ids
        assert len({tuple(row.tolist()) for row in first}) == 4
        length = int(32_000 * 0.98)
        steps = length // 4 // 128 + 2
        seen = [bytes(int(token) for token in row[:8]) for row in first]
        starts = {int(token[1:6]) for token in seen}
        assert starts == {0, 980, 1960, 2940}
        for _ in range(steps):
            batch = training.next_step()[0]
        assert set(training.state_dict()["streams"]["0"]) >= {"epoch"}
        assert all(cursor["epoch"] == 1 for cursor in training.state_dict()["streams"].values())
        assert len({tuple(row.tolist()) for row in batch.input_ids}) == 4
        held = loader(held_out=True, batch_size=1).next_step()[0].input_ids
        assert bytes(int(token) for token in held[0][:8]) == b"<03920>\n"
        state = training.state_dict()
        resumed = loader()
        resumed.load_state_dict(state)
        assert torch.equal(step([training]), step([resumed]))


def test_what_is_too_small_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "x.txt").write_text("a")
    source = local_files([str(tmp_path)])
    choice = Order(1, range(1), held_out=False, holdout=0.02, shuffle=True, seed=0)
    message = refusal(source.open, choice)
    assert f"{tmp_path / 'x.txt'} is the only document, and its 1 bytes cannot be divided" in message


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_a_single_broken_document_is_named(
    tmp_path: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    monkeypatch.setattr("pipeline.data.sources.compressed.CHUNK", 500)
    path = tmp_path / f"x.txt.{codec}"
    with pyarrow.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[codec]) as file:
        file.write(b"".join(b"%d\n" % number**3 for number in range(40_000)))
    path.write_bytes(path.read_bytes()[:-9])
    source = local_files([str(path)])
    choice = Order(1, range(1), held_out=False, holdout=0.02, shuffle=True, seed=0)
    assert f"{path} is damaged or cut short (Truncated compressed stream)" in refusal(source.open, choice)
