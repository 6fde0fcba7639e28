"""Tokenizers: round trips, byte counts, fingerprints, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from tests.data.conftest import EXACT, standard_library_text, train_sentencepiece

TEXTS = [
    "",
    "plain text",
    "  two  spaces, tab\t, lines\r\n\n        eight",
    "é ü 日本語 \U0001f9e0 \x00",
    "looks special: <|endoftext|> </s> <s> <unk>",
    standard_library_text()[2],
]
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)


@pytest.fixture(params=["bytes", "bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    fixture = {"bpe": "bpe_folder", "sentencepiece": "sentencepiece_model"}[request.param]
    return load_tokenizer(str(request.getfixturevalue(fixture)))


def check_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert not len(ids) or ids.max() < tokenizer.vocab_size
    lengths = tokenizer.byte_lengths()
    assert lengths is not None and lengths.shape == (tokenizer.vocab_size,)
    assert int(lengths[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_byte_counts(tokenizer: Tokenizer, text: str) -> None:
    check_text(tokenizer, text)


def test_any_text(tokenizer: Tokenizer) -> None:
    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(any_text)
    def check(text: str) -> None:
        check_text(tokenizer, text)

    check()


def test_eos_stands_for_no_bytes(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.byte_lengths()
    assert lengths is not None and lengths[tokenizer.eos_id] == 0
    assert tokenizer.decode([*tokenizer.encode("end"), tokenizer.eos_id]) == "end"


def test_bytes_are_ids() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("a\u00e9").tolist() == [97, 195, 169]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (260, 256)
    assert tokenizer.decode([0xFF, 97]) == "\ufffda"


def test_byte_counts_are_withheld_where_text_is_altered(tmp_path: Path, bpe_folder: Path) -> None:
    collapsing = train_sentencepiece(tmp_path, "collapsing", model_type="bpe", byte_fallback=True)
    lossy = train_sentencepiece(tmp_path, "lossy", model_type="unigram", normalization_rule_name="identity")
    assert load_tokenizer(str(collapsing)).byte_lengths() is None
    assert load_tokenizer(str(lossy)).byte_lengths() is None
    folder = edited_copy(bpe_folder, tmp_path / "lower", lambda rules: rules.update(normalizer={"type": "Lowercase"}))
    assert load_tokenizer(str(folder)).byte_lengths() is None


def test_a_space_before_the_document_counts_once(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(train_sentencepiece(tmp_path, "llama", remove_extra_whitespaces=False, **EXACT)))
    lengths = tokenizer.byte_lengths()
    assert lengths is not None
    assert int(lengths[tokenizer.encode("some  words\n")].sum()) == len(b" some  words\n")


def test_hugging_face_pieces_with_byte_fallback(tmp_path: Path) -> None:
    import transformers
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    backend = Backend(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "a"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    text = "ab é\na  b"
    ids, lengths = tokenizer.encode(text), tokenizer.byte_lengths()
    assert lengths is not None and int(lengths[ids].sum()) == len(text.encode()) + 1
    assert tokenizer.decode(ids) == text


def edited_copy(folder: Path, target: Path, edit: Callable[[dict], object]) -> Path:
    shutil.copytree(folder, target)
    rules = json.loads((target / "tokenizer.json").read_text())
    edit(rules)
    (target / "tokenizer.json").write_text(json.dumps(rules))
    return target


def test_fingerprint_tells_tokenizers_apart(bpe_folder: Path, sentencepiece_model: Path, tmp_path: Path) -> None:
    def reverse_merges(rules: dict) -> None:
        rules["model"]["merges"].reverse()

    same = shutil.copytree(bpe_folder, tmp_path / "same")
    other = edited_copy(bpe_folder, tmp_path / "other", reverse_merges)
    names = ["bytes", str(bpe_folder), str(other), str(sentencepiece_model)]
    prints = [load_tokenizer(name).fingerprint for name in names]
    assert len(set(prints)) == len(names)
    assert load_tokenizer(str(same)).fingerprint == prints[1]


def test_refusals(
    tmp_path: Path, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    import huggingface_hub.constants

    assert "no.model does not exist" in refusal(load_tokenizer, str(tmp_path / "no.model"))
    broken = tmp_path / "broken.model"
    broken.write_text("not a model")
    assert "broken.model is no sentencepiece model" in refusal(load_tokenizer, str(broken))
    assert "does not exist" in refusal(load_tokenizer, str(tmp_path / "nowhere"))
    assert "cannot be loaded" in refusal(load_tokenizer, str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "nobody/nothing cannot be loaded" in refusal(load_tokenizer, "nobody/nothing")
    without_eos = shutil.copytree(bpe_folder, tmp_path / "without")
    settings_file = without_eos / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(settings_file.read_text()).items() if key != "eos_token"}
    settings_file.write_text(json.dumps(kept))
    assert "has no end-of-document token" in refusal(load_tokenizer, str(without_eos))
