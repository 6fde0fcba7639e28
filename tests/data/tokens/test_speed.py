"""How fast token files are made and read, and what a start over many of them costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.data.sources.local import standard_library
from pipeline.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from tests.data.tokens.conftest import open_loader

Record = Callable[[str, Any], None]


START = """
import json, resource, sys, time

# What every start has: the program, with what reads documents.
import pipeline.train
from pipeline.config import ModelConfig, RunConfig
from pipeline.data.build import build_loader
from pipeline.data_config import DataConfig
from pipeline.parallel.topology import Topology

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

assert "pipeline.data.tokens.loader" not in sys.modules
config = RunConfig(
    recipe="", model=ModelConfig(), data=DataConfig(tokens=(sys.argv[1],)), steps=1, lr=1.0, batch_size=8, grad_accum=8,
    sequence_length=2048,
)
before, begun = peak(), time.perf_counter()
training, held_out = (build_loader(config, Topology(), vocab_size=50_304, held_out=side) for side in (False, True))
assert training.fingerprint["source"]["source 1"]["tokens"] == 10**10
for loader in (training, held_out):
    loader.next_step()
assert training.state_dict()["windows"] == 64
print(json.dumps([time.perf_counter() - begun, peak() - before, len(training.sources[0])]))
"""
"""Both loaders of a token file, with their first batches and the fingerprint of the data: what they add to a start."""


@pytest.mark.slow
def test_a_start_over_ten_billion_tokens(tmp_path: Path, record_property: Record) -> None:
    """At most 2 s and 100 MB at its peak, in a process that has read no token file before."""
    path = tmp_path / "sparse.npy"
    with path.open("wb") as file:
        file.truncate(2 * 10**10)
    found = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", START, str(path)], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    seconds, _, windows = sorted(found)[1]
    record_property("start, s (of 3 processes)", ", ".join(f"{run[0]:.2f}" for run in found))
    record_property("start, MB at the peak", f"{max(run[1] for run in found) / 1e6:.1f}")
    assert windows > 4_700_000 and seconds < 2 and max(run[1] for run in found) < 100e6


@pytest.mark.slow
def test_a_rank_reads_ten_million_tokens_a_second(tmp_path: Path, record_property: Record) -> None:
    path = tmp_path / "a.npy"
    np.random.default_rng(0).integers(0, 50_000, 200_000_000, np.uint16).tofile(path)
    loader = open_loader([str(path)], sequence_length=2048, batch_size=8, grad_accum=8, vocab=50_304, held_out=False)
    loader.next_step()
    begun, steps = time.perf_counter(), 400
    for _ in range(steps):
        loader.next_step()
    speed = steps * 64 * 2048 / (time.perf_counter() - begun)
    record_property("loader, tokens/s", f"{speed:,.0f}")
    assert speed > 10e6


@pytest.mark.slow
def test_prepare_is_nearly_as_fast_as_the_tokenizer_alone(
    tmp_path: Path, bpe_folder: Path, record_property: Record
) -> None:
    """At least 80 % of what `encode_batch` of the library does on the same cores, in turn, the better of two."""
    source = standard_library()
    texts = [source[index].text for index in range(len(source))] * 8
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer(str(bpe_folder))
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer._backend is not None
    alone, whole = [], []
    for turn in range(2):
        begun = time.perf_counter()
        tokens = 0
        for start in range(0, len(texts), 256):
            found = tokenizer._backend.encode_batch_fast(texts[start : start + 256], add_special_tokens=False)
            tokens += sum(len(encoding.ids) for encoding in found)
        alone.append(tokens / (time.perf_counter() - begun))
        out = tmp_path / f"out-{turn}"
        begun = time.perf_counter()
        assert main(["data", "prepare", "--path", str(path), "--tokenizer", str(bpe_folder), "--out", str(out)]) == 0
        whole.append(tokens / (time.perf_counter() - begun))
    share = max(whole) / max(alone)
    record_property("cores", len(os.sched_getaffinity(0)))
    record_property("prepare, share of the tokenizer's speed", f"{share:.2f}")
    assert share > 0.8
