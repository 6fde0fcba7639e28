"""Questions about long text, of any model with a tokenizer: needles by length and depth, other forms by length.

A text is read once, through the carry. Each question is then read from a copy of the carry, with each of its candidate
answers, and the likeliest answer is the model's. Memory in use does not grow with the length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.data.build import build_source
from pipeline.data.long_recall import generator
from pipeline.data.sources.base import Order
from pipeline.data.text_tasks import (
    CANDIDATES,
    FORMS,
    Encode,
    Question,
    TextTask,
    common_words,
    haystack,
    needles,
    of_forms,
    story,
    together,
    variables,
)
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.lm.held_out import Evaluated, Modes, run_as
from pipeline.lm.long_recall import check_rising
from pipeline.lm.long_text_report import Answer, summarise
from pipeline.parallel.collectives import all_gather_object, shared_errors
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, Evaluation, StepContext

LENGTHS = (1024, 4096, 16_384)
"""Tokens of the text, by default."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where needles stand, as shares of the text."""
LONGEST_PIECE = 256
"""Tokens of a piece of text between which sentences may be put; a longer line is cut."""
PIECE = 2048
"""Least number of tokens that one forward pass reads; as many whole sequences as that takes."""
ROWS = 8
"""Texts that are read side by side, where `--evaluation.batch-size` does not say."""


class Background(NamedTuple):
    """Held-out text: token ids line by line, and words that stand in it."""

    pieces: list[np.ndarray]
    words: list[str]


class ReadsText(Evaluated, Protocol):
    """A system that is evaluated on text: `files` as in `System`."""

    files: Any


def evaluate_long_text(
    system: ReadsText,
    model: nn.Module,
    sync_point: SyncPoint,
    modes: Modes,
    *,
    lengths: Sequence[int] = LENGTHS,
    documents: int = 96,
    forms: Sequence[str] = FORMS,
    edges: Mapping[str, float],
) -> Evaluation:
    """Share of right answers in every mode: a heat map of needles by length and depth, curves of all forms by length.

    At least `documents` texts a length, each with what `forms` ask for: a needle at every depth, a story, chains of
    variables and a list of words. Scalars are `needle/4096`, `memory_off/qa1/4096`, and `exact/...` of answers that
    greedy decoding writes. `edges`: the curves' vertical lines, in tokens by label. Raises UserError. Collective.
    """
    topology = sync_point.topology
    tokenizer = load_tokenizer(system.config.data.tokenizer, system.config.data.trust_remote_code)
    with shared_errors(topology):
        check_rising(lengths)
        background = read_background(system, tokenizer, max(lengths))
    rows = system.config.evaluation.batch_size or min(ROWS, system.config.batch_size)
    batches = math.ceil(documents / (rows * topology.data))
    same = run_as(modes)
    run = {mode: modes[mode] for mode in same.values()}
    answers: list[Answer] = []
    for length in lengths:
        for index in range(batches):
            first = (index * topology.data + topology.data_rank) * rows
            keys = [(system.config.seed, length, first + row) for row in range(rows)]
            with shared_errors(topology):
                texts = [draw_text(background, tokenizer.encode, length, *key, forms=forms) for key in keys]
            answers += _ask(system, model, sync_point, run, tokenizer, length, texts, first)
    answers += [answer._replace(mode=mode) for mode in modes for answer in answers if mode != same[mode] == answer.mode]
    # The ranks of a sequence group have found the same.
    parts = all_gather_object(topology, answers if topology.sequence_rank == 0 else [])
    return summarise([answer for part in parts for answer in part], modes, lengths, edges)


def read_background(system: ReadsText, tokenizer: Tokenizer, tokens: int) -> Background:
    """Held-out lines of `tokens` tokens in all, or of all held-out text where that is less. Raises UserError."""
    data = system.config.data
    order = Order(1, range(1), held_out=True, holdout=data.holdout, shuffle=False, seed=0)
    pieces: list[np.ndarray] = []
    words: dict[str, None] = {}
    total = 0
    for document in build_source(system.config, system.files).open(order).scan():
        if document.problem is not None:
            continue
        for line in document.text.splitlines(keepends=True):
            ids = tokenizer.encode(line)
            pieces += [ids[at : at + LONGEST_PIECE] for at in range(0, len(ids), LONGEST_PIECE)]
            total += len(ids)
            words.update(dict.fromkeys(re.findall(r"\b[a-z]{4,10}\b", line)))
        if total >= tokens and len(words) >= 100:
            break
    if len(words) < 32:
        raise UserError(
            f"the held-out text has {len(words)} different words of 4 to 10 small letters, and the tasks need 32: give"
            " more text with --data.path, or hold out a larger share with --data.holdout"
        )
    return Background(pieces, sorted(words))


def draw_text(
    background: Background, encode: Encode, length: int, *key: object, forms: Sequence[str] = FORMS
) -> tuple[np.ndarray, TextTask]:
    """(ids [length] int64, what stands in them and is asked): a function of the background, the length, `key` and the
    forms; sentences of others are left out."""
    draw = generator("text", *key)
    drawn = [
        needles(draw, background.words, DEPTHS),
        variables(draw),
        common_words(draw, background.words),
        story(draw),
    ]
    task = together([asked for one in drawn if (asked := of_forms(one, forms)).questions])
    facts = [(depth, encode(f"{sentence}\n")) for depth, sentence in task.facts]
    return haystack(background.pieces, length, facts, int(draw.integers(len(background.pieces)))), task


def _ask(
    system: Evaluated,
    model: nn.Module,
    sync_point: SyncPoint,
    modes: Modes,
    tokenizer: Tokenizer,
    length: int,
    texts: Sequence[tuple[np.ndarray, TextTask]],
    first: int,
) -> list[Answer]:
    """Every mode's answers to all questions about texts of one length, read side by side."""
    topology, device = sync_point.topology, next(model.parameters()).device
    # Sequence ranks share whole numbers of tokens: what is left over at the end is read with the question.
    shared = length // topology.sequence * topology.sequence
    ids = torch.from_numpy(np.stack([text for text, _ in texts]))
    streams = first + torch.arange(len(texts))
    whole = system.config.sequence_length
    piece = -(-PIECE // whole) * whole
    carries: dict[str, Carry] = {mode: {} for mode in modes}
    for start in range(0, shared, piece):
        part = ids[:, start : min(start + piece, shared)]
        batch = _batch(part, torch.full_like(part, IGNORED), start, streams).to(device)
        for mode, options in modes.items():
            sync_point("evaluation")
            context = StepContext(topology, system.config.seed, "evaluation", 1, options)
            carries[mode] = system.forward(model, batch, carries[mode], context).carry
    answers = []
    for number in range(len(texts[0][1].questions)):
        questions = [task.questions[number] for _, task in texts]
        batches = list(_with_candidates(tokenizer, questions, ids[:, shared:], shared, streams, topology.sequence))
        for mode, options in modes.items():
            context = StepContext(topology, system.config.seed, "evaluation", 1, {**options, "predict": True})
            nats, exact = [], []
            for batch in batches:
                sync_point("evaluation")
                found = _answered(
                    system.forward(model, batch.to(device), carries[mode], context).tokens, batch, sync_point
                )
                nats.append(found[0])
                exact.append(found[1])
            for row, question in enumerate(questions):
                right = question.candidates.index(question.answer)
                chosen = int(torch.stack(nats)[:, row].argmin()) == right
                answers.append(Answer(mode, length, question.form, question.depth, chosen, bool(exact[right][row])))
    return answers


def _batch(ids: Tensor, labels: Tensor, start: int, streams: Tensor) -> TokenBatch:
    positions = torch.arange(start, start + ids.shape[1]).expand(ids.shape[0], -1)
    return TokenBatch(ids, labels, torch.zeros_like(ids), positions, streams)


def _with_candidates(
    tokenizer: Tokenizer, questions: Sequence[Question], rest: Tensor, start: int, streams: Tensor, degree: int
) -> Iterator[TokenBatch]:
    """Per candidate the rest of the text [rows, few], the question and that answer, labelled at the answer alone.

    What stands behind the answer, to make rows equally long, changes nothing before it.
    """
    for number in range(CANDIDATES):
        rows = []
        for row, question in enumerate(questions):
            # Encoded apart: every answer stands behind the same tokens of the prompt.
            prompt = tokenizer.encode(question.prompt)
            both = np.concatenate([prompt, tokenizer.encode(question.candidates[number])])
            rows.append((np.concatenate([rest[row].numpy(), both]), rest.shape[1] + len(prompt)))
        width = -(-max(len(ids) for ids, _ in rows) // degree) * degree
        ids = torch.full((len(rows), width), tokenizer.eos_id)
        labels = torch.full_like(ids, IGNORED)
        for row, (known, answer) in enumerate(rows):
            ids[row, : len(known)] = torch.from_numpy(known)
            labels[row, answer - 1 : len(known) - 1] = ids[row, answer : len(known)]
        yield _batch(ids, labels, start, streams)


def _answered(tokens: Mapping[str, Tensor], batch: TokenBatch, sync_point: SyncPoint) -> tuple[Tensor, Tensor]:
    """(nats of the answer [rows] float64, whether all its tokens are the likeliest [rows]), on the CPU."""
    topology = sync_point.topology
    labels = batch.labels[:, topology.shard(batch.labels.shape[1])]
    counted = labels != IGNORED
    wrong = (tokens["predictions"].cpu() != labels) & counted
    nats = (tokens["losses"].cpu().double() * counted).sum(1)
    sums = torch.stack([nats, wrong.sum(1).double()])
    if topology.sequence_group is not None:
        parts = all_gather_object(topology, sums)
        begin = topology.data_rank * topology.sequence
        sums = torch.stack(parts[begin : begin + topology.sequence]).sum(0)
    return sums[0], sums[1] == 0
