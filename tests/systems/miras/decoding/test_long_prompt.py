"""A prompt of any length is read in the same memory and at the same speed (`make accept NAME=long_prompt`)."""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.systems.miras.decoding.decoder import MirasDecoder
from pipeline.systems.miras.model import MirasModel
from tests.systems.miras.decoding.harness import model_of, parallel_logits

SHORT, LONG, LONGEST = 20_000, 200_000, 1_000_000
REPEATS = 9
"""Timed reads of SHORT tokens behind either text."""

Record = Callable[[str, object], None]


def model(attachment: str) -> MirasModel:
    sizes = {"hidden_size": 128, "head_dim": 32}
    return model_of(attachment, dtype=torch.float32, family=sizes, window=128, head_dim=32, context=256)


def prompt(tokens: int) -> Tensor:
    return torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1))


def peak_bytes(tokens: int) -> int:
    """The largest resident memory of a new process that reads so many tokens, and only one text."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_read_once, tokens).result()


def _read_once(tokens: int) -> int:
    decoder = MirasDecoder(model("mixed"))
    decoder.read(prompt(tokens), decoder.empty(1))
    # Unlike getrusage's, this peak is not that of the process which started this one.
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("attachment", ["residual", "overflow", "mac"])
def test_pieces_equal_one_pass(attachment: str, record_property: Record) -> None:
    long, ids = model(attachment), prompt(LONG)
    decoder = MirasDecoder(long)
    found = decoder.read(ids, decoder.empty(1))
    difference = float((found - parallel_logits(long, ids)[:, -1]).abs().max())
    record_property(f"{attachment}: pieces and one pass of {LONG} tokens differ by", f"{difference:.1e}")
    assert difference < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status tells the peak of a process")
def test_peak_memory_does_not_grow_with_the_prompt(record_property: Record) -> None:
    peaks = {tokens: peak_bytes(tokens) for tokens in (SHORT, LONGEST)}
    for tokens, peak in peaks.items():
        record_property(f"peak memory at {tokens} tokens", f"{peak / 2**20:.0f} MiB")
    assert peaks[LONGEST] < 1.05 * peaks[SHORT]


@pytest.mark.slow
def test_the_speed_does_not_depend_on_what_was_read(record_property: Record) -> None:
    """A text goes on after 20K and after a million tokens, in turn, so that what else the machine does meets both."""
    decoder, ids = MirasDecoder(model("mixed")), prompt(LONGEST)
    states = {tokens: decoder.empty(1) for tokens in (SHORT, LONGEST)}
    begun = time.perf_counter()
    for tokens, state in states.items():
        decoder.read(ids[:, :tokens], state)
    wall = time.perf_counter() - begun
    seconds: dict[int, list[float]] = {tokens: [] for tokens in states}
    for _ in range(REPEATS):
        for tokens, state in states.items():
            start = time.process_time()
            decoder.read(ids[:, :SHORT], state)
            seconds[tokens].append(time.process_time() - start)
    first, last = (SHORT / statistics.median(seconds[tokens]) for tokens in (SHORT, LONGEST))
    record_property(f"tokens per CPU second behind {SHORT} and {LONGEST} tokens", f"{first:.0f}, {last:.0f}")
    record_property("tokens/s", f"{(SHORT + LONGEST) / wall:.0f}")
    assert states[LONGEST].lengths.tolist() == [LONGEST + REPEATS * SHORT]
    assert abs(last / first - 1) < 0.1
