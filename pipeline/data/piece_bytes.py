"""How many bytes of text each id of a tokenizer of the library `tokenizers` stands for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def piece_bytes(description: dict[str, Any], vocabulary: dict[str, int], size: int) -> Tensor | None:
    """Bytes per id from a tokenizer.json, [size], or None where the pieces do not give them."""
    normalizers = list(_components(description["normalizer"], "normalizers"))
    decoders = [part["type"] for part in _components(description["decoder"], "decoders")]
    added = {token["id"]: token for token in description["added_tokens"]}
    lengths = torch.zeros(size, dtype=torch.long)
    for token in added.values():
        if not token["special"]:
            lengths[token["id"]] = len(token["content"].encode())
    pieces = [(piece, i) for piece, i in vocabulary.items() if i not in added]
    if "ByteLevel" in decoders and all(part["type"] in ("NFC", "ByteLevel") for part in normalizers):
        alphabet = _byte_alphabet()
        if not all(alphabet.issuperset(piece) for piece, _ in pieces):
            return None
        for piece, i in pieces:
            lengths[i] = len(piece)
        return lengths
    if description["model"].get("byte_fallback") and all(_keeps_text(part) for part in normalizers):
        for piece, i in pieces:
            lengths[i] = 1 if _is_byte(piece) else len(piece.replace("▁", " ").encode())
        return lengths
    return None


def _components(part: dict[str, Any] | None, field: str) -> Iterable[dict[str, Any]]:
    """The members of a sequence, or the part itself."""
    if part is None:
        return []
    return part[field] if part["type"] == "Sequence" else [part]


def _keeps_text(normalizer: dict[str, Any]) -> bool:
    """Whether a normalizer only spells spaces as U+2581."""
    if normalizer["type"] == "Replace":
        return normalizer["pattern"] == {"String": " "} and normalizer["content"] == "▁"
    return normalizer["type"] == "Prepend" and normalizer["prepend"] == "▁"


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _byte_alphabet() -> set[str]:
    """The characters that byte-level BPE writes bytes with: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return {chr(code) for code in printable} | {chr(256 + i) for i in range(256 - len(printable))}
