"""What is written beside a token file: FILE.json, with its dtype, its counts, its tokenizer and its hash."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.tokens.files import DTYPES
from pipeline.errors import UserError, shown
from pipeline.files.json_file import read_json

FORMAT = "mnemos tokens 1"
FIX = "write the file again with `data prepare`, or remove the sidecar"


@dataclass(frozen=True)
class Span:
    """The documents of one source file, in the order of the token file."""

    source: str
    documents: int
    tokens: int
    """With an end-of-document id after each document."""


@dataclass(frozen=True)
class Sidecar:
    """Facts of one token file."""

    dtype: str
    tokens: int
    documents: int
    vocab_size: int
    eos_id: int
    tokenizer: str
    tokenizer_fingerprint: str
    sha256: str
    spans: tuple[Span, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    """What else decided the content, such as the text field."""

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}


def makers_of(sidecars: Iterable[Sidecar | None]) -> dict[str, str]:
    """The tokenizers that made files, by fingerprint, with the names that their sidecars give; "" stands for files
    without one."""
    return {
        "" if sidecar is None else sidecar.tokenizer_fingerprint: "" if sidecar is None else sidecar.tokenizer
        for sidecar in sidecars
    }


def sidecar_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of the token file `path`; None without one. Raises UserError for one that is damaged."""
    beside = sidecar_path(path)
    if not beside.is_file():
        return None
    return parse_sidecar(read_json(beside, FIX), str(beside))


def parse_sidecar(content: Any, name: str) -> Sidecar:
    """From the JSON of a sidecar called `name`. Raises UserError."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{name} is no sidecar of a token file (format {FORMAT!r} is missing): {FIX}")
    kinds: dict[str, type] = {
        "dtype": str, "tokens": int, "documents": int, "vocab_size": int, "eos_id": int, "tokenizer": str,
        "tokenizer_fingerprint": str, "sha256": str, "spans": list, "settings": dict,
    }  # fmt: skip
    for key, kind in kinds.items():
        if type(content.get(key)) is not kind:
            raise UserError(f"{name}: {key} is {shown(content.get(key))}, not {kind.__name__}: {FIX}")
    if content["dtype"] not in DTYPES:
        raise UserError(f"{name}: dtype is {shown(content['dtype'])}, not uint16 or uint32: {FIX}")
    spans = []
    for span in content["spans"]:
        try:
            spans.append(Span(str(span["source"]), int(span["documents"]), int(span["tokens"])))
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{name}: spans has {shown(span)}: {FIX}") from None
    return Sidecar(**{key: content[key] for key in kinds} | {"spans": tuple(spans)})
