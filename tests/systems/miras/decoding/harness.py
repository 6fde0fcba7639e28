"""Small models with a memory, what the parallel pass says of whole texts, and decoding them in parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from pipeline.lm.decoding import Decoder, DecodingState
from pipeline.parallel.topology import Topology
from pipeline.parallel.weights import fill
from pipeline.systems.miras.config import MirasConfig
from pipeline.systems.miras.model import MirasModel
from tests.launch.parity_main import VOCABULARY, attached, randomise
from tests.lm.families import SIZES, THETA

TOKENS = 40
"""Of a text: four windows of 10, with 2 sinks; five segments of 7 and a part of one; eight chunks of 5."""
CHUNK = 5


def model_of(
    attachment: str,
    rule: str = "titans",
    *,
    kind: str = "window",
    dtype: torch.dtype = torch.float64,
    family: dict[str, Any] | None = None,
    window: int = 10,
    **memory: Any,
) -> MirasModel:
    """Three layers, memories on the last two, no parameter zero; `mixed` is mac on one and overflow on the other."""
    config = attached("mac" if attachment == "mixed" else attachment, kind, rule=rule).model
    assert isinstance(config, MirasConfig)
    if attachment == "mixed":
        memory["overflow_layers"] = (2,)
    swiglu = dataclasses.replace(config.memory.swiglu, gradient_chunk=CHUNK)
    config = dataclasses.replace(
        config,
        attention=dataclasses.replace(config.attention, window=window),
        memory=dataclasses.replace(config.memory, **{"swiglu": swiglu, **memory}),
    )
    sizes = {**SIZES, "model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MirasModel(config, AutoConfig.for_model(**{**sizes, **(family or {})}))
    fill(model, randomise)
    return model.to(dtype).eval()


def texts(rows: int = 2, tokens: int = TOKENS) -> Tensor:
    """Ids [rows, tokens]."""
    return torch.randint(VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def parallel_logits(model: MirasModel, ids: Tensor) -> Tensor:
    """Of whole texts, ids [rows, tokens], in one pass: [rows, tokens, vocabulary]."""
    backbone: Any = model.backbone
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    output = model(ids, None, torch.zeros_like(ids), positions, None, Topology())
    logits: Tensor = backbone.lm_head(output.hidden)
    return logits


def decoded(decoder: Decoder, ids: Tensor, state: DecodingState, parts: Sequence[int]) -> Tensor:
    """Logits behind every token of ids [rows, tokens]: parts above 0 are read in one go, -1 is one step."""
    found, start = [], 0
    for part in parts:
        end = start + abs(part)
        if part == -1:
            found.append(decoder.step(ids[:, start], state)[:, None].clone())
        else:
            found.append(decoder.logits(ids[:, start:end], state))
        start = end
    return torch.cat(found, dim=1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
