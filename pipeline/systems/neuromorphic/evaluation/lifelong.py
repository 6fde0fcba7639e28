"""`eval --suite lifelong`: facts told in one document, asked for in it and in later ones, and after other domains.

A stream reads a document that tells facts, then documents of text. At the end of a document each question is read from
a copy of the stream's state, as the document's next sentence, with each of its candidate answers; the likeliest is the
model's answer. Documents are whole numbers of spans, so that all that is told is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.errors import UserError
from pipeline.parallel.collectives import all_gather_object
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.neuromorphic.evaluation.ablations import NOTHING, Ablation, Reading, ablations_of, of_another
from pipeline.systems.neuromorphic.evaluation.probes import Asked, Probes
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel, NeuromorphicOutput
from pipeline.systems.neuromorphic.state import StreamState, Uses
from pipeline.systems.neuromorphic.stream_tensors import rows_of

STREAMS = 16
DOCUMENTS = (0, 1, 2, 4)
"""How many documents later questions are asked; 0: at the end of the document that told the facts."""
PIECE = 64
"""Rows of questions that are read at a time."""


@dataclass(frozen=True)
class Options:
    """What a user chooses of the suite."""

    streams: int = STREAMS
    """Streams that are told facts, over all ranks."""
    documents: tuple[int, ...] = DOCUMENTS
    """How many documents later questions are asked."""
    lengths: tuple[int, ...] | None = None
    """Tokens of a document; None: as few as are beyond the window, and twice as many. They are rounded up to spans."""

    def __post_init__(self) -> None:
        if list(self.documents) != sorted(set(self.documents)):
            raise UserError(f"--documents {','.join(map(str, self.documents))}: give rising numbers, such as 1,2,4")
        if self.lengths is not None and list(self.lengths) != sorted(set(self.lengths)):
            raise UserError(f"--lengths {','.join(map(str, self.lengths))}: give rising numbers of tokens")


@dataclass(frozen=True)
class Answers:
    """Of all questions at one place."""

    way: str
    """What was left out, as in ablations."""
    domain: str
    """Of the documents since the facts were told."""
    documents: int
    """How many documents later."""
    tokens: int
    """From the end of what was told to the question, a mean."""
    right: int
    questions: int


class Lifelong:
    """Streams of one data rank, read in every way."""

    def __init__(
        self, model: NeuromorphicModel, uses: Uses, probes: Probes, options: Options, sync_point: SyncPoint
    ) -> None:
        self.model, self.uses, self.probes, self.options, self.sync_point = model, uses, probes, options, sync_point
        topology = sync_point.topology
        count = math.ceil(options.streams / topology.data)
        self.numbers = range(topology.data_rank * count, (topology.data_rank + 1) * count)
        self.streams = [probes.stream(number) for number in self.numbers]
        # Of all ranks: lengths, and where a question stands, are the same on each.
        self.told = [len(probes.stream(number).told) for number in range(topology.data * count)]
        self.device = next(model.parameters()).device
        self.ways = tuple(way for way in ablations_of(uses) if count > 1 or not way.swapped)

    @torch.no_grad()
    def run(self) -> list[Answers]:
        """Every way in the shortest documents of the facts' own domain; the model as it is in longer ones, and after
        other domains. Of all ranks. Collective."""
        own, *others = self.probes.domains
        found: list[Answers] = []
        shortest, *longer = self._lengths()
        found += self._read(own, shortest, self.ways)
        for length in longer:
            found += self._read(own, length, self.ways[:1])
        for domain in others:
            found += self._read(domain, shortest, self.ways[:1])
        topology = self.sync_point.topology
        parts = all_gather_object(topology, found if topology.sequence_rank == 0 else [])
        every: dict[tuple[str, str, int, int], Answers] = {}
        # The same places on every rank, in the same order.
        for answers in (answer for part in parts if part for answer in part):
            key = (answers.way, answers.domain, answers.documents, answers.tokens)
            before = every.get(key)
            every[key] = (
                answers
                if before is None
                else dataclasses.replace(
                    before, right=before.right + answers.right, questions=before.questions + answers.questions
                )
            )
        return list(every.values())

    def _lengths(self) -> list[int]:
        """Tokens of documents, each a whole number of spans that has room for what is told."""
        longest = max(self.told)
        least = self._spans(longest + self.model.sizes.window)
        wanted = self.options.lengths or (least, 2 * least)
        if self._spans(wanted[0]) <= longest:
            raise UserError(f"--lengths {wanted[0]}: what is told has {longest} tokens: give {least} or more")
        return sorted({self._spans(length) for length in wanted})

    def _spans(self, tokens: int) -> int:
        return -(-tokens // self.model.span) * self.model.span

    def _read(self, domain: str, length: int, ways: Sequence[Ablation]) -> Iterator[Answers]:
        """Reads as many documents as there are, and asks at the end of some."""
        reading = Reading(self.model, self.model.span, self.uses, [way for way in ways if not way.swapped])
        since = length - int(np.mean(self.told))
        for document in range(max(self.options.documents) + 1):
            self.sync_point(f"lifelong: {domain}, document {document + 1} of {length} tokens")
            reading.read(self._document(domain, document, length))
            if document not in self.options.documents:
                continue
            for way in ways:
                self.sync_point(f"lifelong: questions without {way.name}")
                right, questions = self._ask(way, reading, document, length - (document > 0))
                yield Answers(way.name, domain, document, document * length + since, right, questions)

    def _document(self, domain: str, document: int, length: int) -> TokenBatch:
        """Document number `document` of every stream; each but the first behind the token that ends the one before."""
        probes = self.probes
        own, ended = probes.domains[0], np.array([probes.eos_id])
        rows = []
        for number, stream in zip(self.numbers, self.streams, strict=True):
            head = ended if document else stream.told
            kind = domain if document else own
            rows.append(np.concatenate([head, probes.text(kind, number, document, length - len(head))]))
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], probes.eos_id)], 1)
        segments, positions = torch.full_like(ids, document), torch.arange(length).repeat(len(ids), 1)
        if document:
            labels[:, 0], segments[:, 0] = IGNORED, document - 1
            # A document but the first has no told sentences, and begins at the token behind the end.
            positions = positions - 1
            positions[:, 0] = length - (document > 1)
        return TokenBatch(ids, labels, segments, positions, torch.tensor(list(self.numbers))).to(self.device)

    def _ask(self, way: Ablation, reading: Reading, document: int, position: int) -> tuple[int, int]:
        """(right answers, questions) of all streams at the end of a document; position: of the next token in it."""
        state = reading.states[NOTHING if way.swapped else way.name]
        assert state is not None
        if way.swapped:
            state = dataclasses.replace(state, **{memory: of_another(getattr(state, memory)) for memory in way.swapped})
        asked = [(row, question) for row, stream in enumerate(self.streams) for question in stream.asked]
        right = 0
        for start in range(0, len(asked), PIECE):
            part = asked[start : start + PIECE]
            rows = torch.tensor([row for row, _ in part], device=self.device)
            scores = self._scores([question for _, question in part], rows_of(state, rows), way, document, position)
            right += sum(int(s.argmax()) == question.right for s, (_, question) in zip(scores, part, strict=True))
        return right, len(asked)

    def _scores(
        self, asked: Sequence[Asked], state: StreamState, way: Ablation, document: int, position: int
    ) -> list[Tensor]:
        """How likely each candidate is, [candidates] a question: log-probabilities of its tokens, added up."""
        single = all(len(candidate) == 1 for question in asked for candidate in question.candidates)
        if single and max(len(question.prompt) for question in asked) <= self.model.span:
            ids, ends = self._padded([question.prompt for question in asked])
            hidden = self._run(ids, None, state, way, document, position).hidden
            assert hidden is not None
            logits = self.model.head(hidden[torch.arange(len(asked), device=self.device), ends - 1])
            candidates = [np.concatenate(question.candidates) for question in asked]
            return [row[torch.from_numpy(ids).to(self.device)] for row, ids in zip(logits, candidates, strict=True)]
        found = []
        count = max(len(question.candidates) for question in asked)
        for place in range(count):
            answers = [question.candidates[min(place, len(question.candidates) - 1)] for question in asked]
            joined = [np.concatenate([q.prompt, answer]) for q, answer in zip(asked, answers, strict=True)]
            ids, ends = self._padded(joined)
            place_of = torch.arange(ids.shape[1], device=self.device)
            labels = torch.cat([ids[:, 1:], ids[:, :1]], 1).masked_fill(place_of >= ends[:, None] - 1, IGNORED)
            starts = torch.tensor([len(question.prompt) - 1 for question in asked], device=self.device)
            losses = self._run(ids, labels, state, way, document, position).losses
            assert losses is not None
            found.append(-losses.masked_fill(place_of < starts[:, None], 0).sum(1))
        scores = torch.stack(found, 1)
        return [row[: len(question.candidates)] for row, question in zip(scores, asked, strict=True)]

    def _padded(self, texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """ids [rows, whole spans], filled up at their ends, and how many there are of each [rows]."""
        ends = [len(text) for text in texts]
        ids = np.full((len(texts), self._spans(max(ends))), self.probes.eos_id, np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        return torch.from_numpy(ids).to(self.device), torch.tensor(ends, device=self.device)

    def _run(
        self, ids: Tensor, labels: Tensor | None, state: StreamState, way: Ablation, document: int, position: int
    ) -> NeuromorphicOutput:
        """Of ids that go on in a document. What fills a row up comes last, where no question sees it."""
        segments = torch.full_like(ids, document)
        positions = position + rearrange(torch.arange(ids.shape[1], device=ids.device), "t -> 1 t").expand_as(ids)
        output: NeuromorphicOutput = self.model(ids, labels, segments, positions, state, way.uses(self.uses))
        return output
