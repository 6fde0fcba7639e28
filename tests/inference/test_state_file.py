"""State files: what was read goes on as if nothing had been saved, and belongs to one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from pipeline.inference import Texts, generate, load, load_state, read, save_state, state_file
from pipeline.inference.identity import model_hash
from tests.inference.checkpoints import checkpoint, miras, olmo
from tests.lm.families import decoder

BYTES = ByteTokenizer()
KINDS = {"olmo": olmo(), "titans": miras(), "moneta with mac": miras(rule="moneta", attachment="mac", context=32)}


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = tmp_path_factory.mktemp("run") / "checkpoint-5"
    checkpoint(folder, KINDS[request.param])
    return load(folder).model


@pytest.fixture(scope="module")
def small() -> Any:
    """Any vocabulary of transformers."""
    return decoder("olmo2").eval()


@pytest.fixture
def saved(small: Any, tmp_path: Path) -> Path:
    save_state(small, read(small, _Letters(), "some text"), tmp_path / "file")
    return tmp_path / "file"


class _Letters(ByteTokenizer):
    """Bytes into the 64 ids of `small`."""

    def encode(self, text: str) -> Any:
        return super().encode(text) % 64


def same(one: Texts, other: Texts) -> bool:
    pairs = zip(one.state.tensors().items(), other.state.tensors().items(), strict=True)
    tensors = all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    return tensors and torch.equal(one.logits, other.logits) and torch.equal(one.last, other.last)


def test_a_saved_text_goes_on_as_if_it_had_not_been_saved(model: nn.Module, tmp_path: Path) -> None:
    """Of a decoder with a cache and of one with memory; rows of different lengths, also read on from."""
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 3}
    book = read(model, BYTES, ["A book that is longer than its window. " * 1, "An essay."])
    save_state(model, book, tmp_path / "book")
    found = load_state(model, tmp_path / "book")
    assert same(found, book) and found.lengths == [39, 9]
    for prompts in (["Who?", "What did it say?"], None):
        wanted = generate(model, BYTES, prompts, state=book, **options)
        assert generate(model, BYTES, prompts, state=found, **options) == wanted
    # Whoever goes on from it leaves it alone.
    assert same(found, load_state(model, tmp_path / "book")) and same(book, found)
    assert [path.name for path in tmp_path.iterdir()] == ["book"]


def test_the_file_holds_no_more_than_the_state(small: Any, tmp_path: Path) -> None:
    """The cache has room for more tokens, which is not saved."""
    texts = read(small, _Letters(), "a" * 50)
    save_state(small, texts, tmp_path / "file")
    numbers = sum(tensor.numel() * tensor.element_size() for tensor in texts.state.tensors().values())
    assert (tmp_path / "file").stat().st_size < numbers + 4096


def test_the_hash_is_of_weights_and_config_and_not_of_their_place(tmp_path: Path) -> None:
    one, other = decoder("olmo2"), decoder("olmo2")
    one.save_pretrained(tmp_path / "one")
    assert model_hash(one) == model_hash(other) == model_hash(load(tmp_path / "one", tokenizer="bytes").model)
    hashes = {model_hash(one), model_hash(decoder("olmo2").to(torch.bfloat16))}
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    hashes.add(model_hash(other))
    one.config.rope_parameters["rope_theta"] = 77.0
    hashes.add(model_hash(one))
    assert len(hashes) == 4


def test_the_hash_of_a_system_is_of_what_it_computes(tmp_path: Path) -> None:
    found = []
    for number, config in enumerate((miras(), miras(), miras(backend="torch", chunk=32), miras(key_activation="none"))):
        folder = tmp_path / str(number)
        checkpoint(folder, config)
        found.append(model_hash(load(folder).model))
    assert found[0] == found[1] == found[2] != found[3]


def test_the_state_of_another_model_is_refused(small: Any, saved: Path) -> None:
    with pytest.raises(UserError, match="file is the state of another model, or of this one with other weights"):
        load_state(decoder("olmo"), saved)
    with pytest.raises(UserError, match="or in another precision: give its model"):
        load_state(decoder("olmo2").double().eval(), saved)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"version": "2"}, "is a state file of version '2', here they are of 1: read the text again"),
        ({"format": "pt"}, "is no state file"),
        ({"model": "0"}, "is the state of another model"),
    ],
)
def test_a_file_of_another_version_is_refused(change: dict[str, str], words: str, small: Any, saved: Path) -> None:
    facts = {"format": state_file.FORMAT, "version": state_file.VERSION, "model": model_hash(small)}
    save_file(load_file(saved), saved, {**facts, **change})
    with pytest.raises(UserError, match=words):
        load_state(small, saved)


@pytest.mark.parametrize(
    "name, value",
    [
        ("logits", None),
        ("logits", torch.zeros(2, 64)),
        ("last", torch.zeros(1, 8)),
        ("state.lengths", None),
        ("state.layers.0.keys", torch.zeros(1, 2, 9, 8, dtype=torch.float64)),
    ],
)
def test_a_file_that_was_changed_is_refused(name: str, value: torch.Tensor | None, small: Any, saved: Path) -> None:
    facts = {"format": state_file.FORMAT, "version": state_file.VERSION, "model": model_hash(small)}
    tensors = {name: tensor for name, tensor in {**load_file(saved), name: value}.items() if tensor is not None}
    save_file(tensors, saved, {**facts, "content": state_file._hash(tensors)})
    with pytest.raises(UserError, match="it is damaged, or of another version: read the text again") as error:
        load_state(small, saved)
    assert "\n" not in str(error.value)


def test_damage_is_seen_wherever_it_is(small: Any, saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    for place in (len(content) - 1, len(content) // 2):
        changed = content.copy()
        changed[place] ^= 1
        saved.write_bytes(changed)
        with pytest.raises(UserError, match="file: content differs from its hash: it is damaged"):
            load_state(small, saved)


def test_of_a_link_what_it_names_is_written(small: Any, saved: Path) -> None:
    link = saved.with_name("link")
    link.symlink_to(saved)
    save_state(small, read(small, _Letters(), "other text"), link)
    assert link.is_symlink() and load_state(small, saved).lengths == [10]


def test_a_file_that_is_cut_short_or_missing_is_refused(small: Any, saved: Path, tmp_path: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-5])
    with pytest.raises(UserError, match="file is no state file: give one that --save-state wrote"):
        load_state(small, saved)
    with pytest.raises(UserError, match="absent: no such file"):
        load_state(small, tmp_path / "absent")


def test_a_file_of_something_else_is_not_written_over(small: Any, saved: Path, tmp_path: Path) -> None:
    texts = read(small, _Letters(), "other text")
    save_state(small, texts, saved)
    assert same(load_state(small, saved), texts)
    (tmp_path / "book.txt").write_text("a book")
    for place, words in {"book.txt": "is no state file", "no/file": "there is no folder", ".": "is a folder"}.items():
        with pytest.raises(UserError, match=words):
            save_state(small, texts, tmp_path / place)
    assert (tmp_path / "book.txt").read_text() == "a book"


def test_a_file_that_cannot_be_written_leaves_the_one_before(
    small: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(tensors: Any, path: Path, facts: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_file, "save_file", fail)
    with pytest.raises(UserError, match=r"file: not written .No space left on device.: make room there"):
        save_state(small, read(small, _Letters(), "other text"), saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]
