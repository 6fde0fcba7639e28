"""Tokenizers: raw bytes, Hugging Face, sentencepiece, behind one protocol."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data import remote_code
from pipeline.data.piece_bytes import piece_bytes
from pipeline.data.sources.content import hash_files
from pipeline.errors import UserError
from pipeline.files.given_path import expanded, is_path

_PROBE = (
    "The  quick\tbrown\n\n    fox_jumps(over=13.37) l'été, Straße, 日本語, Ελληνικά, \U0001f9e0 <|endoftext|> </s>\r\n"
)
"""Text whose ids stand for a tokenizer's rules in its fingerprint; the vocabulary stands for itself."""


class Tokenizer(Protocol):
    """Text to ids and back. No method adds special tokens, and text that looks like one is ordinary text."""

    name: str
    vocab_size: int
    """Ids are below this; a model may have more rows."""
    eos_id: int

    def encode(self, text: str) -> np.ndarray:
        """ids [tokens] int64."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, at the tokenizer's speed for many."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> str: ...

    def byte_lengths(self) -> Tensor | None:
        """UTF-8 bytes of text that each id stands for, [vocab_size] int64, specials 0; None where not known."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that give equal ids."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8 and 256 ends a document; 257 to 259 are spare and never produced."""

    name = "bytes"
    vocab_size = 260
    eos_id = 256
    fingerprint = "bytes/1"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> str:
        return bytes(i for i in _as_list(ids) if i < 256).decode(errors="replace")

    def byte_lengths(self) -> Tensor:
        return (torch.arange(self.vocab_size) < 256).long()


class HuggingFaceTokenizer:
    """A tokenizer of transformers, from a folder or the Hub (NAME or NAME@REVISION).

    Code that comes with it is run only where `trust_remote_code` says so, and then its own encoding is used.
    """

    def __init__(self, name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
        import transformers

        self.name = f"{name}@{revision}" if revision else name
        try:
            code = remote_code.references(name, revision)
        except Exception as error:  # every kind of broken folder, wrong name and dead network raises something else
            raise self._unusable(error) from error
        if code is not None:
            remote_code.check(name, self.name, code, trust_remote_code)
        # Before the code runs: what it leaves in its folder is not what was read.
        self._code = None if code is None else remote_code.identity(name, revision)
        try:
            with contextlib.nullcontext() if code is None else remote_code.one_at_a_time():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                    name, revision=revision, code_revision=revision, trust_remote_code=code is not None
                )
        except Exception as error:  # so does reading its files
            raise self._unusable(error) from error
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"--data.tokenizer {name} has no end-of-document token: set eos_token in its configuration")
        self.eos_id: int = self._tokenizer.eos_token_id
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self.vocab_size = max(self._vocabulary.values()) + 1
        # Code of its own may split text before the Rust tokenizer, or after it.
        self._backend = None if code is not None else _backend(self._tokenizer)
        if not len(self.encode(_PROBE)):
            # transformers makes an empty one of a folder that holds a model alone.
            raise UserError(
                f"--data.tokenizer {self.name} has no vocabulary: give a folder with the files of a tokenizer"
            )

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"--data.tokenizer {self.name} cannot be loaded ({_first_line(error)}): give `bytes`, a .model file, or the"
            " folder or Hub name of a tokenizer"
        )

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._backend is not None:
            found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.int64) for encoding in found]
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [np.array(self._tokenizer(text, **options)["input_ids"], np.int64) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> str:
        text = self._tokenizer.decode(_as_list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def byte_lengths(self) -> Tensor | None:
        """Known for byte-level BPE and for pieces with byte fallback.

        Where the tokenizer puts a space before a document, the first token counts it. Unicode normalisation to NFC is
        taken as lossless; any other normalisation hides how long the text was.
        """
        return self._byte_lengths

    @cached_property
    def _byte_lengths(self) -> Tensor | None:
        if self._backend is None:
            return None
        return piece_bytes(json.loads(self._backend.to_str()), self._vocabulary, self.vocab_size)

    @property
    def transformers_tokenizer(self) -> Any:
        """What transformers made of the files."""
        return self._tokenizer

    @cached_property
    def fingerprint(self) -> str:
        state = blake2b(digest_size=16)
        state.update(json.dumps(sorted(self._vocabulary.items())).encode())
        state.update(json.dumps([self.eos_id, self.encode(_PROBE).tolist()]).encode())
        # The probe cannot try every rule: merges, normalizers and files that Python code reads count by themselves.
        state.update(json.dumps([self._rules(), self._code], sort_keys=True).encode())
        return f"huggingface/{state.hexdigest()}"

    def _rules(self) -> Any:
        if self._backend is None:
            given = self._tokenizer.init_kwargs
            named = {key: given.get(key) for key in sorted(self._tokenizer.vocab_files_names)}
            files = [(key, Path(path)) for key, path in named.items() if isinstance(path, str) and Path(path).is_file()]
            return hash_files(files)
        description = json.loads(self._backend.to_str())
        return _given({key: description.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")})


def _given(part: Any) -> Any:
    """Without what is empty or off: a newer library that writes out one more default changes no rule."""
    if isinstance(part, dict):
        return {key: _given(value) for key, value in part.items() if value or type(value) in (int, float)}
    return [_given(value) for value in part] if isinstance(part, list) else part


def _backend(tokenizer: Any) -> Any:
    """A private copy of the Rust tokenizer: its settings stay as they are here, so threads may share it."""
    import tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


class SentencePieceTokenizer:
    """A sentencepiece .model file."""

    def __init__(self, path: str) -> None:
        import sentencepiece

        self.name = path
        if not Path(path).is_file():
            raise UserError(f"--data.tokenizer {path} does not exist: give the path of a sentencepiece .model file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise UserError(f"--data.tokenizer {path} is no sentencepiece model: {_first_line(error)}") from error
        self.vocab_size: int = self._model.vocab_size()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"--data.tokenizer {path} has no </s> piece to end documents with: train it with an eos_id")

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._model.encode(text), np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray | Tensor) -> str:
        return self._model.decode(_as_list(ids))

    def byte_lengths(self) -> Tensor | None:
        """Known for models with byte fallback that leave text as it is.

        A space that the model puts before a document counts once, and U+2581 in a text counts as the space it becomes.
        """
        model, ids = self._model, range(self.vocab_size)
        probe = (
            "\uff21 \ufb01\t \xe9  \n z"  # a full-width letter, a ligature and white space: what normalisation alters
        )
        altered = model.normalize(probe).lstrip("▁") != probe.replace(" ", "▁")
        if altered or not any(map(model.is_byte, ids)):
            return None
        lengths = torch.tensor([len(model.id_to_piece(i).replace("▁", " ").encode()) for i in ids])
        lengths[[i for i in ids if model.is_byte(i)]] = 1
        lengths[[i for i in ids if model.is_control(i) or model.is_unknown(i)]] = 0
        return lengths

    @property
    def serialized(self) -> bytes:
        """The content of the file."""
        return bytes(self._model.serialized_model_proto())

    @cached_property
    def fingerprint(self) -> str:
        return f"sentencepiece/{blake2b(self.serialized, digest_size=16).hexdigest()}"


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Tokenizer:
    """`bytes`, the path of a sentencepiece .model file, or a Hugging Face tokenizer: a folder, NAME or NAME@REVISION.

    With `trust_remote_code`, Python code that comes with a Hugging Face tokenizer is run: that of a folder, which
    counts in the fingerprint, or of a commit of the Hub.
    """
    if name == "bytes":
        return ByteTokenizer()
    path = expanded(name)
    if name.endswith(".model"):
        return SentencePieceTokenizer(str(path))
    if path.exists():
        return HuggingFaceTokenizer(str(path), trust_remote_code=trust_remote_code)
    repository, at, revision = name.partition("@")
    if is_path(name):
        raise UserError(f"--data.tokenizer {name} does not exist: give `bytes`, a .model file, a folder or a Hub name")
    if at and not revision:
        raise UserError(f"--data.tokenizer {name} names no revision: give a commit, tag or branch after the @")
    if trust_remote_code and not re.fullmatch("[0-9a-f]{40}", revision):
        raise UserError(
            f"--data.trust-remote-code runs code of --data.tokenizer {name}, which may change at any time: pin the"
            f" commit that you have read, as {repository}@ and its 40 hex digits"
        )
    return HuggingFaceTokenizer(repository, revision or None, trust_remote_code)


def _as_list(ids: Sequence[int] | np.ndarray | Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray | Tensor) else [int(i) for i in ids]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".:") if str(error).strip() else type(error).__name__
