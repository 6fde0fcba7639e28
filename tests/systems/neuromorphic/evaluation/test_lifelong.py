"""The lifelong suite: what is told and asked where, and what a model that remembers exactly is found to know."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.neuromorphic.evaluation import lifelong as lifelong_module
from pipeline.systems.neuromorphic.evaluation.ablations import ALL, BOTH, NOTHING, Ablation, Reading, ablations_of
from pipeline.systems.neuromorphic.evaluation.lifelong import Answers, Lifelong, Options
from pipeline.systems.neuromorphic.evaluation.probes import Asked, TextFacts, TokenFacts
from pipeline.systems.neuromorphic.evaluation.report import evaluation_of
from pipeline.systems.neuromorphic.facts import EOS
from pipeline.systems.neuromorphic.facts_config import FactsConfig
from pipeline.systems.neuromorphic.state import EpisodicState, ProceduralState, StreamState, Uses
from pipeline.systems.neuromorphic.stream_tensors import rows_of
from tests.systems.neuromorphic.small import SIZES, documents, small_model

TASK = FactsConfig(
    keys=16, values=16, facts=4, within=4, fillers=5, domains=2, least_distance=8, least_tokens=40, most_tokens=40
)
OPTIONS = Options(streams=8, documents=(0, 1, 3), lengths=(24, 48))


class Exact(nn.Module):
    """A stand-in whose episodic memory is a table of all `K V` that a stream has read; it forgets them after two
    documents of another domain, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.span, self.sizes = 8, SimpleNamespace(window=12)
        self.head = nn.Linear(TASK.vocab, TASK.vocab, bias=False)
        nn.init.eye_(self.head.weight)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(
        self, ids: Tensor, labels: Any, segments: Tensor, positions: Tensor, state: Any, uses: Uses, **_: Any
    ) -> Any:
        self.seen.append((ids, segments, positions))
        rows, tokens = ids.shape
        if state is None:
            none = torch.zeros(rows)
            tables = [torch.zeros(rows, TASK.vocab, dtype=torch.int64)] * 3
            state = StreamState(none, none, none - 1, None, ProceduralState(*[none] * 5), EpisodicState(*tables))
        table, last = state.episodic.keys.clone(), state.hidden.clone()
        hidden = torch.zeros(rows, tokens, TASK.vocab)
        losses = torch.zeros(rows, tokens)
        for row in range(rows):
            for t in range(tokens):
                token, before = int(ids[row, t]), int(last[row])
                if not uses.lifelong and int(segments[row, t]) != int(state.segment[row]) >= 0:
                    table[row] = 0
                if TASK.first_value <= token < TASK.first_filler and 1 <= before <= TASK.keys:
                    table[row, before] = token
                if token >= TASK.first_filler + TASK.fillers and int(segments[row, t]) > 2:
                    table[row] = 0
                known = 0 if uses.episodic == "empty" else int(table[row, token])
                hidden[row, t, known] = 5.0
                if labels is not None and int(labels[row, t]) >= 0:
                    losses[row, t] = -hidden[row, t].log_softmax(0)[int(labels[row, t])]
                last[row] = token
        after = dataclasses.replace(
            state, hidden=last, segment=segments[:, -1].float(), episodic=EpisodicState(table, table, table)
        )
        return SimpleNamespace(losses=losses, hidden=hidden, state=after, predictions=None)


class Quiet(SyncPoint):
    """Of a rank that is alone here."""

    def __call__(self, *_: Any, **__: Any) -> dict[str, float]:
        return {}


def shares(answers: list[Answers]) -> dict[tuple[str, str, int, int], float]:
    return {(a.way, a.domain, a.documents, a.tokens): a.right / a.questions for a in answers}


def run(uses: Uses, options: Options = OPTIONS, model: Any = None, probes: Any = None) -> list[Answers]:
    probes = probes or TokenFacts(TASK, 0)
    return Lifelong(
        model or Exact(),  # type: ignore[arg-type]
        uses,
        probes,
        options,
        SyncPoint(Topology()),
    ).run()


def test_what_is_remembered_is_found_and_what_is_left_out_is_not() -> None:
    found = run(Uses(lifelong=True))
    assert all(answer.questions == 32 for answer in found)
    for (way, domain, number, tokens), share in shares(found).items():
        without = way in ("EM", BOTH, ALL, "own EM")
        forgotten = domain == "fillers 1" and number == 3
        if without or forgotten:
            assert share <= 0.25, (way, domain, number, tokens)
        else:
            assert share == 1, (way, domain, number, tokens)
    places = {(a.documents, a.tokens) for a in found if a.way == NOTHING and a.domain == "fillers 0"}
    assert places == {(0, 16), (1, 40), (3, 88), (0, 40), (1, 88), (3, 184)}
    for tokens, ways in ((88, {way.name for way in ablations_of(Uses())}), (184, {NOTHING})):
        assert {a.way for a in found if (a.documents, a.tokens) == (3, tokens) and a.domain == "fillers 0"} == ways
    assert {(a.way, a.documents, a.tokens) for a in found if a.domain == "fillers 1"} == {
        (NOTHING, 0, 16), (NOTHING, 1, 40), (NOTHING, 3, 88),
    }  # fmt: skip


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_ask_at_the_same_places(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told differs in length: the mean of one rank's streams is not another's."""
    tokenizer = ByteTokenizer()
    probes = TextFacts(tokenizer.encode, tokenizer.eos_id, [tokenizer.encode("Held out text. " * 99)], 0)
    model: Any = SimpleNamespace(span=64, sizes=SimpleNamespace(window=64), parameters=lambda: iter([torch.zeros(1)]))
    parts: list[list[Answers]] = []

    def gather(topology: Topology, own: list[Answers]) -> list[list[Answers]]:
        parts.append(own)
        return list(parts)

    monkeypatch.setattr(lifelong_module, "all_gather_object", gather)
    monkeypatch.setattr(Reading, "read", lambda *_: None)
    monkeypatch.setattr(Lifelong, "_ask", lambda self, *_: (0, len(self.streams)))
    means = set()
    for rank in range(world):
        sync = Quiet(Topology(rank=rank, world=world))
        lifelong = Lifelong(model, Uses(lifelong=True), probes, Options(streams=16, documents=(0, 1)), sync)
        means.add(int(np.mean([len(stream.told) for stream in lifelong.streams])))
        merged = lifelong.run()
    assert len(means) > 1, "the streams of ranks are alike: choose others"
    assert len({tuple((a.way, a.domain, a.documents, a.tokens) for a in part) for part in parts}) == 1
    assert {answer.questions for answer in merged} == {-(-16 // world) * world}


def test_memories_that_end_with_a_document_know_nothing_later() -> None:
    for (way, _, number, _), share in shares(run(Uses())).items():
        if way == NOTHING:
            assert share == 1 if number == 0 else share <= 0.25


def test_documents_follow_each_other_as_in_training() -> None:
    model, probes = Exact(), TokenFacts(TASK, 0)
    lifelong = Lifelong(model, Uses(lifelong=True), probes, OPTIONS, SyncPoint(Topology()))  # type: ignore[arg-type]
    batches = [lifelong._document("fillers 1", number, 24) for number in range(4)]
    ids = torch.cat([batch.input_ids for batch in batches], 1)
    labels, segments, positions = documents(ids)
    assert torch.equal(segments, torch.cat([batch.segment_ids for batch in batches], 1))
    assert torch.equal(positions, torch.cat([batch.positions for batch in batches], 1))
    # Of the last token of a document, the end that follows is the label.
    labels[:, -1] = EOS
    assert torch.equal(labels, torch.cat([batch.labels for batch in batches], 1))
    assert (ids == EOS).sum(1).tolist() == [3] * 8
    # A question goes on where its document stops.
    reading = Reading(model, 8, Uses(lifelong=True), [Ablation(NOTHING)])
    for number, batch in enumerate(batches):
        reading.read(batch)
        lifelong._ask(Ablation(NOTHING), reading, number, 24 - (number > 0))
        _, last_segments, last_positions = model.seen[-1]
        assert last_segments.unique().tolist() == [number]
        assert last_positions[0, 0] == int(batch.positions[0, -1]) + 1


def test_answers_of_several_tokens_are_scored_by_their_likelihood() -> None:
    """As those of one token, whose likelihood is that of one forward pass."""
    model = small_model()
    task = dataclasses.replace(TASK, keys=4, values=8, facts=2, within=2, fillers=7, domains=1)
    probes, uses = TokenFacts(task, 0), Uses(lifelong=True)
    assert task.vocab == SIZES.vocab
    lifelong = Lifelong(model, uses, probes, Options(streams=3), SyncPoint(Topology()))
    reading = Reading(model, SIZES.span, uses, [Ablation(NOTHING)])
    for document in range(2):
        reading.read(lifelong._document("fillers 0", document, 24))
    state = reading.states[NOTHING]
    assert state is not None
    asked = [stream.asked[0] for stream in lifelong.streams]
    with torch.no_grad():
        one = lifelong._scores(asked, state, Ablation(NOTHING), 1, 23)
        # The question behind fillers, so that it is one of two spans.
        long = [Asked(np.concatenate([np.full(9, task.first_filler), q.prompt]), q.candidates, q.right) for q in asked]
        several = lifelong._scores(long, state, Ablation(NOTHING), 1, 23)
        for row, question in enumerate(long):
            ids = torch.from_numpy(np.concatenate([question.prompt, np.zeros(6, np.int64)]))[None]
            segments, positions = torch.ones_like(ids), 23 + torch.arange(16)[None]
            labels = torch.cat([ids[:, 1:], ids[:, :1]], 1)
            labels[:, 9:] = -100
            begin = rows_of(state, torch.tensor([row]))
            first = model(ids[:, :8], labels[:, :8], segments[:, :8], positions[:, :8], begin, uses)
            second = model(ids[:, 8:], None, segments[:, 8:], positions[:, 8:], first.state, uses)
            logits = torch.nn.functional.linear(second.hidden[0, 1], model.head.weight).log_softmax(0)
            wanted = logits[torch.tensor([int(c[0]) for c in question.candidates])]
            torch.testing.assert_close(several[row], wanted)
    assert all(len(scores) == task.values for scores in one)


def test_text_is_told_and_asked() -> None:
    tokenizer = ByteTokenizer()
    held_out = [tokenizer.encode("Some held-out text of the first stream. " * 9), tokenizer.encode("Of another. " * 40)]
    held_out[0][7] = tokenizer.eos_id
    probes = TextFacts(tokenizer.encode, tokenizer.eos_id, held_out, 0)
    stream = probes.stream(3)
    told = tokenizer.decode(stream.told)
    assert told.count("The special magic number for") == 4
    for asked in stream.asked:
        prompt, answer = tokenizer.decode(asked.prompt), tokenizer.decode(asked.candidates[asked.right])
        assert prompt.strip() + answer + "." in told and len(asked.candidates) == 4
    assert told != tokenizer.decode(probes.stream(4).told)
    for domain in probes.domains:
        texts = [probes.text(domain, 0, number, 100) for number in (1, 2)]
        assert all(len(text) == 100 and tokenizer.eos_id not in text for text in texts)
        assert not np.array_equal(texts[0], texts[1])
        assert np.array_equal(texts[0], probes.text(domain, 0, 1, 100))


def test_the_suite_runs_on_text_and_says_what_it_found() -> None:
    tokenizer, uses = ByteTokenizer(), Uses(lifelong=True)
    config = dataclasses.replace(SIZES, vocab=tokenizer.vocab_size, span=64, window=64)
    model = small_model(torch.float32, config)
    probes = TextFacts(tokenizer.encode, tokenizer.eos_id, [tokenizer.encode("Held-out text. " * 99)], 0)
    answers = run(uses, Options(streams=2, documents=(0, 1), lengths=(250,)), model, probes)
    found = evaluation_of(answers, probes.domains[0], probes.chance)
    assert set(found.curves) == {"lifelong_documents", "lifelong_tokens", "lifelong_forgetting"}
    ways = len(ablations_of(uses))
    assert len(found.tables["lifelong"]) == len(answers) == ways * 2 + 2 * 2
    curve = found.curves["lifelong_documents"]
    assert curve.x == (0, 1) and len(curve.series) == ways and curve.levels == {"chance": 0.25}
    assert found.curves["lifelong_tokens"].x == (65, 321)
    assert list(found.curves["lifelong_forgetting"].series) == ["held-out text", "stories", "lists of words"]
    for values in curve.series.values():
        assert all(0 <= value <= 1 for value in values)
    assert found.scalars["lifelong/all_on/documents_1"] == curve.series["all on"][1]
    assert 0 <= found.scalars["forgetting/stories/documents_1"] <= 1
    assert all(math.isfinite(value) for value in found.scalars.values())


def test_curves_are_of_the_shortest_documents_or_of_all() -> None:
    answers = [
        Answers(NOTHING, "own", 0, 10, 4, 4), Answers(NOTHING, "own", 1, 40, 3, 4), Answers("EM", "own", 1, 40, 0, 4),
        Answers(NOTHING, "own", 0, 40, 1, 4), Answers(NOTHING, "own", 1, 100, 2, 4),
        Answers(NOTHING, "other", 0, 10, 4, 4), Answers(NOTHING, "other", 1, 40, 1, 4),
    ]  # fmt: skip
    found = evaluation_of(answers, "own", 0.25)
    assert found.curves["lifelong_documents"].series["all on"] == (1, 0.75)
    assert math.isnan(found.curves["lifelong_documents"].series["EM off"][0])
    # One long document or two short ones: the questions of both.
    assert found.curves["lifelong_tokens"].x == (10, 40, 100)
    assert found.curves["lifelong_tokens"].series["all on"] == (1, 0.5, 0.5)
    assert found.curves["lifelong_forgetting"].series == {"other": (1, 0.25), "own": (1, 0.75)}
    assert found.scalars["forgetting/other/documents_1"] == 0.25
    assert found.scalars["lifelong/EM_off/documents_1"] == 0


def test_refusals() -> None:
    with pytest.raises(UserError, match=r"--documents 1,0: give rising"):
        Options(documents=(1, 0))
    with pytest.raises(UserError, match=r"--lengths 4,4: give rising"):
        Options(lengths=(4, 4))
    with pytest.raises(UserError, match=r"--lengths 8: what is told has 8 tokens: give 24 or more"):
        run(Uses(), Options(lengths=(8,)))
