"""A prompt of any length is read in the same memory and at the same speed (`make accept NAME=long_prompt`)."""

from __future__ import annotations

import gc
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.systems.miras.decoding.decoder import MirasDecoder
from pipeline.systems.miras.model import MirasModel
from tests.systems.miras.decoding.harness import model_of, parallel_logits

SHORT, LONG, LONGEST = 20_000, 200_000, 1_000_000
BLOCK = 20_000
ENDS = 10
"""Blocks of a text's beginning, and of its end, whose speed is compared."""

Record = Callable[[str, object], None]
needs_reset = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of this process's memory cannot be reset"
)


def model(attachment: str) -> MirasModel:
    sizes = {"hidden_size": 128, "head_dim": 32}
    return model_of(attachment, dtype=torch.float32, family=sizes, window=128, head_dim=32, context=256)


def prompt(tokens: int) -> Tensor:
    return torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1))


def peak_bytes(work: Callable[[], object]) -> int:
    """The largest resident memory of this process while it works."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    work()
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
@needs_reset
def test_peak_memory_does_not_grow_with_the_prompt(record_property: Record) -> None:
    decoder = MirasDecoder(model("mixed"))
    texts = {tokens: prompt(tokens) for tokens in (SHORT, LONGEST)}
    # What the first pass of all leaves in the process is there for either.
    decoder.read(texts[SHORT], decoder.empty(1))
    peaks = {}
    for tokens, ids in texts.items():
        peaks[tokens] = peak_bytes(lambda ids=ids: decoder.read(ids, decoder.empty(1)))
        record_property(f"peak memory at {tokens} tokens", f"{peaks[tokens] / 2**20:.0f} MiB")
    assert peaks[LONGEST] < 1.05 * peaks[SHORT]


@pytest.mark.slow
def test_the_speed_does_not_depend_on_what_was_read(record_property: Record) -> None:
    """In CPU time, which other processes do not take from this one."""
    decoder = MirasDecoder(model("mixed"))
    state, ids = decoder.empty(1), prompt(LONGEST)
    decoder.read(ids[:, :BLOCK], decoder.empty(1))
    seconds, begun = [], time.perf_counter()
    for block in ids.split(BLOCK, dim=1):
        start = time.process_time()
        decoder.read(block, state)
        seconds.append(time.process_time() - start)
    wall = time.perf_counter() - begun
    first, last = (BLOCK / statistics.median(part) for part in (seconds[:ENDS], seconds[-ENDS:]))
    record_property("tokens per CPU second, first 200K and last 200K of 1M", f"{first:.0f}, {last:.0f}")
    record_property("tokens/s", f"{LONGEST / wall:.0f}")
    assert state.lengths.tolist() == [LONGEST]
    assert abs(last / first - 1) < 0.1
