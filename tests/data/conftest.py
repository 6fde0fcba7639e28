"""Corpora and tokenizers that the data tests share."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.sources.base import Document, Order, Place
from pipeline.data.sources.indexed import IndexedDocuments
from pipeline.data.sources.listing import list_files
from pipeline.data.sources.local import LocalFiles
from pipeline.errors import UserError

STDLIB_FILES = ("argparse.py", "ast.py", "enum.py")


def standard_library_text() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / name).read_text(encoding="utf-8") for name in STDLIB_FILES]


def local_files(paths: list[str], text_field: str = "text", *, skip: bool = False) -> LocalFiles:
    """The corpus that `--data.path` names."""
    return LocalFiles(list_files(paths), text_field=text_field, skip=skip)


class MemoryDocuments:
    """Every document, in natural order in every epoch."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def read(self, epoch: int, position: int) -> Document | None:
        return Document(f"document {position}", self.texts[position]) if position < len(self.texts) else None

    def count(self) -> int:
        return len(self.texts)

    def scan(self) -> Iterator[Document]:
        return (Document("", text) for text in self.texts)

    def hint(self, epoch: int, position: int) -> dict[str, Any] | None:
        return None

    def seek(self, places: dict[int, Place]) -> None:
        pass


class MemorySource:
    """Texts in memory. `whole`: no hold-out and no shuffling, so that a test knows the order."""

    groups: np.ndarray | None = None
    groups_per_shuffle = 1
    remedy = "give other texts"

    def __init__(self, texts: list[str], *, whole: bool = False) -> None:
        self.name, self.texts, self.whole = "memory", texts, whole

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Document:
        return Document(f"document {index}", self.texts[index])

    def parts(self) -> list[tuple[str, int]]:
        return [("memory", len(self.texts))]

    def open(self, order: Order) -> Any:
        return MemoryDocuments(self.texts) if self.whole else IndexedDocuments(self, order)

    def fingerprint(self) -> dict[str, Any]:
        return {"texts": len(self.texts)}

    def same_documents(self, saved: dict[str, Any]) -> bool:
        return saved == self.fingerprint()

    def same_numbering(self, saved: dict[str, Any]) -> bool:
        return False

    def describe(self) -> str:
        return self.name


@pytest.fixture
def refusal() -> Callable[..., str]:
    """Calls something that must end in a UserError of one line, and returns the line."""

    def call(function: Callable[..., Any], *args: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            function(*args, **options)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return call


@pytest.fixture
def json_shards(tmp_path: Path) -> list[str]:
    """Five JSON files of 60 documents in all."""
    files = []
    for shard in range(5):
        rows = [{"text": f"<{shard}.{row}> " + "x" * ((shard * 7 + row * 5) % 23)} for row in range(10 + shard)]
        path = tmp_path / f"shard{shard}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append(str(path))
    return files


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer as transformers saves it, with a special and an ordinary added token."""
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(standard_library_text(), trainer)
    tokenizer.add_tokens([AddedToken("        ", normalized=False)])
    folder = tmp_path_factory.mktemp("bpe")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def train_sentencepiece(folder: Path, name: str, **options: Any) -> Path:
    """A sentencepiece model of 400 pieces trained on part of the standard library."""
    import sentencepiece

    lines = [line for text in standard_library_text() for line in text.splitlines() if line.strip()]
    path = folder / f"{name}.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines[:2000]), model_writer=file, vocab_size=400, minloglevel=2, **options
        )
    return path


EXACT = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that keeps text exactly as it is."""
    folder = tmp_path_factory.mktemp("spm")
    return train_sentencepiece(folder, "exact", add_dummy_prefix=False, remove_extra_whitespaces=False, **EXACT)


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """Changes a file's content and neither its size nor its time."""
    before, content = path.stat(), path.read_bytes()
    assert content.count(old) >= 1 and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
