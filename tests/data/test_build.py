"""From a run's configuration to its loader."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import EvaluationConfig, ModelConfig, RunConfig
from pipeline.data.build import build_loader, build_source
from pipeline.data_config import DataConfig, RecallConfig
from pipeline.parallel.topology import Topology


def config(data: DataConfig | None = None, **changes: Any) -> RunConfig:
    plain = {"steps": 1, "batch_size": 2, "sequence_length": 32, "lr": 1e-3, "grad_accum": 2}
    return RunConfig("test", ModelConfig(), data=data or DataConfig(), **(plain | changes))


def test_a_recall_task_stands_in_the_place_of_documents(refusal: Callable[..., str]) -> None:
    data = DataConfig(path=("absent.txt",), recall=RecallConfig(pairs=2, queries=2, min_gap=2, max_gap=20))
    loader = build_loader(config(data, grad_accum=2), Topology(), vocab_size=193)
    assert "synthetic recall" in loader.describe() and len(loader.next_step()) == 2
    held_out = build_loader(config(data, grad_accum=2), Topology(), vocab_size=193, held_out=True)
    (batch,) = held_out.next_step()
    assert batch.input_ids.shape == (config().batch_size, config().sequence_length)
    assert not torch.equal(batch.input_ids, loader.next_step()[0].input_ids)
    few = refusal(build_loader, config(data), Topology(), vocab_size=192)
    assert few.startswith("--data.recall: the task has 193 token ids and the model 192")


def test_the_default_is_the_standard_library() -> None:
    assert build_source(config()).name == build_source(config(DataConfig(dataset="stdlib"))).name == "stdlib"
    training = build_loader(config(), Topology(), vocab_size=260)
    held_out = build_loader(config(), Topology(), vocab_size=260, held_out=True)
    assert [b.input_ids.shape for b in training.next_step()] == [(2, 32), (2, 32)]
    assert len(held_out.next_step()) == 2
    assert "tokenizer bytes (260 ids)" in training.describe()


def test_sequence_ranks_share_and_data_ranks_divide() -> None:
    steps = {}
    for rank in range(4):
        topology = Topology(rank=rank, world=4, sequence=2)
        steps[rank] = build_loader(config(), topology, vocab_size=260).next_step()
    for first, second in ((0, 1), (2, 3)):
        for a, b in zip(steps[first], steps[second], strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.streams, b.streams)
    assert [b.streams.tolist() for b in steps[0] + steps[2]] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_evaluation_rows() -> None:
    for rows, micro_batches in ((0, [2, 2]), (5, [5])):
        evaluated = config(evaluation=EvaluationConfig(batch_size=rows))
        held_out = build_loader(evaluated, Topology(), vocab_size=260, held_out=True)
        assert [len(b.streams) for b in held_out.next_step()] == micro_batches
    seeds = [build_loader(config(seed=s), Topology(), vocab_size=260, held_out=True).next_step()[0] for s in (1, 2)]
    assert torch.equal(seeds[0].input_ids, seeds[1].input_ids)


def test_paths_and_data_sets(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"row {i}"}) + "\n" for i in range(50)))
    local = DataConfig(path=(str(path),), text_field="body", holdout=0.2)
    batch = build_loader(config(local), Topology(), vocab_size=260).next_step()[0]
    assert bytes(batch.input_ids[0, :4].tolist()) == b"row "
    streamed = DataConfig(dataset=str(tmp_path), text_field="body", holdout=0.2, shuffle_buffer=5)
    batch = build_loader(config(streamed), Topology(), vocab_size=260).next_step()[0]
    assert bytes(batch.input_ids[0, :4].tolist()) == b"row "


def test_what_becomes_of_records_and_changes_is_configured(
    tmp_path: Path, refusal: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"row {row} {chr(0xD800) if row == 2 else ''}"}) for row in range(50)]
    path.write_text("\n".join([lines[0], "{", *lines[1:]]))
    stopping, skipping, accepting = (
        config(DataConfig(path=(str(path),), holdout=0.2, shuffle=False, **options))  # type: ignore[arg-type]
        for options in ({}, {"on_bad_record": "skip"}, {"on_change": "accept", "on_bad_record": "skip"})
    )
    assert "--data.on-bad-record skip" in refusal(build_loader(stopping, Topology(), vocab_size=260).next_step)
    topology = Topology(rank=1, world=2, sequence=2)
    build_loader(skipping, topology, vocab_size=260).next_step()
    assert not caplog.records, "the rank that shares the sequence says it"
    loader = build_loader(skipping, Topology(world=2, sequence=2), vocab_size=260)
    loader.next_step()
    assert "rows.jsonl:2 is not JSON" in caplog.text and "read as U+FFFD" in caplog.text
    state = loader.state_dict()
    path.write_text("\n".join(lines))
    for changed, accepted in ((skipping, False), (accepting, True)):
        resumed = build_loader(changed, Topology(), vocab_size=260)
        if accepted:
            resumed.load_state_dict(state)
        else:
            assert "--data.on-change accept" in refusal(resumed.load_state_dict, state)


def test_refusals(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "does not exist" in refusal(build_source, config(DataConfig(path=(str(tmp_path / "absent"),))))
    assert "--data.shuffle-buffer is 0" in refusal(build_source, config(DataConfig(dataset="x", shuffle_buffer=0)))
    wrong = dataclasses.replace(DataConfig(), tokenizer="./absent")
    assert "--data.tokenizer ./absent does not exist" in refusal(
        build_loader, config(wrong), Topology(), vocab_size=260
    )
