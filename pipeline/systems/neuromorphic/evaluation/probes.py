"""What streams are told and asked: facts of the synthetic task, or sentences of text, among text of several domains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.data.long_recall import generator
from pipeline.data.text_tasks import CANDIDATES, Encode, common_words, needles, story
from pipeline.systems.neuromorphic.facts import EOS, told
from pipeline.systems.neuromorphic.facts_config import FactsConfig

WORDS = (
    "amber anchor apron arrow basket beacon bottle branch bridge butter candle carpet castle cherry circle copper"
    " corner cotton cradle crystal curtain desert dragon engine feather finger flower forest garden ginger hammer"
    " harbor helmet island jacket ladder lantern lemon magnet marble meadow mirror needle orange paddle pencil pepper"
    " pillow planet pocket puzzle ribbon river saddle shadow silver spider thunder ticket tunnel velvet violin walnut"
    " window"
).split()
"""Keys of needles, and words of lists."""


@dataclass(frozen=True)
class Asked:
    """One question, and the answers to choose from."""

    prompt: np.ndarray
    """[tokens] int64: the answer follows."""
    candidates: tuple[np.ndarray, ...]
    right: int


@dataclass(frozen=True)
class Stream:
    """What one stream is told, and asked for."""

    told: np.ndarray
    """[tokens] int64."""
    asked: tuple[Asked, ...]


class Probes(Protocol):
    """Streams of documents in which facts are told, and domains of text that follows."""

    eos_id: int
    chance: float
    """Share of right answers of a guess."""
    domains: tuple[str, ...]
    """The first is that of the document in which the facts are told."""

    def stream(self, number: int) -> Stream:
        """What stream `number` is told and asked, a function of the number."""
        ...

    def text(self, domain: str, number: int, document: int, tokens: int) -> np.ndarray:
        """[tokens] int64 of a domain: document number `document` of stream `number`, in which no document ends."""
        ...


class TokenFacts:
    """The facts and fillers of the synthetic task."""

    eos_id = EOS

    def __init__(self, task: FactsConfig, seed: int) -> None:
        self.task, self.seed = task, seed
        self.chance = 1 / task.values
        self.domains = tuple(f"fillers {number}" for number in range(task.domains))

    def stream(self, number: int) -> Stream:
        task = self.task
        facts = told(task, 0, "lifelong", self.seed, number)
        candidates = tuple(np.array([task.first_value + value]) for value in range(task.values))
        return Stream(
            np.stack([facts.keys, facts.values], 1).flatten(),
            tuple(
                Asked(np.array([key]), candidates, int(value) - task.first_value)
                for key, value in zip(facts.keys, facts.values, strict=True)
            ),
        )

    def text(self, domain: str, number: int, document: int, tokens: int) -> np.ndarray:
        task = self.task
        start = int(generator("filler", self.seed, domain, number, document).integers(task.fillers))
        first = task.first_filler + self.domains.index(domain) * task.fillers
        return first + (start + np.arange(tokens)) % task.fillers


class TextFacts:
    """Needles, "The special magic number for KEY is N.", in held-out text, followed by more of it, by stories about
    people and objects, or by lists of words. The numbers of the other needles are the wrong answers."""

    chance = 1 / CANDIDATES

    def __init__(
        self, encode: Encode, eos_id: int, held_out: Sequence[np.ndarray], seed: int, name: str = "held-out text"
    ) -> None:
        """held_out: of each stream, ids of held-out text; a text that is short is read again from its start."""
        self.encode, self.eos_id, self.seed = encode, eos_id, seed
        self.held_out = [ids[ids != eos_id] for ids in held_out]
        self.domains = (name, *OTHERS)

    def stream(self, number: int) -> Stream:
        draw = generator("lifelong", self.seed, number)
        task = needles(draw, WORDS, [0.0] * CANDIDATES)
        asked = tuple(
            Asked(
                self.encode(f"\n{question.prompt}"),
                tuple(self.encode(candidate) for candidate in question.candidates),
                question.candidates.index(question.answer),
            )
            for question in task.questions
        )
        return Stream(self.encode(" ".join(sentence for _, sentence in task.facts)), asked)

    def text(self, domain: str, number: int, document: int, tokens: int) -> np.ndarray:
        if domain == self.domains[0]:
            ids = self.held_out[number % len(self.held_out)]
            return np.resize(np.roll(ids, -document * tokens), tokens)
        parts: list[np.ndarray] = []
        while sum(map(len, parts)) < tokens:
            draw = generator("domain", self.seed, domain, number, document, len(parts))
            parts.append(self.encode(OTHERS[domain](draw)))
        return np.concatenate(parts)[:tokens]


def _story(draw: np.random.Generator) -> str:
    return " ".join(sentence for _, sentence in story(draw).facts) + "\n"


def _words(draw: np.random.Generator) -> str:
    return "\n".join(sentence for _, sentence in common_words(draw, WORDS).facts) + "\n"


OTHERS: Mapping[str, Callable[[np.random.Generator], str]] = {"stories": _story, "lists of words": _words}
"""Domains that are drawn, by name."""
