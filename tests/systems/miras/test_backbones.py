"""The whole model on every family of backbones: frozen and trained, counted, and in each attachment."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.lm.config import BackboneConfig
from pipeline.lm.decoder_config import attention_width
from pipeline.parallel.topology import Topology
from pipeline.plan.estimate import count_parameters
from pipeline.systems.miras import create
from pipeline.systems.miras.flops import attention_reach, scan_flops
from tests.launch.parity_main import LENGTH, base
from tests.lm.families import FAMILIES, decoder, plain_logits, save_decoder
from tests.systems.miras.harness import batch, built, run, tokens

LENGTHS = [20, LENGTH - 20]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_decoder(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


def run_of(folder: Path, *, trainable: bool = False, attachment: str = "residual") -> RunConfig:
    config = base("full")
    memory = dataclasses.replace(config.model.memory, attachment=attachment, context=7)  # type: ignore[attr-defined]
    backbone = BackboneConfig(pretrained=str(folder), trainable=trainable)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone, memory=memory))  # type: ignore[call-arg]


def pretrained(config: RunConfig) -> tuple[Any, Any]:
    """System and model, what its phase does not train frozen."""
    system, model = built(config, noisy=False, dtype=torch.float32)
    system.check(Topology())
    trained = {name for group in system.phases(model)[0].groups for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return system, model


def plain_losses(model: Any, ids: Tensor) -> Tensor:
    """By transformers, [LENGTH], 0 where a document ends."""
    logits = plain_logits(model, ids.unsqueeze(0), LENGTHS)[0]
    losses = F.cross_entropy(logits, ids.roll(-1), reduction="none")
    return losses * torch.tensor([1.0] * 19 + [0.0] + [1.0] * (LENGTH - 21) + [0.0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_backbone_gives_its_own_losses_and_the_memory_alone_learns(
    folders: dict[str, Path], name: str
) -> None:
    system, model = pretrained(run_of(folders[name]))
    output = run(system, model, batch(tokens(), LENGTHS))
    expected = plain_losses(decoder(name), tokens())
    torch.testing.assert_close(output.tokens["losses"][0], expected, rtol=1e-5, atol=1e-5)
    output.sums["cross_entropy"].backward()
    learned = {key.partition(".")[0] for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {"memory"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_backbone_has_the_gradients_of_transformers(folders: dict[str, Path], name: str) -> None:
    system, model = pretrained(run_of(folders[name], trainable=True))
    run(system, model, batch(tokens(), LENGTHS)).sums["cross_entropy"].backward()
    plain = decoder(name)
    plain_losses(plain, tokens()).sum().backward()
    found = {key: p.grad for key, p in model.backbone.named_parameters()}
    expected = {key: p.grad for key, p in plain.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_and_flops_are_counted_as_the_model_has_them(folders: dict[str, Path], name: str) -> None:
    for trainable in (False, True):
        config = run_of(folders[name], trainable=trainable)
        system, model = pretrained(config)
        counts = count_parameters(config)
        own = sum(p.numel() for p in decoder(name).parameters())
        memory = sum(p.numel() for p in model.memory.parameters())
        assert (counts.parameters, counts.trainable) == (own + memory, memory + trainable * own)
        weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
        weights += sum(p.numel() for key, p in model.named_parameters() if "persistent" in key)
        reach, sizes = attention_reach(system.sizes, LENGTH), system.sizes.memory
        attention = 3 * 4 * attention_width(system.backbone) * reach
        scans = len(sizes.layers) * sizes.heads * scan_flops(sizes)
        assert system.flops(LENGTH).forward == 2 * weights + attention + scans


@pytest.mark.parametrize("attachment", ["mal", "mag", "mac"])
@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_each_attachment_begins_as_the_backbone_or_is_refused(
    folders: dict[str, Path], name: str, attachment: str
) -> None:
    config = run_of(folders[name], attachment=attachment)
    if (name, attachment) == ("qwen3", "mag"):
        with pytest.raises(UserError, match="32 wide, cannot gate the attention of this backbone, 64 wide"):
            create(config)
        return
    system, model = pretrained(config)
    losses = run(system, model, batch(tokens(), LENGTHS)).tokens["losses"][0]
    torch.testing.assert_close(losses, plain_losses(decoder(name), tokens()), rtol=1e-5, atol=1e-5)


def test_random_weights_of_every_family_are_as_large_as_the_section_says() -> None:
    for name in ("llama", "mistral", "olmo", "qwen2", "qwen3"):
        config = base()
        backbone = dataclasses.replace(config.model.backbone, model_type=name, tied=True, kv_heads=2)  # type: ignore[attr-defined]
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))  # type: ignore[call-arg]
        _, model = built(config, noisy=False, dtype=torch.float32)
        for key, parameter in model.backbone.named_parameters():
            if "norm" in key:
                assert bool((parameter == 1).all()), key
            elif key.endswith("bias"):
                assert not parameter.any(), key
            else:
                assert float(parameter.detach().std()) == pytest.approx(backbone.initializer_range, rel=0.1), key
