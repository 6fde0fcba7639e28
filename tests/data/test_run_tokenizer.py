"""The tokenizer of a run: what made its token files, wherever it is now."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.run_tokenizer import UnknownTokenizerError, run_tokenizer
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data_config import DataConfig
from pipeline.errors import UserError


def named(tokenizer: str, makers: dict[str, str], vocab_size: int = 640, *, tokens: bool = True, **options) -> str:
    data = DataConfig(tokens=("a.npy",) if tokens else (), tokenizer=tokenizer)
    return run_tokenizer(data, vocab_size, makers, **options).name


def test_documents_are_read_by_the_tokenizer_of_the_flag() -> None:
    assert named("bytes", {}, 50_304, tokens=False) == "bytes"


def test_what_made_the_files_is_found_by_either_name(bpe_folder: Path) -> None:
    bpe, mark = str(bpe_folder), load_tokenizer(str(bpe_folder)).fingerprint
    for configured, made_by in (("bytes", bpe), (bpe, "gone/away"), (bpe, bpe), ("./nowhere", bpe), (bpe, "~nobody/x")):
        assert named(configured, {mark: made_by}) == bpe
        assert named(configured, {mark: made_by}, download=False) == bpe


def test_what_is_not_known_is_said_with_a_fix(bpe_folder: Path) -> None:
    bpe = str(bpe_folder)
    made = load_tokenizer(bpe).fingerprint
    for configured, makers, said in (
        (
            "bytes",
            {},
            "nothing says which tokenizer made the token files: --data.tokenizer is `bytes`, of 260 ids, and",
        ),
        ("bytes", {"": ""}, "the model has 640: "),
        ("bytes", {made: "./gone"}, "the tokenizer of the token files, ./gone, cannot be loaded"),
        ("bytes", {"huggingface/0": bpe}, f"the tokenizer of the token files, {bpe}, is another one now"),
        ("bytes", {made: bpe, "": ""}, f"made with several tokenizers ({bpe}, one without a sidecar)"),
        ("bytes", {made: bpe, "bytes/1": "bytes"}, "several tokenizers"),
    ):
        with pytest.raises(UnknownTokenizerError) as error:
            named(configured, makers, fix="do this")
        assert said in str(error.value) and str(error.value).endswith(": do this") and "\n" not in str(error.value)
    with pytest.raises(UnknownTokenizerError, match=r"allenai/x is not here: name it with --data\.tokenizer"):
        named("allenai/x", {}, download=False)
    with pytest.raises(UnknownTokenizerError, match="the tokenizer of the token files, allenai/x, is not here"):
        named("bytes", {made: "allenai/x"}, download=False)


def test_a_tokenizer_that_is_named_decides_where_files_say_several(bpe_folder: Path) -> None:
    bpe = str(bpe_folder)
    made = load_tokenizer(bpe).fingerprint
    for makers in ({made: bpe, "": ""}, {made: bpe, "bytes/1": "bytes"}, {"huggingface/0": bpe, made: bpe}):
        assert named(bpe, makers) == named(bpe, makers, download=False) == named("bytes", makers, given=bpe) == bpe
        assert named(bpe, makers, given="bytes") == "bytes"
    assert named("bytes", {"": ""}, given="bytes") == named("bytes", {}, given="bytes") == "bytes", "no default here"
    with pytest.raises(UnknownTokenizerError, match="allenai/x is not here"):
        named("allenai/x", {made: bpe, "": ""}, download=False)


def test_a_given_tokenizer_is_the_one_that_made_the_files(bpe_folder: Path) -> None:
    bpe = str(bpe_folder)
    made = load_tokenizer(bpe).fingerprint
    assert named("bytes", {made: "gone/away"}, given=bpe) == bpe
    with pytest.raises(UserError, match=f"made with the tokenizer {bpe}, and bytes is another one: name that one"):
        named(bpe, {made: bpe}, given="bytes")
    with pytest.raises(UserError, match=r"\./nowhere does not exist"):
        named(bpe, {made: bpe}, given="./nowhere")


def test_bytes_fit_a_model_of_bytes() -> None:
    assert named("bytes", {}, 260) == named("bytes", {"bytes/1": "bytes"}, 50_304) == "bytes"
