"""Tokenizer files give transformers the ids that training read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pipeline.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.export.gate import TEXTS
from pipeline.export.tokenizer_files import write_tokenizer

TRAINED: dict[str, dict[str, Any]] = {
    # As that of Llama.
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False, "split_digits": True},
    "bpe, normalised": {"model_type": "bpe"},
    "bpe, no prefix": {"model_type": "bpe", "add_dummy_prefix": False, "byte_fallback": True},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
}  # fmt: skip
WORDS = st.lists(
    st.sampled_from([*"abcdeinorst  \n\t()_=.:0127éßﬁＡ日\u00a0\u200b▁", "the ", "def ", "self", "  ", "\U0001f9e0"]),
    max_size=30,
).map("".join)
SPECIAL = ["</s>", "<s>x</s>", "<unk>", "<0x0A>", "<|endoftext|>"]
"""Text that spells what is no text."""


def written(tokenizer: Tokenizer, folder: Path) -> Any:
    write_tokenizer(tokenizer, folder, 128)
    return AutoTokenizer.from_pretrained(folder)


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def trained(folder: Path, name: str, **options: Any) -> SentencePieceTokenizer:
    texts = [line for path in Path(__file__).parent.glob("*.py") for line in path.read_text().splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / name), vocab_size=400, minloglevel=2,
        character_coverage=0.99, hard_vocab_limit=False, **options,
    )  # fmt: skip
    return SentencePieceTokenizer(str(folder / f"{name}.model"))


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return written(ByteTokenizer(), tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module", params=TRAINED)
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    folder = tmp_path_factory.mktemp("pieces")
    own = trained(folder, "own", **TRAINED[request.param])
    return request.param, own, written(own, folder / "written")


@given(st.text())
def test_the_id_of_a_byte_is_the_byte(of_bytes: Any, text: str) -> None:
    try:
        expected = ByteTokenizer().encode(text).tolist()
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return
    assert ids(of_bytes, text) == expected
    assert of_bytes.decode(expected, skip_special_tokens=True) == text


@given(st.lists(st.integers(0, 259), max_size=40))
def test_any_bytes_are_the_same_text(of_bytes: Any, row: list[int]) -> None:
    assert of_bytes.decode(row, skip_special_tokens=True) == ByteTokenizer().decode(row)


def test_text_that_spells_a_special_token_is_text(of_bytes: Any) -> None:
    for text in (*SPECIAL, *TEXTS):
        assert ids(of_bytes, text) == ByteTokenizer().encode(text).tolist()
    assert of_bytes.eos_token_id == ByteTokenizer.eos_id


@given(WORDS)
def test_pieces_are_those_of_sentencepiece(pieces: tuple[str, Any, Any], text: str) -> None:
    _, own, found = pieces
    assert ids(found, text) == own.encode(text).tolist()
    assert found.decode(own.encode(text), skip_special_tokens=True) == own.decode(own.encode(text))


def test_special_pieces_of_bpe_are_text_when_they_are_spelt(pieces: tuple[str, Any, Any]) -> None:
    kind, own, found = pieces
    assert found.eos_token_id == own.eos_id
    assert found.decode([own.eos_id], skip_special_tokens=True) == ""
    for text in TEXTS if kind == "unigram" else (*TEXTS, *SPECIAL):
        assert ids(found, text) == own.encode(text).tolist()


def test_a_tokenizer_of_transformers_is_copied(of_bytes: Any, tmp_path: Path) -> None:
    of_bytes.save_pretrained(tmp_path / "one")
    one = load_tokenizer(str(tmp_path / "one"))
    write_tokenizer(one, tmp_path / "other", 128)
    assert load_tokenizer(str(tmp_path / "other")).fingerprint == one.fingerprint
    assert str(tmp_path) not in (tmp_path / "other" / "tokenizer_config.json").read_text()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"user_defined_symbols": ["<sep>"], "model_type": "bpe"}, "user-defined pieces"),
        ({"model_type": "char"}, "neither BPE nor unigram"),
        ({"treat_whitespace_as_suffix": True}, "neither BPE nor unigram"),
    ],
)
def test_models_that_transformers_has_no_parts_for_are_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=f"{said}.*--no-tokenizer"):
        write_tokenizer(trained(tmp_path, "own", **options), tmp_path, 128)
