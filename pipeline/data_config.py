"""The data section of RunConfig: which documents are read and how, or which task stands in their place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from pipeline.errors import UserError, shown
from pipeline.units import LARGEST


def _before(name: str) -> Any:
    """The flag of a field of the recall task from before the task was data."""
    return tyro.conf.arg(aliases=[f"--model.recall.{name}"])


@dataclass(frozen=True)
class RecallConfig:
    """The recall task.

    A sequence is one document: `pairs` x (key, value), a separator, then filler among which stand the queries, a key of
    the start each, followed by its value. Ids: 0 separates, then come keys, values and fillers.
    """

    keys: Annotated[int, _before("keys")] = 64
    """Different keys; those of one sequence are distinct."""
    values: Annotated[int, _before("values")] = 64
    """Different values."""
    fillers: Annotated[int, _before("fillers")] = 64
    """Different filler tokens."""
    pairs: Annotated[int, _before("pairs")] = 8
    """Pairs stored in a sequence."""
    queries: Annotated[int, _before("queries")] = 8
    """Pairs asked for in a sequence, each at most once."""
    min_gap: Annotated[int, _before("min-gap")] = 64
    """Least distance, in tokens, from a value to the query for it; above the attention window only a memory answers."""
    max_gap: Annotated[int, _before("max-gap")] = 240
    """Largest distance from a value to the query for it."""
    spread: Literal["uniform", "log"] = "uniform"
    """uniform: a sequence is a document, with distances drawn evenly. log: a document goes on over as many sequences as
    it takes, through the carry; its largest distance, and those of its queries, are drawn on a log scale."""

    def __post_init__(self) -> None:
        for flag in ("keys", "values", "fillers", "pairs", "queries", "min_gap"):
            if getattr(self, flag) < 1:
                raise UserError(f"recall {flag} is {getattr(self, flag)}: give 1 or more")
        for flag in ("keys", "values", "fillers", "max_gap"):
            if getattr(self, flag) > LARGEST:
                raise UserError(f"recall {flag} is {shown(getattr(self, flag))}: give at most {LARGEST}")
        if self.keys < self.pairs:
            raise UserError(f"recall has {self.keys} keys for {self.pairs} pairs: give at least a key per pair")
        if self.queries > self.pairs:
            raise UserError(f"recall has {self.queries} queries for {self.pairs} pairs: give at most a query per pair")
        if len(self.query_slots(0)) < self.queries:
            raise UserError(
                f"recall has no room for {self.queries} queries on {self.pairs} pairs from min_gap {self.min_gap} to"
                f" max_gap {self.max_gap}: raise max_gap to {self.least_gap} or more"
            )

    @property
    def vocab_size(self) -> int:
        """Token ids of the task."""
        return 1 + self.keys + self.values + self.fillers

    @property
    def least_gap(self) -> int:
        """The smallest max_gap that has room for the queries."""
        return self.query_slots(0).start + 2 * self.queries - 3

    @property
    def least_length(self) -> int:
        """Shortest sequence in which every query and its answer fit."""
        return self.max_gap + 3

    def query_slots(self, shift: int) -> range:
        """Positions at which any of the pairs may be asked for: the last value bounds them below, the first above."""
        return range(max(2 * self.pairs - 1 + self.min_gap, 2 * self.pairs + 1) + shift, self.max_gap + 2, 2)


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from and how they are cut."""

    path: tuple[str, ...] = ()
    """Files, folders or globs of .txt, .md, .py, .jsonl, .json or .parquet documents, text and JSON also with .gz,
    .zst, .bz2 or .xz behind it. Empty: see `dataset`."""
    dataset: str | None = None
    """A Hugging Face data set to stream (NAME, NAME:SUBSET or NAME@REVISION), or `stdlib`: the source files of this
    machine's Python standard library."""
    mix: tuple[str, ...] = ()
    """Several sources, NAME=WEIGHT each: a file, folder or glob as for `path`, or a data set as for `dataset`. Each
    stream reads one of them, as many streams as its weight is of the sum."""
    tokens: tuple[str, ...] = ()
    """Token files in place of documents: raw little-endian uint16 or uint32 ids, as files, folders, globs or URLs. With
    a share of the windows each, NAME=RATIO, where the ratios sum to 1; without, all windows are shuffled together."""
    held_out_tokens: tuple[str, ...] = ()
    """Token files for evaluation, as `tokens`; without, the last `holdout` of the windows of `tokens` is held out."""
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """What a token file holds. auto: what its sidecar says, or else uint16 where the model's vocabulary allows it."""
    token_header: bool = False
    """The token files begin with NumPy's header, as np.save writes it; without: raw ids from the first byte on."""
    eos_id: int | None = None
    """Id that ends a document in token files; None: that of their sidecar, or else of the tokenizer."""
    document_mask: bool = False
    """Documents in one window of a token file do not see each other, and the first token of one is no label. Systems
    that let documents of one sequence see each other read it for packed text too."""
    token_cache: str | None = None
    """Folder for blocks of token files that are URLs; None: mnemos/tokens in $XDG_CACHE_HOME or ~/.cache."""
    dataset_config: str | None = None
    """Configuration (subset) of the Hugging Face data set."""
    split: str = "train"
    """Split of the Hugging Face data set. Held-out documents are taken out of it."""
    text_field: str = "text"
    """Column or key that holds a document's text."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=["--tokenizer"])] = "bytes"
    """`bytes`, a sentencepiece .model file, or the folder or hub name of a Hugging Face tokenizer (NAME or
    NAME@REVISION)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a tokenizer: that of NAME@ and a full commit hash, or of a local folder,
    whose content counts at a resume."""
    min_tokens: int = 0
    """Documents shorter than this many tokens are left out, so that a long-context run trains on long documents."""
    holdout: float = 0.02
    """Share of documents kept out of training for evaluation, chosen by a hash of the document's identity. Of a corpus
    of one document: this share of it, at its end."""
    shuffle: bool = True
    """Visit documents in a new seeded order each epoch (a streamed data set: within a buffer)."""
    shuffle_buffer: int = 1000
    """How many documents of a streamed data set are shuffled together."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """stop: a record that cannot be read ends the run; skip: it is passed over, named on standard error and counted."""
    on_change: Literal["stop", "accept"] = "stop"
    """stop: a resume refuses a corpus in which more has changed than records it has not read; accept: it goes on with
    it, and says what is lost."""
    recall: RecallConfig | None = None
    """The synthetic recall task in place of documents."""

    def __post_init__(self) -> None:
        mix_weights(self.mix)
        if self.mix and (self.path or self.dataset):
            other = "--data.path" if self.path else "--data.dataset"
            raise UserError(f"{other} and --data.mix are both given: name all sources in --data.mix")
        if self.tokens and (self.path or self.dataset or self.mix):
            other = "--data.path" if self.path else "--data.dataset" if self.dataset else "--data.mix"
            raise UserError(f"{other} and --data.tokens are both given: name documents or token files")
        if self.eos_id is not None and not 0 <= self.eos_id < 2**32:
            raise UserError(f"--data.eos-id is {self.eos_id}: give the id of the end-of-document token, 0 or more")


def mix_weights(mix: Sequence[str]) -> dict[str, float]:
    """The weights of the sources of a mixture, by name, from NAME=WEIGHT. Raises UserError."""
    weights: dict[str, float] = {}
    for entry in mix:
        name, equals, weight = entry.rpartition("=")
        if not (equals and name):
            raise UserError(f"--data.mix {entry}: give NAME=WEIGHT, such as {'books' if equals else entry}=0.5")
        if name in weights:
            raise UserError(f"--data.mix names {name} twice: give it once, with the sum of its weights")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if not 0 < weights[name] < math.inf:
            raise UserError(f"--data.mix {entry}: {weight!r} is no weight: give a number above 0")
    return weights
