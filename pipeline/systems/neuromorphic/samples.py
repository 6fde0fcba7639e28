"""Text samples in training: held-out texts that the model goes on with, its memories written on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from pipeline.data.batch import StatefulLoader, TokenBatch
from pipeline.data.sources.base import digest
from pipeline.data.tokenizer import Tokenizer
from pipeline.evaluation_result import Continuation, Continuations
from pipeline.lm.decoding import Decoder
from pipeline.lm.sampling import Sampling
from pipeline.parallel.collectives import all_gather_object
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import StepContext

Text = TypeVar("Text", bound=TokenBatch)
NAME = "text_samples"
"""Of the sample, and of its files."""
TEXTS, PROMPT, WRITTEN = 3, 20, 40
TEMPERATURE, TOP_K = 0.8, 50
STEPS = 8
"""Held-out steps in which texts are looked for."""


def held_out_texts(loader: StatefulLoader[Text], eos_id: int, sync_point: SyncPoint) -> list[np.ndarray]:
    """TEXTS stretches of held-out streams from their start, whose last PROMPT + WRITTEN tokens are of one document; of
    the streams of all ranks, and the same on every rank and number of ranks. What comes before them, a step at the
    least, is what the memories have to go by. Fewer, maybe none, where documents are too short. Collective."""
    rows: dict[int, list[np.ndarray]] = {}
    found: dict[int, np.ndarray] = {}
    for step in range(STEPS):
        for batch in next_step(loader, sync_point, "samples"):
            for stream, ids in zip(batch.streams.tolist(), batch.input_ids.numpy(), strict=True):
                rows.setdefault(stream, []).append(ids)
        for stream, parts in rows.items():
            before = np.concatenate(parts[:-1]) if step else np.empty(0, np.int64)
            place = _place(parts[-1], eos_id) if step and stream not in found else None
            if place is not None:
                found[stream] = np.concatenate([before, parts[-1][: place + PROMPT + WRITTEN]])
        # By stream: the ranks of a sequence have the same ones.
        everyone = all_gather_object(sync_point.topology, (set(found), set(rows)))
        with_text, streams = (set().union(*sets) for sets in zip(*everyone, strict=True))
        if len(with_text) >= min(TEXTS, len(streams)):
            break
    chosen = sorted(with_text)[:TEXTS]
    own = {stream: found[stream] for stream in chosen if stream in found}
    shared = {stream: text for part in all_gather_object(sync_point.topology, own) for stream, text in part.items()}
    return [shared[stream] for stream in chosen]


def _place(ids: np.ndarray, eos_id: int) -> int | None:
    """Where the first PROMPT + WRITTEN tokens begin among which no document ends."""
    ends = np.concatenate([[-1], np.flatnonzero(ids == eos_id), [len(ids)]])
    for begin, end in zip(ends[:-1] + 1, ends[1:], strict=True):
        if end - begin >= PROMPT + WRITTEN:
            return int(begin)
    return None


@torch.no_grad()
def text_samples(
    decoder: Decoder, tokenizer: Tokenizer, texts: Sequence[np.ndarray], context: StepContext, sync_point: SyncPoint
) -> Continuations:
    """What the model writes after each text but its last WRITTEN tokens, beside these. Tokens are drawn at TEMPERATURE
    from the TOP_K likeliest; the noise is a function of seed, phase and step. Collective: every rank draws the same."""
    if not texts:
        return Continuations(())
    sampling = Sampling(TEMPERATURE, TOP_K, 1.0, digest("text samples", context.seed, context.phase, context.step))
    states, logits = [], []
    for number, text in enumerate(texts, 1):
        sync_point(f"samples, {number} of {len(texts)}")
        states.append(decoder.empty(1))
        logits.append(decoder.read(torch.from_numpy(text[None, :-WRITTEN]), states[-1]))
    state, behind = decoder.join(states), torch.cat(logits)
    drawn: list[list[int]] = []
    for place in range(WRITTEN):
        if place:
            sync_point(f"samples, token {place + 1}")
            behind = decoder.step(torch.tensor(drawn[-1]), state)
        lengths = [int(length) for length in state.lengths]
        drawn.append(sampling.choose(behind[:, : tokenizer.vocab_size], range(len(texts)), lengths))
    found = []
    for text, written in zip(texts, zip(*drawn, strict=True), strict=True):
        prompt, truth = text[-PROMPT - WRITTEN : -WRITTEN], text[-WRITTEN:]
        found.append(Continuation(*(tokenizer.decode(part) for part in (prompt, written, truth))))
    return Continuations(tuple(found))
