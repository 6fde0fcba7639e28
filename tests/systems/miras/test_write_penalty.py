"""The penalty on writing: its value from the gates of every token, its gradient, and what it leaves alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from tests.launch.parity_main import LENGTH, attached
from tests.systems.miras.harness import batch, built, run, tokens

ATTACHMENTS = ("residual", "mac", "mag", "mal", "overflow")


def penalised(attachment: str, penalty: float) -> RunConfig:
    config = attached(attachment)
    assert isinstance(config.model, MirasConfig)
    memory = dataclasses.replace(config.model.memory, write_penalty=penalty)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, memory=memory))


@pytest.mark.parametrize("attachment", ATTACHMENTS)
def test_it_is_the_mean_gate_of_all_tokens_heads_and_layers(attachment: str) -> None:
    system, model = built(penalised(attachment, 0.5))
    logits = []
    for name, module in model.named_modules():
        if attachment == "overflow" and name.endswith("core.rule"):
            # Of the tokens that leave the window: those of the others are minus infinity.
            module.register_forward_hook(lambda _, given, __: logits.append(given[4].detach()))
        elif attachment != "overflow" and name.endswith("beta_proj"):
            module.register_forward_hook(lambda _, __, out: logits.append(out.detach()))
    whole = batch(tokens(), [LENGTH - 20, 20])
    output = run(system, model, whole)
    assert len(logits) == len(model.memory)
    expected = 0.5 * torch.stack([torch.sigmoid(layer).mean() for layer in logits]).mean()
    assert float(output.sums["write"]) / system.count(whole)["write"] == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("attachment", ATTACHMENTS)
def test_it_closes_the_gates_and_moves_no_other_weight_of_the_memory(attachment: str, recompute: bool) -> None:
    config = dataclasses.replace(penalised(attachment, 0.5), activation_checkpointing=recompute)
    system, model = built(config)
    # The gates of a later layer also depend on what the first memory gave: the last alone says what a gate moves.
    last = max(map(int, model.memory))
    run(system, model, batch(tokens(), [LENGTH])).sums["write"].backward()
    moved = {name for name, p in model.memory[str(last)].named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in moved if "beta_proj" in name} == {"beta_proj"}
    gates = ("beta_proj", "step_key", "norm")
    assert all(any(word in name for word in gates) for name in moved), moved
    bias = next(p for name, p in model.memory[str(last)].named_parameters() if name.endswith("beta_proj.bias"))
    assert bias.grad is not None and (bias.grad > 0).all()


def test_without_a_penalty_there_is_no_term() -> None:
    system, model = built(attached("residual"))
    whole = batch(tokens(), [LENGTH])
    assert set(run(system, model, whole).sums) == set(system.count(whole)) == {"cross_entropy"}


def test_a_negative_penalty_is_refused() -> None:
    with pytest.raises(UserError, match=r"--model.memory.write-penalty -1"):
        MemoryConfig(write_penalty=-1)
