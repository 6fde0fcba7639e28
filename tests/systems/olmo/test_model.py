"""What the olmo system computes is what transformers computes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import RunConfig, replace
from pipeline.errors import UserError
from pipeline.lm.config import BackboneConfig
from pipeline.parallel.topology import Topology
from pipeline.systems.olmo.config import OlmoConfig
from tests.lm.families import decoder, plain_logits, save_decoder
from tests.systems.miras.harness import batch, tokens
from tests.systems.olmo.harness import LENGTHS, built, run, small

TOLERANCE = 1e-5


def of_folder(folder: Path) -> RunConfig:
    config = small()
    assert isinstance(config.model, OlmoConfig)
    backbone = BackboneConfig(pretrained=str(folder), trainable=True)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))


@pytest.mark.parametrize("mask", [False, True], ids=["documents see each other", "documents apart"])
@pytest.mark.parametrize("kind", ["olmo", "olmo2"])
def test_saved_models_of_transformers_have_the_same_logits_here(tmp_path: Path, kind: str, mask: bool) -> None:
    """Clipped and not, with norms of queries and keys and scaled rotary frequencies."""
    system, model = built(replace(of_folder(save_decoder(kind, tmp_path)), data__document_mask=mask))
    seen: list[Tensor] = []

    def keep(_: Any, given: Any) -> None:
        seen.append(given[0])

    model.backbone.lm_head.register_forward_pre_hook(keep)
    with torch.no_grad():
        losses = run(system, model, tokens()).tokens["losses"]
        expected = plain_logits(decoder(kind), tokens().unsqueeze(0), LENGTHS if mask else [sum(LENGTHS)])
        logits = F.linear(seen[0], model.backbone.lm_head.weight)
    labels = batch(tokens(), LENGTHS).labels
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    plain = F.cross_entropy(expected[0], labels[0], reduction="none").unsqueeze(0)
    torch.testing.assert_close(losses, plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mask", [False, True])
def test_a_document_sees_the_one_before_it_unless_they_are_masked(mask: bool) -> None:
    system, model = built(replace(small(), data__document_mask=mask))
    changed = tokens()
    changed[3] = (changed[3] + 1) % 64
    one, other = (run(system, model, ids).tokens["losses"][0, LENGTHS[0] :] for ids in (tokens(), changed))
    assert torch.equal(one, other) is mask


def test_recomputation_changes_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        system, model = built(small(activation_checkpointing=recompute))
        run(system, model, tokens()).sums["cross_entropy"].backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None and torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("degree, what", [(5, "48 sequence length"), (8, "4 attention heads")])
def test_a_degree_that_does_not_divide_is_refused(degree: int, what: str) -> None:
    system, _ = built(small())
    system.check(Topology(world=4, sequence=4))
    with pytest.raises(UserError, match=f"--parallel.sequence {degree} does not divide the {what}"):
        system.check(Topology(world=degree, sequence=degree))


def test_the_z_loss_is_a_term_of_its_own_with_the_counts_of_the_labels() -> None:
    system, model = built(small("olmo2"))
    part = batch(tokens(), LENGTHS)
    output = run(system, model, tokens())
    counts = system.count(part)
    assert counts == {"cross_entropy": sum(LENGTHS) - 2, "z_loss": sum(LENGTHS) - 2}
    # Logits of weights this small are all but 0: the log-sum-exp is that of 64 zeros.
    mean = float(output.sums["z_loss"].detach()) / counts["z_loss"]
    assert mean == pytest.approx(0.01 * math.log(64) ** 2, rel=0.05)
    assert system.count(part).keys() == output.sums.keys()
