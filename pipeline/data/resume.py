"""Whether a run may go on with the data it finds, and what is lost when that has changed."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.packing import chained, content_hash
from pipeline.data.sources.base import Documents, Order, Place
from pipeline.errors import UserError

_FLAGS = {
    "mix": "--data.mix",
    "source": "--data.path or --data.dataset",
    "tokenizer": "--data.tokenizer",
    "seed": "--seed",
    "shuffle": "--data.shuffle",
    "holdout": "--data.holdout",
    "min_tokens": "--data.min-tokens",
    "tokens": "--data.tokens",
    "sequence_length": "--sequence-length",
    "eos_id": "--data.document-mask or --data.eos-id",
}


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError naming the first setting that would make a resumed run read other data."""
    check_reading_settings(saved, current)
    for key, value in current.items():
        if saved.get(key) != value:
            raise UserError(_refusal(key, saved.get(key), value))


def check_reading_settings(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError for all that decides what is read but the documents themselves."""
    if saved.get("streams", current.get("streams")) != current.get("streams"):
        before, now = (fingerprint.get("streams", "no") for fingerprint in (saved, current))
        raise UserError(
            f"a resume keeps the global batch: the checkpoint has {before} streams, this run {now} (--batch-size x data"
            " degree x --grad-accum)"
        )
    # Each stream reads one source: with other shares its position would be one in another source.
    if _mix(saved) != _mix(current):
        raise UserError(_refusal("mix", _mix(saved), _mix(current)))
    for key, value in current.items():
        if key != "source" and saved.get(key) != value:
            raise UserError(_refusal(key, saved.get(key), value))


def refuse_source(saved: Any, current: dict[str, Any], why: str) -> UserError:
    """The line for a corpus that has changed; `why` says what the change means for the run."""
    fix = "restore it, go on all the same with --data.on-change accept, or start a new run with --init-from"
    return UserError(f"{_refusal('source', saved, current, fix='')}; {why}: {fix}")


def _mix(fingerprint: dict[str, Any]) -> list[float] | None:
    """The shares of the sources; None of a single one."""
    source = fingerprint.get("source")
    return source.get("mix") if isinstance(source, dict) else None


def _flag(key: str, value: Any) -> str:
    """What sets a part of a fingerprint, whose value is given."""
    if key == "source" and isinstance(value, dict) and "ratios" in value:
        return _FLAGS["tokens"]
    return _FLAGS["mix"] if key == "source" and _mix({"source": value}) else _FLAGS.get(key, key)


def _refusal(key: str, old: Any, new: Any, fix: str = ": restore it, or start a new run with --init-from") -> str:
    return f"{_flag(key, new)} does not give the data of the checkpoint ({_difference(old, new)}){fix}"


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [key for key in new if old.get(key) != new[key]]
        # A digest means nothing to a person: it is named where nothing else differs.
        named = [key for key in changed if key not in ("digest", "layout")] or changed
        return ", ".join(f"{key} {_difference(old.get(key), new[key])}" for key in named)
    return f"{old}, now {new}"


def different_rank(fingerprints: Sequence[dict[str, Any]]) -> str | None:
    """What is wrong when the ranks do not read the same data, in one line; None when they do."""
    for rank, found in enumerate(fingerprints):
        changed = [key for key in fingerprints[0] if found.get(key) != fingerprints[0][key]]
        if changed:
            key = changed[0]
            return (
                f"{_flag(key, fingerprints[0][key])}: rank {rank} does not find what rank 0 does"
                f" ({_difference(fingerprints[0][key], found.get(key))}): the data must be the same on every node"
            )
    return None


def reads_the_same(documents: Documents, order: Order, cursors: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether `documents` give each stream, up to its cursor, what it has read by the digests in the cursor.

    Reads all of that again, the streams side by side. False also for a cursor of an earlier version, without digests.
    """
    if any(cursor.get("read") is None for cursor in cursors.values()):
        return False
    replays = [(0, order.first(stream, 0), stream) for stream in cursors]
    documents.seek({stream: Place(epoch, position) for epoch, position, stream in replays})
    heapq.heapify(replays)
    read = dict.fromkeys(cursors, "")
    while replays:
        epoch, position, stream = heapq.heappop(replays)
        cursor = cursors[stream]
        place = (int(cursor["epoch"]), int(cursor["position"]))
        if (epoch, position) > place:
            return False
        if (epoch, position) == place and not cursor["offset"]:
            if read[stream] != cursor["read"]:
                return False
            continue
        document = documents.read(epoch, position)
        if document is None:
            if epoch == place[0]:
                return False
            heapq.heappush(replays, (epoch + 1, order.first(stream, epoch + 1), stream))
            continue
        if (epoch, position) == place:
            if (read[stream], content_hash(document)) != (cursor["read"], cursor["document"]):
                return False
            continue
        read[stream] = chained(read[stream], content_hash(document))
        heapq.heappush(replays, (epoch, position + order.streams, stream))
    return True


def accepted(documents: Documents, cursor: Mapping[str, Any]) -> dict[str, Any]:
    """The cursor with which a stream goes on in a changed corpus: within its document if that is still there, else at
    the start of the one in its place. It has no digest of what was read before."""
    found = {**cursor, "read": None}
    found.pop("reader", None)
    if cursor["offset"]:
        document = documents.read(int(cursor["epoch"]), int(cursor["position"]))
        if document is None or cursor.get("document") is None or content_hash(document) != cursor["document"]:
            found |= {"offset": 0, "document": None, "name": None, "segment": int(cursor["segment"]) + 1}
    return found
