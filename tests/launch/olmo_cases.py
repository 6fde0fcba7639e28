"""What parity_main runs of the olmo system: gradients by layout, and updates beside a plain PyTorch loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config import OptimizerConfig, ParallelConfig, RunConfig
from pipeline.data.batch import TokenBatch
from pipeline.data_config import DataConfig
from pipeline.ds_config import deepspeed_config
from pipeline.engine import Engine, building
from pipeline.lm.config import BackboneConfig
from pipeline.parallel.loss import add_counts, scaled_loss
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.schedule import lr_multiple, schedule_of
from pipeline.system import StepContext, create_system
from pipeline.systems.olmo.config import OlmoConfig
from tests.launch.whole import full_state

STEPS = 20
MODELS = ("olmo", "olmo2")


def olmo(kind: str, *, rows: int, length: int, vocabulary: int, **changes: Any) -> RunConfig:
    """olmo: tied and clipped, documents see each other; olmo2: z-loss, documents apart, recomputed blocks."""
    backbone = BackboneConfig(
        trainable=True, model_type="olmo" if kind == "olmo" else "olmo2", tied=kind == "olmo", layers=3, width=32,
        heads=4, kv_heads=4, ffn=48, vocabulary=vocabulary, rope_theta=100.0,
        clip_qkv=0.6 if kind == "olmo" else None, norm_eps=1e-5 if kind == "olmo" else 1e-6,
    )  # fmt: skip
    model = OlmoConfig(
        backbone=backbone, initialisation="mitchell" if kind == "olmo" else "normal", decay_norms=kind == "olmo2",
        z_loss=0.0 if kind == "olmo" else 0.01,
    )  # fmt: skip
    config = RunConfig(
        recipe="parity", model=model, steps=STEPS, batch_size=rows, sequence_length=length, lr=1e-3, clip=0.0,
        data=DataConfig(document_mask=kind == "olmo2"), activation_checkpointing=kind == "olmo2",
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def updates(
    kind: str, zero: str, topology: Topology, batches: list[list[TokenBatch]], whole: list[TokenBatch], out: Path
) -> dict[str, float]:
    """Largest difference of a weight from those of a plain loop after STEPS updates, and how far weights moved.

    `batches`: this data rank's micro-batches by step; `whole`: the same of all ranks in one batch.
    """
    rows, length = whole[0].input_ids.shape
    config = olmo(kind, rows=rows, length=length, vocabulary=64)
    folder = out / f"plain-{kind}"
    plain = _plain(config, folder, topology)
    assert isinstance(config.model, OlmoConfig)
    backbone = dataclasses.replace(config.model.backbone, pretrained=str(folder), clip_qkv=None)
    config = dataclasses.replace(
        config,
        # Documents see each other, as plain transformers has it, and cross-entropy alone is the loss.
        model=dataclasses.replace(config.model, backbone=backbone, z_loss=0.0),
        data=DataConfig(),
        lr=3e-3,
        warmup_steps=5,
        clip=1.0,
        weight_decay=0.1,
        grad_accum=len(batches[0]),
        batch_size=batches[0][0].rows,
        zero=zero,
        parallel=ParallelConfig(sequence=topology.sequence),
        optimizer=OptimizerConfig(eps=1e-5, warmup_start=0.1),
    )
    system, ds_config = create_system(config), deepspeed_config(config)
    with building(ds_config, torch.float32):
        model = system.build()
    system.initialise(model, topology)
    (phase,) = system.phases(model)
    engine = Engine(model, phase, config, ds_config)
    for step in range(1, STEPS + 1):
        counts = SyncPoint(topology)(f"step {step}", counts=add_counts(map(system.count, batches[step - 1])))
        for batch in batches[step - 1]:
            output = system.forward(engine.deepspeed, batch, {}, StepContext(topology, 0, "train", step))
            engine.backward(scaled_loss(output.sums, counts, topology))
        engine.step(lr_multiple(schedule_of(config), config.steps, step))
    after = full_state(engine.module, [name for name, _ in engine.module.named_parameters()])
    found = {name.removeprefix("backbone."): value for name, value in after.items()}
    if topology.rank:
        return {}
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    _update(plain, kind, whole)
    expected = dict(plain.named_parameters())
    assert found.keys() == expected.keys()
    return {
        "difference": max(float((found[name] - value.detach()).abs().max()) for name, value in expected.items()),
        "moved": min(float((before[name] - value.detach()).abs().max()) for name, value in expected.items()),
    }


def _update(plain: Any, kind: str, whole: list[TokenBatch]) -> None:
    """STEPS updates by AdamW of the batches of all ranks."""
    decayed = [
        name
        for name, _ in plain.named_parameters()
        if "proj" in name or (name == "lm_head.weight") or (kind == "olmo2" and "norm" in name)
    ]
    groups = [
        {"params": [p for name, p in plain.named_parameters() if (name in decayed) is decays], "weight_decay": decay}
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-5)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        part = whole[step - 1]
        logits = plain(part.input_ids).logits
        # The mean over counted labels.
        F.cross_entropy(logits.flatten(0, 1), part.labels.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * _rate(step)
        optimizer.step()


def _rate(step: int) -> float:
    """From a tenth of the peak in five steps, then along a cosine to a tenth of it, written out."""
    if step <= 5:
        return 0.1 + 0.9 * step / 5
    return 0.1 + 0.9 * 0.5 * (
        1 + float(torch.cos(torch.tensor((step - 5) / (STEPS - 5), dtype=torch.float64) * torch.pi))
    )


def _plain(config: RunConfig, folder: Path, topology: Topology) -> Any:
    """A decoder of transformers with its own attention and random weights, saved in the folder by rank 0."""
    assert isinstance(config.model, OlmoConfig)
    sizes = config.model.backbone
    made = AutoConfig.for_model(
        sizes.model_type, vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, tie_word_embeddings=sizes.tied,
        initializer_range=0.1, rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
        **({} if sizes.clip_qkv is None else {"clip_qkv": sizes.clip_qkv}),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32)
    if topology.rank == 0:
        plain.save_pretrained(folder)
    if topology.world > 1:
        dist.barrier()
    return plain
