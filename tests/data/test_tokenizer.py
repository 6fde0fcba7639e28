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

from pipeline.data.loader import PackedLoader
from pipeline.data.tokenizer import _PROBE, ByteTokenizer, Tokenizer, load_tokenizer
from tests.data.conftest import EXACT, MemorySource, rewrite, standard_library_text, train_sentencepiece

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


# --- code that comes with a tokenizer


CUSTOM = """\
from pathlib import Path

from transformers import PreTrainedTokenizerFast

Path({marker!r}).write_text("ran")


class Custom(PreTrainedTokenizerFast):
    def __call__(self, text, **options):
        return super().__call__(text.replace("x", "y"), **options)
"""


@pytest.fixture
def with_code(bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A tokenizer whose own code doubles as a trap: (its folder, the file that its code writes when it is imported)."""
    import transformers.dynamic_module_utils
    import transformers.utils.hub

    for module in (transformers.dynamic_module_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "marker"
    folder = shutil.copytree(bpe_folder, tmp_path / "custom")
    (folder / "custom.py").write_text(CUSTOM.format(marker=str(marker)))
    set_map(folder, "tokenizer_config.json", {"AutoTokenizer": [None, "custom.Custom"]})
    return folder, marker


def set_map(folder: Path, file: str, auto_map: object) -> None:
    path = folder / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, "auto_map": auto_map}))


@pytest.mark.parametrize("form", ["map", "list", "text"])
def test_code_does_not_run_without_leave(with_code: tuple[Path, Path], refusal: Callable[..., str], form: str) -> None:
    folder, marker = with_code
    pair = [None, "custom.Custom"]
    set_map(folder, "tokenizer_config.json", {"map": {"AutoTokenizer": pair}, "list": pair, "text": pair[1]}[form])
    # A class of transformers that could stand in for it would give other ids: that is no way out.
    message = refusal(load_tokenizer, str(folder))
    assert f"--data.tokenizer {folder} has Python code of its own" in message
    assert "--data.trust-remote-code" in message and "COMMIT" not in message
    assert not marker.exists()


def test_code_of_the_model_alone_is_not_needed(
    with_code: tuple[Path, Path], bpe_folder: Path, refusal: Callable[..., str]
) -> None:
    folder, marker = with_code
    set_map(folder, "tokenizer_config.json", {})
    set_map(folder, "config.json", {"AutoConfig": "custom.Config", "AutoModel": "custom.Model"})
    for trusted in (False, True):
        tokenizer = load_tokenizer(str(folder), trust_remote_code=trusted)
        assert tokenizer.encode("x y").tolist() == load_tokenizer(str(bpe_folder)).encode("x y").tolist()
    assert not marker.exists()


def test_code_of_a_folder_runs_with_leave(with_code: tuple[Path, Path], bpe_folder: Path) -> None:
    folder, marker = with_code
    tokenizer = load_tokenizer(str(folder), trust_remote_code=True)
    assert marker.exists()
    assert tokenizer.decode(tokenizer.encode("axa")) == "aya", "its own way to encode is used"
    assert tokenizer.byte_lengths() is None
    plain = load_tokenizer(str(bpe_folder))
    assert tokenizer.fingerprint != plain.fingerprint
    assert load_tokenizer(str(bpe_folder), trust_remote_code=True).fingerprint == plain.fingerprint
    assert load_tokenizer("bytes", trust_remote_code=True).fingerprint == "bytes/1"


def test_changed_code_changes_the_fingerprint(with_code: tuple[Path, Path]) -> None:
    folder, _ = with_code
    before = load_tokenizer(str(folder), trust_remote_code=True).fingerprint
    assert load_tokenizer(str(folder), trust_remote_code=True).fingerprint == before
    rewrite(folder / "custom.py", b'"y"', b'"z"')
    assert load_tokenizer(str(folder), trust_remote_code=True).fingerprint != before


def test_code_of_another_repository_is_refused(with_code: tuple[Path, Path], refusal: Callable[..., str]) -> None:
    folder, marker = with_code
    set_map(folder, "config.json", {"AutoConfig": "some/body--custom.Config"})
    assert "another repository, some/body" in refusal(load_tokenizer, str(folder), True)
    (folder / "config.json").unlink()
    set_map(folder, "tokenizer_config.json", {"AutoTokenizer": ["some/body--custom.Custom", None]})
    assert "another repository, some/body" in refusal(load_tokenizer, str(folder), True)
    assert not marker.exists()


def test_the_hub_is_asked_for_the_revision(
    bpe_folder: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    import transformers

    from pipeline.data import remote_code

    asked: list[dict[str, object]] = []
    found: list[str] | None = None
    made = transformers.AutoTokenizer.from_pretrained(bpe_folder)

    def from_pretrained(name: str, **options: object) -> object:
        asked.append({"name": name, **options})
        return made

    monkeypatch.setattr(remote_code, "references", lambda name, revision: found)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    commit = "0123456789abcdef" * 2 + "01234567"
    assert load_tokenizer("some/body@refs/pr/1").name == "some/body@refs/pr/1"
    load_tokenizer(f"some/body@{commit}", trust_remote_code=True)
    found = ["code.Tokenizer"]
    pinned = load_tokenizer(f"some/body@{commit}", trust_remote_code=True)
    assert pinned.fingerprint != load_tokenizer(f"some/body@{commit[::-1]}", trust_remote_code=True).fingerprint
    base = {"name": "some/body", "revision": commit, "code_revision": commit}
    assert asked[0] == {
        "name": "some/body", "revision": "refs/pr/1", "code_revision": "refs/pr/1", "trust_remote_code": False,
    }  # fmt: skip
    assert asked[1] == {**base, "trust_remote_code": False}, "no leave where there is no code"
    assert asked[2] == {**base, "trust_remote_code": True}
    assert "--data.trust-remote-code and NAME@COMMIT" in refusal(load_tokenizer, f"some/body@{commit}")
    for unpinned in ("some/body", "some/body@main", f"some/body@{commit[:12]}"):
        message = refusal(load_tokenizer, unpinned, True)
        assert message.startswith(f"--data.trust-remote-code runs code of --data.tokenizer {unpinned}")
        assert "some/body@ and its 40 hex digits" in message
    assert "names no revision" in refusal(load_tokenizer, "some/body@")
    assert len(asked) == 4


# --- a changed tokenizer is noticed by its content


def test_a_rule_that_the_probe_does_not_try_counts(bpe_folder: Path, tmp_path: Path) -> None:
    """The last two merges change places: the vocabulary stays, and so does what the probe gives."""
    folder = shutil.copytree(bpe_folder, tmp_path / "copy")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")))
    before = load_tokenizer(str(folder))
    one, other = (
        json.dumps(pair, separators=(",", ":")) for pair in json.loads(path.read_text())["model"]["merges"][-2:]
    )
    rewrite(path, f"{one},{other}".encode(), f"{other},{one}".encode())
    after = load_tokenizer(str(folder))
    assert after.encode(_PROBE).tolist() == before.encode(_PROBE).tolist()
    assert after.fingerprint != before.fingerprint


def test_a_changed_sentencepiece_model_counts(sentencepiece_model: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(sentencepiece_model, tmp_path / "copy.model"))
    before = load_tokenizer(str(path)).fingerprint
    rewrite(path, "▁self".encode(), "▁sell".encode())
    assert load_tokenizer(str(path)).fingerprint != before


def test_a_changed_tokenizer_is_noticed_at_a_resume(
    bpe_folder: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    folder = shutil.copytree(bpe_folder, tmp_path / "copy")

    def loader() -> PackedLoader:
        return PackedLoader(
            MemorySource(standard_library_text() * 10), load_tokenizer(str(folder)), sequence_length=16, batch_size=1,
            vocab_size=1000, holdout=0.2,
        )  # fmt: skip

    running = loader()
    running.next_step()
    state = running.state_dict()
    rewrite(folder / "tokenizer.json", b'"add_prefix_space": false', b'"add_prefix_space": true ')
    assert "--data.tokenizer does not give the data of the checkpoint" in refusal(loader().load_state_dict, state)
