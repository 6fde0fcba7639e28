"""olmo_tiny as a user runs it, beside an add-one byte bigram and a plain PyTorch loop of the same model in its time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.callbacks.metrics import read_rows
from pipeline.capabilities import TrainsDecoder
from pipeline.config import RunConfig, replace
from pipeline.data.batch import IGNORED, StatefulLoader, TokenBatch
from pipeline.data.build import build_loader
from pipeline.engine import building
from pipeline.lm.pretrained import backbone_config
from pipeline.parallel.topology import Topology
from pipeline.recipes.olmo import olmo_tiny
from pipeline.schedule import lr_multiple, schedule_of
from pipeline.system import create_system
from pipeline.systems.olmo.config import OlmoConfig
from tests.launch.harness import single

CORES = len(os.sched_getaffinity(0))
GOAL = 2.6
"""Bits per byte; the bigram has about 3.5."""
LONGEST = 240
"""Seconds, on two cores."""
BYTES = 256
"""Ids that are bytes; the others of the tokenizer stand for none."""


def loader(config: RunConfig, *, held_out: bool) -> StatefulLoader[TokenBatch]:
    assert isinstance(config.model, OlmoConfig)
    return build_loader(config, Topology(), vocab_size=config.model.backbone.vocabulary, held_out=held_out)


def pairs(loader: StatefulLoader[TokenBatch], steps: int) -> tuple[Tensor, Tensor]:
    """Every id that has a label, and its label, in `steps` steps."""
    ids, labels = [], []
    for _ in range(steps):
        for batch in loader.next_step():
            counted = batch.labels != IGNORED
            ids.append(batch.input_ids[counted])
            labels.append(batch.labels[counted])
    return torch.cat(ids), torch.cat(labels)


def bigram(config: RunConfig) -> float:
    """Bits per byte of what is held out, of add-one counts over the training files."""
    assert isinstance(config.model, OlmoConfig)
    vocabulary = config.model.backbone.vocabulary
    # Long rows read the files once in little time.
    ids, labels = pairs(loader(replace(config, sequence_length=65_536, batch_size=8), held_out=False), 24)
    counts = torch.ones(vocabulary, vocabulary, dtype=torch.float64)
    counts.view(-1).index_add_(0, ids * vocabulary + labels, torch.ones_like(ids, dtype=torch.float64))
    log_shares = (counts / counts.sum(1, keepdim=True)).log2()
    ids, labels = pairs(loader(config, held_out=True), config.evaluation.steps)
    return float(-log_shares[ids, labels].sum()) / int((labels < BYTES).sum())


def first_weights(config: RunConfig) -> dict[str, Tensor]:
    """Those that a run of the recipe starts from, by transformers' names."""
    system = create_system(config)
    assert isinstance(system, TrainsDecoder)
    with building({}, torch.float32):
        model = system.build()
    system.initialise(model, Topology())
    return {name.removeprefix(system.decoder_prefix): value for name, value in model.state_dict().items()}


def plain_loop(config: RunConfig, seconds: float) -> tuple[float, int]:
    """Bits per byte, and updates, of a loop on transformers' decoder and torch's AdamW that stops after `seconds`.

    It has the recipe's first weights, batches, schedule, decay groups and clipping, and attention within the sequence
    by SDPA.
    """
    assert isinstance(config.model, OlmoConfig)
    model: Any = AutoModelForCausalLM.from_config(
        backbone_config(config.model.backbone), attn_implementation="sdpa", dtype=torch.float32
    )
    found = model.load_state_dict(first_weights(config), strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    groups = [
        {"params": [p for name, p in model.named_parameters() if ("proj" in name) is decays], "weight_decay": decay}
        for decays, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True)
    data, schedule, step = loader(config, held_out=False), schedule_of(config), 0
    begun = time.perf_counter()
    while step < config.steps and time.perf_counter() - begun < seconds:
        step += 1
        (batch,) = data.next_step()
        loss = F.cross_entropy(
            model(batch.input_ids).logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_multiple(schedule, config.steps, step)
        optimizer.step()
    nats, length, held_out = 0.0, 0, loader(config, held_out=True)
    with torch.no_grad():
        for _ in range(config.evaluation.steps):
            for batch in held_out.next_step():
                logits = model(batch.input_ids).logits.flatten(0, 1)
                labels = batch.labels.flatten()
                nats += float(F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
                length += int(((labels >= 0) & (labels < BYTES)).sum())
    return nats / math.log(2) / length, step


@pytest.mark.slow
def test_held_out_text_takes_fewer_bits_than_the_goal_in_less_than_four_minutes(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    begun = time.perf_counter()
    done = single(
        "pipeline", "train", "olmo_tiny", "--output-dir", str(tmp_path), timeout=1200, OMP_NUM_THREADS=str(CORES)
    )
    seconds = time.perf_counter() - begun
    assert done.returncode == 0, done.stderr
    last = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["mode"] == "val"][-1]
    config = olmo_tiny()
    torch.set_num_threads(CORES)
    by_bigram = bigram(config)
    plain, steps = plain_loop(config, seconds)
    record_property("bits per byte", round(last["bpb"], 3))
    record_property("of an add-one byte bigram", round(by_bigram, 3))
    record_property("of a plain PyTorch loop in the same time", f"{plain:.3f} after {steps} of {config.steps} steps")
    record_property("seconds", round(seconds))
    assert 3.3 < by_bigram < 3.7
    assert last["bpb"] < GOAL
    assert seconds < LONGEST
