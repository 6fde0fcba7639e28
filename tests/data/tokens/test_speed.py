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
import psutil
import pytest

from pipeline.cli import main
from pipeline.data.sources.local import standard_library
from pipeline.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from tests.data.tokens.conftest import open_loader

Record = Callable[[str, Any], None]


def start_over(path: str) -> None:
    """Opens the loader of a file, and prints the seconds and bytes that it adds to this process."""
    open_loader([path], sequence_length=16, batch_size=1, vocab=50_304, held_out=True).next_step()
    process = psutil.Process()
    before, begun = process.memory_info().rss, time.perf_counter()
    loader = open_loader([path], sequence_length=2048, batch_size=8, grad_accum=8, vocab=50_304)
    loader.next_step()
    loader.state_dict()
    seconds = time.perf_counter() - begun
    print(json.dumps([seconds, process.memory_info().rss - before, len(loader.sources[0])]))


@pytest.mark.slow
def test_a_start_over_ten_billion_tokens(tmp_path: Path, record_property: Record) -> None:
    """At most 2 s and 100 MB, with the fingerprint and the first step."""
    path = tmp_path / "sparse.npy"
    with path.open("wb") as file:
        file.truncate(2 * 10**10)
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.data.tokens.test_speed import start_over; start_over({str(path)!r})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, added, windows = json.loads(done.stdout.splitlines()[-1])
    record_property("start, s", f"{seconds:.2f}")
    record_property("start, MB", f"{added / 1e6:.1f}")
    assert windows > 4_700_000 and seconds < 2 and added < 100e6


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
