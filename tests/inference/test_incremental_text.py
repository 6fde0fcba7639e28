"""Pieces of text: together they are the whole, and none ends inside a character."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from pipeline.inference.incremental_text import UNKNOWN, IncrementalText
from tests.data.conftest import bpe_folder, sentencepiece_model  # noqa: F401 (fixtures)

any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\ufffd\0"), max_size=60)


@pytest.fixture(params=["bytes", "bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    fixture = {"bpe": "bpe_folder", "sentencepiece": "sentencepiece_model"}[request.param]
    path: Path = request.getfixturevalue(fixture)
    return load_tokenizer(str(path))


def test_the_pieces_of_any_text_are_the_text(tokenizer: Tokenizer) -> None:
    """Wherever the text that was read ends, and what is generated begins."""

    @settings(max_examples=60, derandomize=True)
    @given(any_text, st.integers(0, 60))
    def check(text: str, cut: int) -> None:
        ids = tokenizer.encode(text).tolist()
        while cut and tokenizer.decode(ids[:cut]).endswith(UNKNOWN):
            cut -= 1
        found = IncrementalText(tokenizer, ids[:cut])
        before, pieces = tokenizer.decode(ids[:cut]), [found.push(token) for token in ids[cut:]]
        assert not any(UNKNOWN in piece for piece in pieces)
        for end in range(len(pieces) + 1):
            assert text.startswith(before + "".join(pieces[:end]))
        assert before + "".join(pieces) + found.end() == text

    check()


def test_a_piece_comes_with_its_token() -> None:
    """Nothing complete is held back."""
    text, tokens = IncrementalText(ByteTokenizer()), "aé日\U0001f9e0b".encode()
    assert [text.push(token) for token in tokens] == ["a", "", "é", "", "", "日", "", "", "", "\U0001f9e0", "b"]
    assert text.end() == ""


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_are_shown_as_such(content: bytes) -> None:
    text = IncrementalText(ByteTokenizer())
    found = "".join([text.push(token) for token in content]) + text.end()
    assert found == content.decode(errors="replace")


@given(st.text("a\u00e9\u65e5\U0001f9e0", max_size=4), st.binary(max_size=4), st.text("\u00e9\U0001f9e0", max_size=4))
def test_what_no_token_completes_is_not_held_back(first: str, middle: bytes, last: str) -> None:
    content = first.encode() + middle + b"\xff" * 40 + last.encode()
    text = IncrementalText(ByteTokenizer())
    pieces = [text.push(token) for token in content]
    assert "".join(pieces) + text.end() == content.decode(errors="replace")
    waits = [index for index, piece in enumerate(pieces) if piece]
    assert all(later - earlier <= 16 for earlier, later in itertools.pairwise([0, *waits]))


def test_half_a_character_at_the_end_is_shown() -> None:
    text = IncrementalText(ByteTokenizer())
    assert [text.push(token) for token in "a\U0001f9e0".encode()[:3]] == ["a", "", ""]
    assert text.end() == UNKNOWN and text.end() == ""
