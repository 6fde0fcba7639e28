"""Questions about long text: what a model that remembers, one that guesses and one that forgets get."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import replace
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.text_tasks import FORMS
from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from pipeline.lm.held_out import Modes
from pipeline.lm.long_text import DEPTHS, Background, draw_text, evaluate_long_text, read_background
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Evaluation, StepContext
from tests.lm.systems import MODES, OFF, ON, config

BYTES = ByteTokenizer()


class Reader:
    """A model of bytes that remembers the text of the last `span` tokens word for word, and answers what stands there.

    A needle's number it finds where the prompt stands in what it remembers; else all answers cost the same.
    """

    files = None

    def __init__(self, corpus: Path, span: int = 10**9) -> None:
        self.config = replace(config(256), data__path=(str(corpus),), data__holdout=0.5)
        self.span = span

    def forward(self, model: nn.Module, batch: TokenBatch, carry: Mapping, context: StepContext) -> object:
        past = carry.get("text", torch.empty(batch.rows, 0, dtype=torch.int64))
        assert int(batch.positions[0, 0]) == past.shape[1], "the text goes on where it stopped"
        losses = torch.zeros(batch.labels.shape)
        predictions = torch.full_like(batch.labels, -1)
        for row in range(batch.rows):
            counted = (batch.labels[row] != IGNORED).nonzero().flatten()
            if not len(counted):
                continue
            known = torch.cat([past[row], batch.input_ids[row, : int(counted[0]) + 1]])[-self.span :]
            text = BYTES.decode(known)
            prompt = text[text.rindex("\n") + 1 :]
            found = text.find(f"{prompt} ") if context.options["memory"] else -1
            answer = BYTES.decode(batch.labels[row, counted])
            right = found >= 0 and text[found + len(prompt) :].startswith(f"{answer}.")
            losses[row, counted] = 0.1 if right else 1.0
            if right:
                predictions[row, counted] = batch.labels[row, counted]
        tokens = {"losses": losses, "predictions": predictions}
        return types.SimpleNamespace(tokens=tokens, carry={"text": torch.cat([past, batch.input_ids], 1)})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    for number in range(20):
        words = [alphabet[i % 20 : i % 20 + 4] + alphabet[(i + number) % 26] for i in range(100)]
        lines = [" ".join(words[at : at + 8]) for at in range(0, 96, 8)]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")
    return folder


def evaluate(
    system: Reader,
    lengths: tuple[int, ...],
    documents: int = 8,
    modes: Modes = MODES,
    forms: Sequence[str] = FORMS,
) -> Evaluation:
    arguments = (system, nn.Linear(1, 1), SyncPoint(Topology()), modes)
    more = {"documents": documents, "forms": forms, "edges": {"window": 64.0}}
    return evaluate_long_text(*arguments, lengths=lengths, **more)  # type: ignore[arg-type]


def test_a_model_that_remembers_all_finds_every_needle(corpus: Path) -> None:
    found = evaluate(Reader(corpus), (4000, 5001))
    heat_map = found.heat_maps["needle"]
    assert heat_map.x == (4000, 5001) and heat_map.y == DEPTHS and heat_map.count == 8 and heat_map.chance == 1 / 4
    assert heat_map.series[ON] == ((1.0, 1.0),) * len(DEPTHS)
    low, high = heat_map.intervals[ON][0][0]
    assert 0.6 < low < 0.7 and high == 1
    assert found.scalars["needle/4000"] == found.scalars["exact/needle/4000"] == 1
    assert found.scalars["memory_off/exact/needle/5001"] == 0
    # Without a difference in cost the first candidate is taken: as often right as a guess.
    assert found.scalars["memory_off/needle/4000"] < 0.6
    assert {f"text_{form.replace(' ', '_')}" for form in FORMS} == set(found.curves)
    curve = found.curves["text_needle"]
    assert curve.counts == (40, 40) and curve.levels == {"chance, 1 in 4": 1 / 4} and curve.series[ON] == (1, 1)
    assert found.curves["text_qa1"].counts == (8, 8) and set(found.curves["text_qa1"].series) == {ON, OFF}


def test_modes_that_do_the_same_are_run_once(corpus: Path) -> None:
    class Counted(Reader):
        forwards = 0

        def forward(self, *arguments: Any) -> object:
            self.forwards += 1
            return super().forward(*arguments)

    two, three = Counted(corpus), Counted(corpus)
    evaluate(two, (4000,))
    found = evaluate(three, (4000,), modes={**MODES, "memory emptied": MODES[OFF]})
    assert two.forwards == three.forwards
    emptied, off = (found.heat_maps["needle"].series[mode] for mode in ("memory emptied", OFF))
    assert emptied == off != found.heat_maps["needle"].series[ON]


def test_a_model_that_remembers_a_part_finds_the_needles_in_it(corpus: Path) -> None:
    heat_map = evaluate(Reader(corpus, span=2000), (4000,)).heat_maps["needle"]
    shares = [row[0] for row in heat_map.series[ON]]
    assert shares[-2:] == [1, 1] and max(shares[:2]) < 0.9


def test_a_text_is_exactly_so_long_and_holds_every_sentence(corpus: Path) -> None:
    background = read_background(Reader(corpus), BYTES, 10_000)
    ids, task = draw_text(background, BYTES.encode, 4096, 3)
    again, _ = draw_text(background, BYTES.encode, 4096, 3)
    other, _ = draw_text(background, BYTES.encode, 4096, 4)
    assert len(ids) == 4096 and (ids == again).all() and (ids != other).any()
    text = BYTES.decode(ids)
    place = 0
    for _, sentence in task.facts:
        place = text.index(f"{sentence}\n", place) + len(sentence)
    assert len(task.questions) == len(DEPTHS) + 5


def test_a_text_without_some_forms_has_none_of_their_sentences(corpus: Path) -> None:
    background = read_background(Reader(corpus), BYTES, 10_000)
    ids, task = draw_text(background, BYTES.encode, 1024, 3, forms=("needle",))
    assert len(ids) == 1024 and [one.form for one in task.questions] == ["needle"] * len(DEPTHS)
    assert len(task.facts) == len(DEPTHS)
    _, task = draw_text(background, BYTES.encode, 4096, 3, forms=("qa1", "variables"))
    assert {one.form for one in task.questions} == {"qa1", "variables"}
    assert not any("magic" in sentence or "List of words" in sentence for _, sentence in task.facts)
    found = evaluate(Reader(corpus), (1024,), forms=("qa1",))
    assert set(found.curves) == {"text_qa1"} and not found.heat_maps


def test_the_background_is_held_out_text(corpus: Path) -> None:
    background = read_background(Reader(corpus), BYTES, 10**6)
    lines = {line for file in corpus.iterdir() for line in file.read_text().splitlines(keepends=True)}
    assert {BYTES.decode(piece) for piece in background.pieces} <= lines
    assert 0 < sum(map(len, background.pieces)) < sum(len(file.read_text()) for file in corpus.iterdir())
    assert all(4 <= len(word) <= 10 for word in background.words)


def test_what_cannot_be_asked_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--lengths 256: the sentences of the tasks take"):
        evaluate(Reader(corpus), (256,))
    for lengths in ((4096, 4096), (4096, 1024)):
        with pytest.raises(UserError, match="give rising lengths, each once"):
            evaluate(Reader(corpus), lengths)
    poor = tmp_path / "poor"
    poor.mkdir()
    for number in range(20):
        (poor / f"{number}.txt").write_text("only four words here\n")
    with pytest.raises(UserError, match="different words of 4 to 10 small letters, and the tasks need 32"):
        evaluate(Reader(poor), (4000,))


def test_pieces_are_short_enough_to_put_sentences_between_them(tmp_path: Path) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    words = " ".join(f"{a}{b}{a}{b}" for a in "abcdef" for b in "ghijklmnop")
    for number in range(20):
        (folder / f"{number}.txt").write_text(words * 3)
    found = read_background(Reader(folder), BYTES, 2000)
    assert isinstance(found, Background) and max(map(len, found.pieces)) == 256
