"""A weighted mixture of sources: every stream reads one of them, as many streams as its weight is worth."""

from __future__ import annotations

import dataclasses
import itertools
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pipeline.data.sources.base import Document, Documents, Order, Place, Source
from pipeline.errors import UserError


def shares(weights: Sequence[float]) -> list[float]:
    """What the weights, as decimals, are of their sum, to twelve digits: 6 and 4 mean the same as 0.6 and 0.4."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    return [round(float(weight / sum(exact)), 12) for weight in exact]


def apportion(weights: Sequence[float], streams: int) -> list[int]:
    """Streams per source, by largest remainders: each source has its exact share, rounded up or down. A function of the
    shares alone."""
    exact = [Fraction(repr(share)) for share in shares(weights)]
    quotas = [share / sum(exact) * streams for share in exact]
    counts = [math.floor(quota) for quota in quotas]
    remainders = sorted(range(len(counts)), key=lambda source: counts[source] - quotas[source])
    for source in remainders[: streams - sum(counts)]:
        counts[source] += 1
    return counts


def spread(counts: Sequence[int]) -> list[int]:
    """The source of each stream: `counts` of each, mixed as evenly as can be, so that every batch is a mixture."""
    streams = sum(counts)
    taken = [0] * len(counts)
    sources = []
    for stream in range(1, streams + 1):
        # The source that lags most behind its share of the streams so far.
        behind = [stream * count - streams * done for count, done in zip(counts, taken, strict=True)]
        source = behind.index(max(behind))
        taken[source] += 1
        sources.append(source)
    return sources


class MixedSource:
    """Several sources by their names, each with a weight above 0."""

    def __init__(self, sources: Mapping[str, Source], weights: Sequence[float]) -> None:
        self._sources, self._weights = dict(sources), list(weights)
        self.name = f"the mixture of {', '.join(sources)}"

    @property
    def remedy(self) -> str:
        remedies = {source.remedy for source in self._sources.values()}
        return remedies.pop() if len(remedies) == 1 else "pass over such records with --data.on-bad-record skip"

    def open(self, order: Order) -> Documents:
        """Raises UserError when there are too few streams for a source."""
        counts = apportion(self._weights, order.streams)
        if 0 in counts:
            raise self._too_few_streams(counts, order)
        sources = spread(counts)
        members = []
        for number, (name, source) in enumerate(self._sources.items()):
            own = [stream for stream, other in enumerate(sources) if other == number]
            local = range(bisect_left(own, order.local_streams.start), bisect_left(own, order.local_streams.stop))
            inner = dataclasses.replace(order, streams=len(own), local_streams=local)
            members.append(Member(name, source.name, inner, source.open(inner)))
        return MixedDocuments(order, members, sources)

    def _too_few_streams(self, counts: Sequence[int], order: Order) -> UserError:
        name = list(self._sources)[counts.index(0)]
        enough = math.ceil(1 / Fraction(repr(min(shares(self._weights)))))
        side, rows = (
            ("held-out", "--evaluation.batch-size x data degree")
            if order.held_out
            else ("training", "--batch-size x data degree x --grad-accum")
        )
        return UserError(
            f"--data.mix: no stream is left for {name}, of {order.streams} {side} streams: give it a larger weight, or"
            f" take {enough} streams or more ({rows})"
        )

    def fingerprint(self) -> dict[str, Any]:
        numbered = enumerate(self._sources.values(), start=1)
        return {
            "mix": shares(self._weights),
            **{f"source {number}": source.fingerprint() for number, source in numbered},
        }

    def same_documents(self, saved: dict[str, Any]) -> bool:
        return saved.get("mix") == shares(self._weights) and all(
            source.same_documents(saved[f"source {number}"])
            for number, source in enumerate(self._sources.values(), start=1)
        )

    def same_numbering(self, saved: dict[str, Any]) -> bool:
        return saved.get("mix") == shares(self._weights) and all(
            source.same_numbering(saved[f"source {number}"])
            for number, source in enumerate(self._sources.values(), start=1)
        )

    def describe(self) -> str:
        found = zip(shares(self._weights), self._sources.values(), strict=True)
        return "; ".join(f"{share:.3g} of {source.describe()}" for share, source in found)


@dataclass(frozen=True)
class Member:
    """One source of a mixture."""

    given: str
    """Its name in `--data.mix`."""
    name: str
    order: Order
    """That of its own streams, which are numbered among themselves."""
    documents: Documents


class MixedDocuments:
    """One side of the hold-out of a mixture.

    The k-th document of an epoch of a stream is the k-th that its source has for that stream, so a stream that has read
    its source to the end begins its next epoch, whatever the others do.
    """

    def __init__(self, order: Order, members: Sequence[Member], sources: Sequence[int]) -> None:
        self.members, self._order = members, order
        counters = [itertools.count() for _ in members]
        self._seats = [(members[source], next(counters[source])) for source in sources]

    def _inner(self, epoch: int, position: int) -> tuple[Member, int]:
        """The source of the stream that `position` belongs to, and the position there."""
        member, index = self._seats[self._order.stream(epoch, position)]
        return member, member.order.first(index, epoch) + position // self._order.streams * member.order.streams

    def read(self, epoch: int, position: int) -> Document | None:
        member, inner = self._inner(epoch, position)
        return member.documents.read(epoch, inner)

    def count(self) -> int | None:
        counts = [member.documents.count() for member in self.members]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def scan(self) -> Iterator[Document]:
        return itertools.chain.from_iterable(member.documents.scan() for member in self.members)

    def hint(self, epoch: int, position: int) -> dict[str, Any] | None:
        member, inner = self._inner(epoch, position)
        return member.documents.hint(epoch, inner)

    def seek(self, places: dict[int, Place]) -> None:
        inner: dict[str, dict[int, Place]] = {member.given: {} for member in self.members}
        for stream, place in places.items():
            member, position = self._inner(place.epoch, place.position)
            inner[member.given][self._seats[stream][1]] = dataclasses.replace(place, position=position)
        for member in self.members:
            if inner[member.given]:
                member.documents.seek(inner[member.given])

    def describe(self) -> str:
        """How many streams read each source."""
        return ", ".join(f"{member.order.streams} of {member.given}" for member in self.members)


def corpora(source: Source, documents: Documents) -> list[tuple[str, Documents]]:
    """(name, documents) of each source of a mixture, or of the only one."""
    if isinstance(documents, MixedDocuments):
        return [(member.name, member.documents) for member in documents.members]
    return [(source.name, documents)]
