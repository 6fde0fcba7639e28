"""FLOPs are those of a count by hand, and of the published table for OLMo2-1B."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from pipeline.config import RunConfig
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.lm.pretrained import backbone_config
from pipeline.recipes.miras import miras_64k
from pipeline.system import Flops, create_system
from pipeline.systems.miras.config import DistillationConfig, MemoryConfig, MirasConfig
from pipeline.systems.miras.flops import attention_reach, count_flops, scan_flops
from pipeline.systems.miras.rule_config import MlpConfig, SlotsConfig, SwigluConfig, YaadConfig

TINY = {"trainable": True, "layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "ffn": 512, "vocabulary": 260}
MEMORY = {"heads": 4, "head_dim": 32, "persistent": 4, "gate_rank": 16, "chunk": 64}


def make(layers: tuple[int, ...] = (1, 3), kind: str = "window", **backbone: object) -> MirasConfig:
    return MirasConfig(
        backbone=BackboneConfig(**{**TINY, **backbone}),  # type: ignore[arg-type]
        attention=AttentionConfig(kind=kind, window=64, sinks=4),  # type: ignore[arg-type]
        memory=MemoryConfig(layers=layers, **MEMORY),  # type: ignore[arg-type]
    )


def flops(config: MirasConfig, length: int = 1024) -> Flops:
    return count_flops(config, backbone_config(config.backbone), length)


# By hand, for the sizes above: multiply-adds of the matrices of one block, of the head, and of one memory.
BLOCK = 2 * (4 * 128 * 128 + 3 * 128 * 512)
HEAD = 2 * 128 * 260
ATTENTION = 4 * 128 * 68
BRANCH = 2 * (4 * 128 * 128 + 2 * 128 * 4 + 16 * (128 + 128) + 2 * 4 * 128)
SCAN = 4 * (12 * 32**2 + 8 * 64 * 32 + 64**2)


def test_forward_by_hand() -> None:
    assert flops(make()).forward == 4 * (BLOCK + ATTENTION) + HEAD + 2 * (BRANCH + SCAN) == 2_851_840


def test_a_trained_model_goes_back_at_twice_the_cost() -> None:
    count = flops(make())
    assert count.backward == 2 * count.forward
    assert count.total == 3 * count.forward


def test_below_the_first_memory_of_a_frozen_backbone_nothing_goes_back() -> None:
    """Memories on layers 1 and 3: blocks 2 and 3 and the head pass gradients on and have none of their own."""
    expected = 2 * (BLOCK + 2 * ATTENTION) + HEAD + 2 * 2 * (BRANCH + SCAN)
    assert flops(make(trainable=False)).backward == expected
    assert flops(make(trainable=False)).forward == flops(make()).forward


def test_a_memory_on_the_last_layer_leaves_the_head_alone_to_go_back_through() -> None:
    assert flops(make(layers=(3,), trainable=False)).backward == HEAD + 2 * (BRANCH + SCAN)


def test_a_frozen_model_without_memory_has_nothing_to_learn() -> None:
    assert flops(make(layers=(), trainable=False)).backward == 0


@pytest.mark.parametrize(
    "config",
    [make(), make(kv_heads=2), make(layers=()), make(layers=(0, 1, 2))],
    ids=["tiny", "grouped keys", "no memory", "three memories"],
)
def test_forward_is_two_per_weight_of_a_matrix_plus_attention_and_scan(config: MirasConfig) -> None:
    """Weights as the model itself holds them."""
    system = create_system(RunConfig("", config, steps=1, batch_size=1, sequence_length=1024, lr=1.0))
    with torch.device("meta"):
        model = system.build()
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    weights += sum(p.numel() for name, p in model.named_parameters() if "persistent" in name)
    expected = 2 * weights + 4 * ATTENTION + len(config.memory.layers) * SCAN
    assert system.flops(1024) == flops(config)
    assert flops(config).forward == expected


def attached(attachment: str, **backbone: object) -> MirasConfig:
    config = make(**backbone)  # type: ignore[arg-type]
    memory = dataclasses.replace(config.memory, attachment=attachment, context=48)  # type: ignore[arg-type]
    return dataclasses.replace(config, memory=memory)


def test_memory_as_context_costs_two_per_weight_its_reads_its_attention_and_the_scan_of_a_segment() -> None:
    config = attached("mac")
    system = create_system(RunConfig("", config, steps=1, batch_size=1, sequence_length=1024, lr=1.0))
    with torch.device("meta"):
        model = system.build()
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    products = ("persistent", "context_kv", "write", "out_gate")
    weights += sum(p.numel() for name, p in model.named_parameters() if any(word in name for word in products))
    heads, dim = 4, 32
    reads, attention = 2 * dim**2, 4 * dim * 24.5
    scan = 12 * dim**2 + 8 * 48 * dim + 48**2
    expected = 2 * weights + 4 * ATTENTION + 2 * heads * (reads + attention + scan)
    assert flops(config).forward == expected


def test_memory_of_what_leaves_the_window_costs_two_per_weight_and_the_scan_whatever_sizes_are_given() -> None:
    config = attached("overflow")
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, heads=3, head_dim=8))
    system = create_system(RunConfig("", config, steps=1, batch_size=1, sequence_length=1024, lr=1.0))
    with torch.device("meta"):
        model = system.build()
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    weights += sum(p.numel() for name, p in model.named_parameters() if "_map" in name)
    assert flops(config).forward == 2 * weights + 4 * ATTENTION + 2 * SCAN


def test_memories_of_two_kinds_each_cost_their_own() -> None:
    config = attached("residual", trainable=False)
    memory = dataclasses.replace(config.memory, heads=2, overflow_layers=(3,))
    residual, overflow = 2 * (4 * 128 * 64 + 2 * 128 * 2 + 16 * (128 + 64) + 2 * 4 * 64), 2 * 4 * 2 * (128 + 32**2)
    without = flops(dataclasses.replace(config, memory=dataclasses.replace(config.memory, layers=())))
    count = flops(dataclasses.replace(config, memory=memory))
    assert count.forward - without.forward == residual + SCAN / 2 + overflow + SCAN


def test_what_goes_back_in_the_first_memorys_own_block_depends_on_the_attachment() -> None:
    residual = flops(attached("residual", trainable=False)).backward
    after_attention = 2 * (128 * 128 + 3 * 128 * 512)
    assert flops(attached("mal", trainable=False)).backward == residual + BLOCK + 2 * ATTENTION
    assert flops(attached("mag", trainable=False)).backward == residual + after_attention
    branches = 2 * 2 * (2 * 4 * 2 * (128 + 32**2) - BRANCH)
    assert flops(attached("overflow", trainable=False)).backward == residual + after_attention + branches


def test_windowed_attention_costs_the_same_at_any_length_and_full_grows_with_it() -> None:
    assert flops(make(), 1024) == flops(make(), 2**20)
    assert attention_reach(make(), 2**20) == 68
    assert attention_reach(make(kind="full"), 1024) == 512.5
    short, long = (flops(make(kind="full"), length).forward for length in (1024, 2048))
    assert long - short == 4 * 4 * 128 * 512


def olmo2_1b(trainable: bool) -> MirasConfig:
    return MirasConfig(
        backbone=BackboneConfig(trainable=trainable),
        attention=AttentionConfig(kind="full"),
        memory=MemoryConfig(layers=()),
    )


@pytest.mark.parametrize("length, forward, train", [(32_768, 4.71, 14.1), (65_536, 6.85, 20.6), (131_072, 11.15, 33.4)])
def test_olmo2_1b_with_full_attention_is_the_published_table(length: int, forward: float, train: float) -> None:
    count = flops(olmo2_1b(trainable=True), length)
    assert count.forward / 1e9 == pytest.approx(forward, rel=0.003)
    assert count.total / 1e9 == pytest.approx(train, rel=0.003)


def test_a_frozen_olmo2_1b_that_goes_back_through_every_block_is_the_published_table() -> None:
    """18.0 G per token at 64K: weight gradients are all that freezing saves. Here one block of 16 has no backward."""
    config = dataclasses.replace(olmo2_1b(trainable=False), memory=MemoryConfig(layers=(0,)))
    count, without = flops(config, 65_536), flops(olmo2_1b(trainable=False), 65_536)
    memory = count.forward - without.forward
    assert (count.total - 3 * memory) / 1e9 == pytest.approx(18.0 - 10.5 / 16, rel=0.01)


def test_the_memory_is_a_small_part_of_the_guides_model() -> None:
    config = miras_64k().model
    without = dataclasses.replace(config, memory=dataclasses.replace(config.memory, layers=()))
    share = flops(config, 65_536).forward / flops(without, 65_536).forward
    assert 1 < share < 1.15


def test_flops_of_the_familys_scans_by_hand() -> None:
    def scan(**changes: object) -> float:
        return scan_flops(MemoryConfig(layers=(0,), heads=1, head_dim=32, **changes))  # type: ignore[arg-type]

    square, chunk = 32 * 32, 16
    assert scan() == scan(rule="delta") == 12 * square + 8 * 64 * 32 + 64**2
    # Chunk-start gradients: 10 d^2 + 4 C d with momentum; one product less to read and one less to write without.
    assert scan(rule="yaad", yaad=YaadConfig(momentum=True)) == 10 * square + 4 * chunk * 32
    assert scan(rule="yaad") == 6 * square + 4 * chunk * 32
    assert scan(rule="moneta") == scan(rule="memora") == (2 + 2 + 2 + 2 + 2 * 16) * square
    # Two layers of four times the width: three products for the gradients, and two of either layer per state.
    assert scan(rule="mlp", mlp=MlpConfig(momentum=False)) == (6 + 8 + 4 + 4) * 4 * square + 4 * chunk * 5 * 32
    # LaCT's 18 d F, and a read of the empty memory; Muon's 30 d^3 for each of three matrices, once per chunk.
    assert scan(rule="swiglu", swiglu=SwigluConfig(hidden=1)) == (18 + 6) * square
    muon = scan(rule="swiglu", swiglu=SwigluConfig(hidden=1, muon=True, gradient_chunk=512))
    assert muon == (18 + 6) * square + 90 * 32**3 / 512


def test_a_teacher_costs_its_forward_pass_and_the_heads_of_the_compared_tokens() -> None:
    """Memories on layers 1 and 3, 1,024 tokens and a window of 64."""
    student = flops(make(trainable=False))
    block = BLOCK + 2 * 128 * (1024 + 1)

    def distilled(**settings: object) -> Flops:
        settings = {"kl": 1.0, **settings}
        model = dataclasses.replace(
            make(trainable=False),
            distil="full",
            distillation=DistillationConfig(**settings),  # type: ignore[arg-type]
        )
        return flops(model)

    share = (1024 - 64) / 1024
    found = distilled()
    assert found.forward == pytest.approx(student.forward - HEAD + 4 * block + 2 * share * HEAD)
    assert found.backward == pytest.approx(student.backward - HEAD + share * HEAD)
    found = distilled(tokens=128, cross_entropy=0.5, lower_layers="window")
    assert found.forward == pytest.approx(student.forward + 3 * block + 2 * HEAD / 8)
    assert found.backward == pytest.approx(student.backward + HEAD / 8)
    found = distilled(kl=0.0, hidden=1.0)
    assert found.forward == pytest.approx(student.forward - HEAD + 4 * block)
    assert found.backward == pytest.approx(student.backward - HEAD)


def test_a_teacher_without_a_divergence_ends_with_the_last_memory_and_so_does_the_backward_pass() -> None:
    student = flops(make(layers=(0, 2), trainable=False))
    settings = DistillationConfig(kl=0.0, attention=1.0)
    found = flops(dataclasses.replace(make(layers=(0, 2), trainable=False), distil="full", distillation=settings))
    assert found.forward == pytest.approx(student.forward - HEAD + 3 * (BLOCK + 2 * 128 * 1025))
    assert found.backward == pytest.approx(student.backward - HEAD - (BLOCK + 2 * ATTENTION))


def test_slots_by_hand() -> None:
    config = make()
    memory = dataclasses.replace(config.memory, attachment="slots", slots=SlotsConfig(count=96, chunk=48))
    count = flops(dataclasses.replace(config, memory=memory))
    without = flops(dataclasses.replace(config, memory=dataclasses.replace(config.memory, layers=())))
    shift = 2 * 4 * (128 + 32)
    maps, distances = 2 * 2 * 96 * 32 * 32 * 4, 2 * 72 * 72 * 32 * 4
    attention = 4 * 4 * 32 * (96 + 24.5)
    assert count.forward - without.forward == 2 * (shift + (maps + distances) / 48 + attention)
