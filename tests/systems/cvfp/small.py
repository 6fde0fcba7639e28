"""A small model in float64, for tests of model and solvers."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.model.model import CvfpModel
from pipeline.systems.cvfp.model.weights import initialise

WIDTH, VOCAB = 16, 23


def small(*, layers: int = 3, decay: float = 0.5, std: float = 0.1, width: int = WIDTH, **choices: object) -> CvfpModel:
    """Contracts at the default std: at width 16, a std of 0.1 does what one near 0.02 does at 768."""
    sizes = CvfpConfig(width=width, layers=layers, vocab=VOCAB, decay=decay, initial_std=std, **choices)  # type: ignore[arg-type]
    model = CvfpModel(sizes)
    initialise(model, sizes, 3, Topology())
    return model.double()


def rows(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids [rows, L], and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask


def starts(count: int, width: int = WIDTH, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(model: CvfpModel, ids: Tensor, start: Tensor) -> Tensor:
    """The contexts of one row [L, D], token after token, written out from the definition."""
    found, context = [], start

    def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
        centred = x - x.mean()
        return centred / (centred.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias

    for token_id in ids.tolist():
        token = norm(model.embedding.weight[token_id], model.norm_embed)
        for block in model.blocks.in_order():
            h = (block.linear.weight @ torch.cat([context, token]) + block.linear.bias).clamp_min(0)
            width = len(context)
            context, token = block.decay * context + h[:width], token + h[width:]
            context = (1 - block.mix) * context + block.mix * norm(context, block.norm_context)
            token = (1 - block.mix) * token + block.mix * norm(token, block.norm_token)
        found.append(context)
    return torch.stack(found)
