"""What a step is estimated to hold is what the model's own code holds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from pipeline.config import RunConfig, replace
from pipeline.host.devices import find_device
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.lm.pretrained import backbone_config
from pipeline.ops import chunks, native, scan_native
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_64k
from pipeline.system import create_system
from pipeline.systems.miras.activation_step import Step, runs_natively
from pipeline.systems.miras.activations import block_bytes, branch_bytes, carry_bytes, scan_bytes, step_bytes
from pipeline.systems.miras.config import DistillationConfig, MemoryConfig, MirasConfig
from pipeline.systems.miras.memory import MemoryBranch
from pipeline.systems.miras.rule_config import MlpConfig, SlotsConfig, SwigluConfig, YaadConfig
from pipeline.systems.miras.rules import memory_backend
from tests.ops.saved import saved_by
from tests.systems.miras.traced import traced_step

TINY = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "ffn": 512, "vocabulary": 260}


def make(layers: tuple[int, ...] = (1, 3), trainable: bool = True, **memory: object) -> MirasConfig:
    sizes = {"heads": 4, "head_dim": 32, "persistent": 4, "gate_rank": 16, "chunk": 64, **memory}
    return MirasConfig(
        backbone=BackboneConfig(trainable=trainable, **TINY),
        attention=AttentionConfig(window=64, sinks=4),
        memory=MemoryConfig(layers=layers, **sizes),  # type: ignore[arg-type]
    )


def step(
    config: MirasConfig, element: int = 2, *, rows: int = 2, sequence: int = 512, degree: int = 1, **changes: bool
) -> Step:
    return Step(config, backbone_config(config.backbone), element, rows, sequence, degree, **changes)


def wide(changes: dict[str, object], memory: dict[str, object]) -> RunConfig:
    """The shape of miras_64k's layers at a quarter of its width: three of them, a memory on the second."""
    sizes = {"layers": 3, "width": 512, "heads": 4, "kv_heads": 4, "ffn": 2048, "vocabulary": 1000}
    sizes |= {name: changes.pop(name) for name in ("model_type", "kv_heads", "tied", "trainable") if name in changes}
    model = MirasConfig(
        backbone=BackboneConfig(**sizes),  # type: ignore[arg-type]
        attention=AttentionConfig(
            window=1024, sinks=int(str(changes.pop("sinks", 4))), kind=changes.pop("kind", "window")
        ),  # type: ignore[arg-type]
        memory=MemoryConfig(**{"layers": (1,), "heads": 4, "head_dim": 128, **memory}),  # type: ignore[arg-type]
    )
    if "distillation" in changes:
        model = dataclasses.replace(model, distil="full", distillation=changes.pop("distillation"))
    run = {"activation_checkpointing": True, "precision": "bf16", **changes}
    return RunConfig("", model, steps=1, batch_size=2, sequence_length=2048, lr=1.0, **run)  # type: ignore[arg-type]


WEIGHED = SlotsConfig(importance=True)

TRACED = [
    pytest.param({}, {}, 1, 0.05, id="frozen, recomputed, bf16"),
    pytest.param({"precision": "fp32"}, {}, 1, 0.05, id="fp32"),
    pytest.param({"trainable": True}, {}, 1, 0.05, id="trainable"),
    pytest.param({"activation_checkpointing": False}, {}, 1, 0.05, id="not recomputed"),
    pytest.param({}, {}, 4, 0.05, id="four sequence ranks"),
    pytest.param({"kind": "full"}, {}, 1, 0.05, id="full attention"),
    pytest.param({"sinks": 0}, {}, 1, 0.05, id="no sinks"),
    pytest.param({}, {"heads": 8}, 1, 0.05, id="memories wider than the model"),
    pytest.param({}, {"attachment": "mal"}, 1, 0.05, id="mal"),
    pytest.param({}, {"attachment": "mag"}, 1, 0.05, id="mag"),
    pytest.param({}, {"backend": "torch"}, 1, 0.05, id="scan in PyTorch"),
    pytest.param({}, {"attachment": "overflow", "rule": "delta"}, 1, 0.1, id="overflow"),
    pytest.param({"kv_heads": 2, "model_type": "llama"}, {"attachment": "overflow"}, 1, 0.1, id="overflow, grouped"),
    pytest.param(
        {"activation_checkpointing": False},
        {"layers": (0, 1), "overflow_layers": (1,)},
        1,
        0.1,
        id="overflow beside residual",
    ),
    pytest.param({}, {"attachment": "slots"}, 1, 0.1, id="slots"),
    pytest.param({}, {"attachment": "slots", "slots": WEIGHED}, 1, 0.1, id="slots, weighed"),
    pytest.param(
        {"activation_checkpointing": False},
        {"attachment": "slots", "slots": WEIGHED},
        4,
        0.1,
        id="slots, weighed, not recomputed",
    ),
    pytest.param({"kv_heads": 2, "model_type": "llama"}, {"attachment": "slots"}, 1, 0.1, id="slots, grouped"),
    pytest.param({"activation_checkpointing": False}, {"attachment": "slots"}, 4, 0.1, id="slots, not recomputed"),
    pytest.param(
        {"kv_heads": 2, "model_type": "llama", "activation_checkpointing": False},
        {"attachment": "slots"},
        1,
        0.1,
        id="slots, grouped, not recomputed",
    ),
    pytest.param({"model_type": "llama", "kv_heads": 2, "tied": True}, {}, 1, 0.1, id="llama, grouped and tied"),
    pytest.param({"model_type": "qwen3", "trainable": True}, {}, 1, 0.1, id="qwen3, trainable"),
    pytest.param({"model_type": "olmo", "activation_checkpointing": False}, {}, 1, 0.1, id="olmo, not recomputed"),
    pytest.param({"distillation": DistillationConfig()}, {}, 1, 0.1, id="distilled"),
    pytest.param(
        {"distillation": DistillationConfig(tokens=300, hidden=1.0, cross_entropy=1.0)},
        {},
        1,
        0.1,
        id="distilled by every term",
    ),
    pytest.param(
        {"distillation": DistillationConfig(), "activation_checkpointing": False},
        {},
        4,
        0.1,
        id="distilled on four sequence ranks, not recomputed",
    ),
    pytest.param({}, {"rule": "yaad", "gradient_chunk": 128}, 1, 0.2, id="yaad"),
    pytest.param({}, {"rule": "mlp", "gradient_chunk": 512}, 1, 0.3, id="mlp"),
    pytest.param({}, {"rule": "swiglu", "swiglu": SwigluConfig(gradient_chunk=512)}, 1, 0.3, id="swiglu"),
]


@pytest.mark.parametrize("changes, memory, degree, tolerance", TRACED)
def test_a_step_holds_what_the_estimate_says(
    changes: dict, memory: dict, degree: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a step's own code, run on tensors without storage. Scratch memory of the native kernels is not in sight."""
    config = wide(dict(changes), memory)
    assert isinstance(config.model, MirasConfig)
    element = 4 if config.precision == "fp32" else 2
    natively = native.load("cpu") and config.model.memory.chunk_start is None and "backend" not in memory
    monkeypatch.setattr(scan_native, "workspace_bytes", lambda *_: 0)
    estimated = step(
        config.model, element, rows=2, sequence=2048, degree=degree,
        recompute=config.activation_checkpointing, natively=natively,
    )  # fmt: skip
    carry = 2 * carry_bytes(config.model, estimated.backbone, element) // degree
    found, carried = traced_step(config, monkeypatch, degree=degree, natively=natively)
    assert sum(step_bytes(estimated)) + carry == pytest.approx(found, rel=tolerance)
    assert sum(entry.tensor.nbytes for entry in carried.values()) == pytest.approx(carry, rel=0.05)


def activations(config: RunConfig, sequence: int = 1) -> int:
    """All of it but the carry."""
    topology = Topology(world=sequence, sequence=sequence)
    device = find_device("H200")
    assert device is not None
    held = create_system(config).activation_bytes(topology, 2, device)
    return sum(held.values()) - held["carry"]


def test_activations_follow_tokens_and_recomputation() -> None:
    config = replace(miras_64k(), parallel__sequence=1)
    assert activations(replace(config, batch_size=8)) == pytest.approx(2 * activations(replace(config, batch_size=4)))
    # Rotations and ids are of whole sequences on every rank.
    assert activations(config) / 2 < activations(config, sequence=2) < 0.52 * activations(config)
    assert activations(replace(config, activation_checkpointing=False)) > 1.5 * activations(config)


def test_a_frozen_backbone_keeps_less() -> None:
    for recompute in (False, True):
        frozen = sum(step_bytes(step(make(trainable=False), recompute=recompute)))
        assert frozen < sum(step_bytes(step(make(), recompute=recompute)))
        assert sum(step_bytes(step(make(layers=(3,), trainable=False), recompute=recompute))) < frozen


def test_old_and_new_carries_of_all_micro_batches_are_there_at_the_end_of_a_step() -> None:
    device = find_device("H200")
    assert device is not None
    config = miras_64k()
    assert isinstance(config.model, MirasConfig)
    window = 2 * 16 * (4096 + 4) * 2048 * 2
    states = 4 * 2 * 16 * 128 * 128 * 4
    for grad_accum, degree in ((1, 1), (4, 1), (4, 4)):
        held = create_system(replace(config, grad_accum=grad_accum)).activation_bytes(
            Topology(world=degree, sequence=degree), 2, device
        )
        assert held["carry"] == 2 * grad_accum * 8 * (window + states) // degree


@pytest.mark.parametrize(
    "name, memory, element, natively",
    [
        ("H100", {}, 2, True),
        ("A100 40GB", {}, 2, True),
        ("B300", {}, 4, True),
        ("L40S", {}, 2, False),
        ("RTX 5090", {}, 4, False),
        ("L40S", {"head_dim": 32}, 4, True),
        ("H100", {"backend": "torch"}, 2, False),
        ("H100", {"rule": "yaad"}, 2, False),
        ("H100", {"head_dim": 96}, 2, False),
    ],
)
def test_the_scan_runs_natively_where_its_kernels_fit(name: str, memory: dict, element: int, natively: bool) -> None:
    device = find_device(name)
    assert device is not None
    assert runs_natively(MemoryConfig(**{"head_dim": 128, **memory}), element, device) is natively


def test_memory_as_context_carries_the_segment_that_it_does_again() -> None:
    backbone = backbone_config(make().backbone)
    sizes = [carry_bytes(make(attachment=name, context=48), backbone, 4) for name in ("mac", "residual")]
    assert sizes[0] - sizes[1] == 2 * (48 + 4 - 2) * (4 * 4 * (4 * 32 + 2) + 8)


def test_a_deep_memory_carries_its_weights() -> None:
    def carried(**changes: object) -> int:
        config = make(layers=(1,), **changes)
        return carry_bytes(config, backbone_config(config.backbone), 2)

    window = carried() - 8 * 4 * 32 * 32
    assert carried(rule="mlp") == window + 8 * 4 * 2 * 128 * 32
    assert carried(rule="swiglu") == window + 8 * 4 * 3 * 64 * 32


def a_memory_keeps(memory: MemoryConfig, dtype: torch.dtype, sequence: int = 512) -> int:
    """Bytes that a branch of two rows leaves for the backward pass."""
    branch = MemoryBranch(512, memory, 1e-6)
    for parameter in branch.parameters():
        nn.init.normal_(parameter, std=0.02)
    branch.to(dtype)
    hidden = torch.randn(2, sequence, 512).to(dtype).requires_grad_()
    segments = torch.zeros(2, sequence, dtype=torch.int64)
    _, total = saved_by(lambda: branch(hidden, segments, None, Topology()), known=[hidden, *branch.parameters()])
    return total


def estimate(memory: MemoryConfig, element: int, sequence: int = 512, natively: bool = False) -> int:
    config = dataclasses.replace(make(), memory=memory)
    kept, _ = scan_bytes(step(config, element, sequence=sequence, natively=natively), memory)
    return 2 * sequence * branch_bytes(memory, 512, element, 128) + kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_memory_keeps_what_the_estimate_says(
    recomputed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one span needs while it is recomputed is not kept, and so not in the sum."""
    memory = MemoryConfig(layers=(0,), heads=4, head_dim=128, backend="torch")
    if recomputed:
        monkeypatch.setattr(chunks, "KEEP", 0)
        for name in ("SPAN_CPU", "SPAN_GPU"):
            monkeypatch.setattr(chunks, name, 2**20)
    assert estimate(memory, dtype.itemsize) == pytest.approx(a_memory_keeps(memory, dtype), rel=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_memory_keeps_what_the_estimate_says_on_the_backend_that_auto_takes(dtype: torch.dtype) -> None:
    memory = MemoryConfig(layers=(0,), heads=4, head_dim=128)
    natively = memory_backend(memory, "cpu", dtype) == "cpu"
    found = a_memory_keeps(memory, dtype)
    assert estimate(memory, dtype.itemsize, natively=natively) == pytest.approx(found, rel=0.25)


FAMILY = [
    pytest.param({"rule": "moneta"}, id="moneta"),
    pytest.param({"rule": "yaad", "gradient_chunk": 32}, id="yaad"),
    pytest.param({"rule": "yaad", "yaad": YaadConfig(momentum=True)}, id="yaad with momentum"),
    pytest.param({"rule": "memora"}, id="memora"),
    pytest.param({"rule": "mlp"}, id="mlp"),
    pytest.param({"rule": "mlp", "mlp": MlpConfig(hidden=2, momentum=False)}, id="mlp without momentum"),
    pytest.param({"rule": "swiglu", "swiglu": SwigluConfig(gradient_chunk=64)}, id="swiglu"),
    pytest.param({"rule": "swiglu", "swiglu": SwigluConfig(gradient_chunk=64, muon=True)}, id="muon"),
]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("changes", FAMILY)
def test_a_chunk_start_memory_keeps_what_the_estimate_says(
    changes: dict, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = MemoryConfig(layers=(0,), heads=4, head_dim=32, **changes)
    monkeypatch.setattr(chunks, "KEEP", 0 if recomputed else 2**40)
    for name in ("SPAN_CPU", "SPAN_GPU"):
        monkeypatch.setattr(chunks, name, 2**15)
    actual = a_memory_keeps(memory, torch.float32, 256)
    assert estimate(memory, 4, sequence=256) == pytest.approx(actual, rel=0.3)


def test_a_large_scan_in_pytorch_keeps_its_inputs_alone() -> None:
    """8 sequences of 64K tokens; two sequence ranks keep half each, and the working set stays that of one span."""
    config = miras_64k().model
    assert isinstance(config, MirasConfig)

    def scan(rows: int, sequence: int, degree: int = 1) -> tuple[int, int]:
        return scan_bytes(step(config, rows=rows, sequence=sequence, degree=degree, natively=False), config.memory)

    small, _ = scan(1, 1024)
    large, working = scan(8, 65_536)
    assert large < 512 * small / 8
    assert 2**30 < working < 6 * 2**30
    half, same = scan(8, 65_536, degree=2)
    assert half < 0.51 * large
    assert same == working


def test_a_block_holds_one_copy_of_the_window_that_it_reads_with_its_own_keys() -> None:
    short, long = (block_bytes(step(make(), rows=3, sequence=length))[0] for length in (512, 1024))
    assert 2 * short - long == 2 * 2 * 128 * 64 * 3
