"""JSON is read strictly: what a person or a crash made of a file is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError, brief
from pipeline.files.json_file import MAX_DEPTH, is_inside, parse_json, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=30)
@given(VALUES)
def test_what_json_writes_is_read_back(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=True).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is given twice: keep one"),
        (b"[NaN]", "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b'"\xff"', "byte 1 is not UTF-8"),
        (b"\0" * 512, "Expecting value"),
        (b"9" * 5000, "Exceeds the limit"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH} levels"),
        (b'{"a":' * 100_000, f"nested deeper than {MAX_DEPTH} levels"),
    ],
)
def test_what_is_wrong_is_said(text: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)
    path = tmp_path / "file.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=rf"{path}: not JSON \(.*\): correct it"):
        read_json(path, "correct it")


def test_nesting_that_no_reader_minds_is_allowed() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}: cannot be read \(Is a directory\): give a file"):
        read_json(tmp_path, "give a file")


@pytest.mark.parametrize("name", ["a", "a/b.pt", ".a", "a..b", "zero/layer.0/fp32.pt", "a//b"])
def test_names_in_a_folder(name: str) -> None:
    assert is_inside(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/../../b", "/a", "//a", "a\\b", "a\0", "a\nb", "\ud800", "a" * 256, "ä" * 128, "a/" * 501,
     None, 3, ["a"]],
    ids=lambda name: ascii(name)[:20],
)  # fmt: skip
def test_names_that_are_of_no_file_in_a_folder(name: object) -> None:
    assert not is_inside(name)


@given(st.text())
def test_what_is_quoted_from_a_file_is_one_short_line_that_can_be_printed(text: str) -> None:
    line = brief(text, limit=40)
    assert len(line) <= 40 and line.isprintable()
    line.encode()


def test_a_short_text_is_quoted_as_it_is() -> None:
    assert brief(ValueError("no such\nlayer")) == "no such layer"
    assert brief("naïve α \ud800\0") == "naïve α \\ud800\\x00"
    assert brief("a" * 500) == "a" * 157 + "..."
