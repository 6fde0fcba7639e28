"""Letters to ids and back, a whole set at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NO_LETTER = 255
"""The id of a byte that is none of the letters."""


def lengths_of(sequences: pa.StringArray) -> np.ndarray:
    """Bytes of each sequence [N] int32."""
    return pc.binary_length(sequences).to_numpy(zero_copy_only=False).astype(np.int32)


def encode(sequences: pa.StringArray, letters: str, longest: int) -> np.ndarray:
    """Ids of the residues [N, longest] uint8: 0 beyond a sequence's end, `NO_LETTER` for a byte that is none of
    `letters`. Sequences have at most `longest` bytes."""
    table = np.full(256, NO_LETTER, np.uint8)
    table[np.frombuffer(letters.encode(), np.uint8)] = np.arange(len(letters), dtype=np.uint8)
    offsets = np.frombuffer(sequences.buffers()[1], np.int32)[sequences.offset : sequences.offset + len(sequences) + 1]
    text = np.frombuffer(sequences.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    within = np.arange(longest) < np.diff(offsets)[:, None]
    ids = np.zeros(within.shape, np.uint8)
    ids[within] = table[text]
    return ids


def decode(ids: np.ndarray, lengths: np.ndarray, letters: str) -> list[str]:
    """The sequences of ids [N, L] with lengths [N]."""
    table = np.frombuffer(letters.encode(), np.uint8)
    rows = table[ids].astype(np.uint8)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class Words:
    """Sequences as text, and as bytes [N, L] uint8 with their lengths [N] int32."""

    texts: list[str]
    letters: np.ndarray
    lengths: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Words:
        """Those at the indices `chosen` [n]."""
        return Words([self.texts[place] for place in chosen.tolist()], self.letters[chosen], self.lengths[chosen])


def words_of(sequences: pa.StringArray) -> Words:
    lengths = lengths_of(sequences)
    every = "".join(map(chr, range(128)))
    return Words(sequences.to_pylist(), encode(sequences, every, int(lengths.max(initial=1))), lengths)
