"""Text samples: memories are written on the way, and neither the model nor the streams of training change."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipeline.data.tokenizer import ByteTokenizer
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.system import StepContext
from pipeline.systems.neuromorphic import samples as module
from pipeline.systems.neuromorphic.decoding import NeuromorphicDecoder
from pipeline.systems.neuromorphic.facts import FactsLoader
from pipeline.systems.neuromorphic.facts_config import FactsConfig
from pipeline.systems.neuromorphic.samples import PROMPT, WRITTEN, held_out_texts, text_samples
from pipeline.systems.neuromorphic.state import Uses
from tests.systems.neuromorphic.small import EOS, SIZES, small_model

TOKENIZER = ByteTokenizer()
CONFIG = dataclasses.replace(SIZES, vocab=TOKENIZER.vocab_size)
TASK = FactsConfig(facts=2, within=2, fillers=64, least_distance=8, least_tokens=70, most_tokens=120)


class Seen(NeuromorphicDecoder):
    """Keeps the state that it draws from."""

    def join(self, states):
        self.state = super().join(states)
        return self.state


class Alone(SyncPoint):
    """Of a rank that no other waits for here."""

    def __call__(self, *_, **__):
        return {}


def context(step: int = 200) -> StepContext:
    return StepContext(Topology(), 3, "B", step)


@pytest.fixture(scope="module")
def model():
    return small_model(torch.float32, CONFIG)


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    loader = FactsLoader(TASK, sequence_length=96, batch_size=4, held_out=True)
    return held_out_texts(loader, EOS, SyncPoint(Topology()))


def test_texts_have_a_context_and_end_within_one_document(texts: list[np.ndarray]) -> None:
    assert len(texts) == 3
    loader = FactsLoader(TASK, sequence_length=96, batch_size=4, held_out=True)
    streams = np.concatenate([loader.next_step()[0].input_ids.numpy() for _ in range(8)], axis=1)
    for text in texts:
        assert len(text) >= 96 + PROMPT + WRITTEN
        assert any(np.array_equal(text, stream[: len(text)]) for stream in streams)
        assert EOS not in text[-PROMPT - WRITTEN :]


@pytest.mark.parametrize(("world", "batch_size"), [(2, 2), (3, 1), (4, 1)])
def test_ranks_find_the_texts_that_one_rank_finds(world: int, batch_size: int, monkeypatch) -> None:
    """A rank of one row has one text at most: the others are of other ranks."""
    barrier, given = threading.Barrier(world, timeout=20), [None] * world

    def gather(topology: Topology, value):
        if topology.world == 1:
            return [value]
        given[topology.rank] = value
        barrier.wait()
        everyone = list(given)
        barrier.wait()
        return everyone

    monkeypatch.setattr(module, "all_gather_object", gather)

    def texts_of(rank: int, world: int, batch_size: int) -> list[np.ndarray]:
        layout = {"data_rank": rank, "data_degree": world, "batch_size": batch_size}
        loader = FactsLoader(TASK, sequence_length=96, held_out=True, **layout)
        return held_out_texts(loader, EOS, Alone(Topology(rank=rank, world=world)))

    one = texts_of(0, 1, world * batch_size)
    with ThreadPoolExecutor(world) as ranks:
        found = list(ranks.map(lambda rank: texts_of(rank, world, batch_size), range(world)))
    assert len(one) == 3
    for texts in found:
        assert [text.tolist() for text in texts] == [text.tolist() for text in one]


def test_short_documents_give_no_text() -> None:
    task = dataclasses.replace(TASK, least_tokens=30, most_tokens=40)
    assert held_out_texts(FactsLoader(task, sequence_length=96, batch_size=4), EOS, SyncPoint(Topology())) == []


def test_a_sample_writes_memories_and_changes_nothing_else(model, texts: list[np.ndarray]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    noise = torch.get_rng_state()
    decoder, texts = Seen(model, Uses(), eos_id=EOS), texts[:2]
    sample = text_samples(decoder, TOKENIZER, texts, context(), SyncPoint(Topology()))
    assert torch.equal(torch.get_rng_state(), noise)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [t.truth for t in sample.texts] == [TOKENIZER.decode(text[-WRITTEN:]) for text in texts]
    assert [t.prompt for t in sample.texts] == [TOKENIZER.decode(text[-PROMPT - WRITTEN : -WRITTEN]) for text in texts]
    # What was written within the sample alone differs from what the context left.
    state = decoder.state
    assert state.lengths.tolist() == [len(text) - 1 for text in texts]
    assert (state.begin.procedural.strengths > 0).any() and (state.begin.episodic.strengths > 0).any()
    context_alone = decoder.empty(1)
    decoder.read(torch.from_numpy(texts[0][:-WRITTEN])[None], context_alone)
    for memory in ("procedural", "episodic"):
        assert not torch.equal(getattr(state.begin, memory).keys[:1], getattr(context_alone.begin, memory).keys)


def test_the_noise_is_a_function_of_seed_phase_and_step(model, texts: list[np.ndarray], monkeypatch) -> None:
    monkeypatch.setattr(module, "WRITTEN", 8)
    decoder = NeuromorphicDecoder(model, Uses(), eos_id=EOS)
    first, again, other = (
        text_samples(decoder, TOKENIZER, [texts[0][-40:]], context(step), SyncPoint(Topology()))
        for step in (200, 200, 400)
    )
    assert first == again and first.texts[0].written != other.texts[0].written
