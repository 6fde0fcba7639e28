"""Documents cut to rows: their beginnings, and pieces where there are too few of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.packing import DocumentEncoder
from pipeline.data.sources.base import Document
from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from pipeline.systems.cvfp.data.texts import Cut, read_cut
from tests.data.conftest import MemoryDocuments, MemorySource

LENGTH = 4


def read(texts: list[str], wanted: int | None = None, *, min_tokens: int = 0) -> Cut:
    encode = DocumentEncoder(ByteTokenizer(), min_tokens=min_tokens, vocab_size=260)
    return read_cut(MemorySource(texts), encode, LENGTH, wanted, skip=False)


def as_text(cut: Cut) -> list[str]:
    return [bytes(row.tolist()).decode() for row in cut.rows]


def test_documents_are_cut_to_their_beginnings() -> None:
    cut = read(["abcdefgh", "ij", "klmno"])
    assert as_text(cut) == ["abcd", "ij", "klmn"] and cut.owners == [0, 1, 2]
    assert cut.notes == ["2 documents cut to their first 4 tokens"]
    assert cut.rows[0].dtype == np.uint32
    assert as_text(read(["abcdefgh", "ij", "klmno"], 2)) == ["abcd", "ij"], "the first ones"


def test_of_too_few_documents_there_are_pieces() -> None:
    texts = ["abcdefghijkl", "mn", "opqrstu"]
    cut = read(texts, 5)
    assert as_text(cut) == ["abcd", "efgh", "mn", "opqr", "stu"] and cut.owners == [0, 0, 1, 2, 2]
    assert cut.notes == ["3 documents, of 5 that were asked for, in 5 pieces of up to 4 tokens"]
    more = read(texts, 50)
    assert as_text(more) == ["abcd", "efgh", "ijkl", "mn", "opqr", "stu"]
    assert more.notes[-1] == "6 rows of 50 that were asked for: the source holds no more"


def test_a_single_document_is_all_pieces() -> None:
    assert as_text(read(["abcdefghi"])) == ["abcd", "efgh"], "a rest of one token is no row"
    assert as_text(read(["abcdefghij"], 2)) == ["abcd", "efgh"]


@given(st.lists(st.text("ab", min_size=2, max_size=19), min_size=1, max_size=8), st.none() | st.integers(1, 30))
def test_rows_are_those_of_the_rule(texts: list[str], wanted: int | None) -> None:
    found = [text.encode() for text in texts][:wanted]
    pieces = [
        (owner, text[start : start + LENGTH])
        for start in range(0, 20, LENGTH)
        for owner, text in enumerate(found)
        if len(text[start:]) >= 2
    ]
    if len(found) > 1 and (wanted is None or len(found) == wanted):
        pieces = [(owner, text[:LENGTH]) for owner, text in enumerate(found)]
    cut = read(texts, wanted)
    rows = list(zip(cut.owners, (row.astype(np.uint8).tobytes() for row in cut.rows), strict=True))
    assert sorted(rows) == sorted(pieces[:wanted])
    assert cut.owners == sorted(cut.owners)


def test_short_documents() -> None:
    blank = read(["", " \n", "abc", "de"])
    assert as_text(blank) == ["abc", "de"] and blank.notes == ["2 empty or short documents left out"]
    with pytest.raises(UserError, match=r"has 1 token, and a row needs 2.*--data.min-tokens 2"):
        read(["abc", "d", "ef"])
    assert as_text(read(["abc", "d", "ef"], min_tokens=2)) == ["abc", "ef"]
    assert as_text(read(["", "abc", "d", "ef"], 2, min_tokens=2)) == ["abc", "ef"], "what is left out does not count"


def test_records_that_cannot_be_read() -> None:
    class Broken(MemorySource):
        def open(self, order: object) -> MemoryDocuments:
            found = MemoryDocuments(self.texts)
            documents = [Document("a", "abc"), Document("b", "", "b:1 is not JSON"), Document("c", "def")]
            found.scan = lambda: iter(documents)  # type: ignore[method-assign]
            return found

    encode = DocumentEncoder(ByteTokenizer(), min_tokens=0, vocab_size=260)
    with pytest.raises(UserError, match="b:1 is not JSON"):
        read_cut(Broken([]), encode, LENGTH, None, skip=False)
    cut = read_cut(Broken([]), encode, LENGTH, None, skip=True)
    assert as_text(cut) == ["abc", "def"] and cut.notes == ["1 records passed over"]
