"""Settings of the facts task, and what of it each phase reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError
from pipeline.model_config import at_least


@dataclass(frozen=True)
class FactsConfig:
    """The facts task, in place of documents: keys and values told at the start of a document, and asked for later on.

    Phase A reads documents of one fact, asked for in the same one, and phase B documents of as many as are told, asked
    for in the same one; phase C also asks in later ones. Raises UserError where questions do not fit.
    """

    keys: int = 64
    values: int = 16
    """Different values: a guess is right once in so many."""
    fillers: int = 16
    """Different tokens between facts and questions, of a domain."""
    domains: int = 1
    """Sets of fillers; a document has those of one."""
    facts: int = 4
    """Facts that a document tells."""
    fewest: int | None = None
    """A document tells so many facts or more, up to `facts`, each number as often; None: always `facts`. Documents of
    one fact teach what a memory's contents mean: whatever is read is about it."""
    within: int = 4
    """Of these, asked for in the same document; the others in a later one."""
    documents: int = 0
    """A later question comes at most so many documents on; 0: there is none."""
    least_distance: int = 80
    """Tokens from a fact's value to the question about it in the same document, at least: beyond the window."""
    least_tokens: int = 192
    """Least tokens of a document, with its end."""
    most_tokens: int = 256
    """Most tokens of a document."""
    labels: Literal["all", "facts"] = "all"
    """all: every token is predicted; facts: only those behind a key or a value."""

    def __post_init__(self) -> None:
        at_least(1, self, "facts", "keys", "values", "fillers", "domains", "facts", "least_distance", "most_tokens")
        at_least(0, self, "facts", "within", "documents")
        if self.within > self.facts:
            raise UserError(f"--model.facts.within is {self.within}: a document tells {self.facts}: give at most that")
        if self.later and not self.documents:
            raise UserError(
                f"--model.facts.documents is 0, and {self.later} of the {self.facts} facts of a document are asked for"
                f" in a later one: give 1 or more, or --model.facts.within {self.facts}"
            )
        if self.fewest is not None and not 1 <= self.fewest <= self.facts:
            raise UserError(
                f"--model.facts.fewest is {self.fewest}: a document tells up to {self.facts}: give 1 to {self.facts}"
            )
        if self.keys < 2 * self._told_in_turn:
            raise UserError(
                f"--model.facts.keys is {self.keys}: a key would be told again before it is asked for: give"
                f" {2 * self._told_in_turn} or more"
            )
        if self.least_tokens < self.least_room:
            raise UserError(
                f"--model.facts.least-tokens is {self.least_tokens}: a document has no room for its questions: give"
                f" {self.least_room} or more"
            )
        if self.least_tokens > self.most_tokens:
            raise UserError(
                f"--model.facts.most-tokens is {self.most_tokens}: give --model.facts.least-tokens,"
                f" {self.least_tokens}, or more"
            )

    @property
    def later(self) -> int:
        """Facts of a document that are asked for in later ones."""
        return self.facts - self.within

    @property
    def turn(self) -> int:
        """Documents that draw their keys together; every other turn has the other half of the keys."""
        return max(1, self.documents)

    @property
    def _told_in_turn(self) -> int:
        return self.facts * self.turn

    @property
    def least_room(self) -> int:
        """Tokens of the shortest document that has room for all its questions."""
        return _room(self.facts, self.within, self.later * self.documents, self.least_distance)

    @property
    def first_value(self) -> int:
        return 1 + self.keys

    @property
    def first_filler(self) -> int:
        return self.first_value + self.values

    @property
    def vocab(self) -> int:
        """Token ids there are: the end of a document, keys, values, fillers."""
        return self.first_filler + self.domains * self.fillers

    def of_phase(self, phase: str) -> FactsConfig:
        """What phase A, B or C reads: documents without later questions have the least room for theirs, and vary in
        length as much."""
        if phase == "C":
            return self
        facts = 1 if phase == "A" else self.facts
        least = _room(facts, facts, 0, self.least_distance)
        most = least + self.most_tokens - self.least_tokens
        return dataclasses.replace(
            self,
            facts=facts,
            within=facts,
            fewest=None if facts == 1 else self.fewest,
            documents=0,
            least_tokens=least,
            most_tokens=most,
        )


def _room(told: int, own: int, earlier: int, least_distance: int) -> int:
    """Tokens that have room for facts that are told, and for questions about its own and about earlier ones."""
    return 2 * told + max(least_distance + 2 * own, 2 * (own + earlier)) + 4
