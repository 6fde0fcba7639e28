"""The second phase document by document and token by token, in float64, with all logits; and small runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import RunConfig, replace
from pipeline.parallel.topology import Topology
from pipeline.recipes.cvfp import cvfp_tiny
from pipeline.runtime.sync import SyncPoint
from pipeline.system import StepContext
from pipeline.systems.cvfp.config import CvfpConfig, PredictionConfig, SolveConfig
from pipeline.systems.cvfp.data.loader import PassLoader
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet
from pipeline.systems.cvfp.model.model import CvfpModel
from pipeline.systems.cvfp.phase import PREDICTION, Data
from pipeline.systems.cvfp.prediction.phase import Prediction

VOCAB, LENGTH = 11, 7
ALONE = Topology()
SYNC = SyncPoint(ALONE)
LENGTHS = (7, 3, 5, 2, 7, 6, 4, 7, 2, 5, 7, 3)
TRAINING = 8


def documents(seed: int = 0) -> DocumentSet:
    """Of a skewed distribution of tokens, so that one is the likeliest."""
    tokens = np.random.default_rng(seed).choice(VOCAB, sum(LENGTHS), p=np.arange(1, VOCAB + 1) / (VOCAB * 6))
    return DocumentSet(tokens.astype(np.uint32), np.cumsum(LENGTHS), TRAINING, VOCAB, "skewed", f"digest{seed}")


def run_config(folder: Path, *, carry: str = "document", way: str = "sequential", **section: Any) -> RunConfig:
    chosen: Any = carry
    sizes = CvfpConfig(
        width=6, layers=2, vocab=VOCAB, carry=chosen, data_cache=str(folder / "cache"), decay=0.6, initial_std=0.3,
        solve=SolveConfig(way, tolerance=1e-12),  # type: ignore[arg-type]
        prediction=PredictionConfig(**section),
    )  # fmt: skip
    return replace(cvfp_tiny(), model=sizes, batch_size=3, sequence_length=LENGTH)


def data_of(config: RunConfig, found: DocumentSet) -> Data:
    def opened(topology: Topology, held_out: bool) -> PassLoader:
        return PassLoader(
            found, held_out=held_out, length=LENGTH, batch_size=config.batch_size, grad_accum=config.grad_accum,
            data_rank=topology.data_rank, data_degree=topology.data, seed=config.seed,
            stream=config.model.carry != "document", adjacent=config.model.adjacent,  # type: ignore[attr-defined]
        )  # fmt: skip

    return Data(found, opened)


def model_of(config: RunConfig, seed: int = 0) -> Any:
    model = CvfpModel(config.model).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return model


def small(folder: Path, *, seed: int = 0, **section: Any) -> tuple[Prediction, Any]:
    config = run_config(folder, **section)
    return Prediction(config, data_of(config, documents(seed))), model_of(config)


def context(step: int = 1) -> StepContext:
    return StepContext(ALONE, 0, PREDICTION, step)


def batches(prediction: Prediction, *, held_out: bool = False, passes: int = 1) -> list[DocumentBatch]:
    loader = prediction.data.open(ALONE, held_out)
    return [batch for _ in range(passes * loader.slots) for batch in loader.next_step()]


def states_and_contexts(model: Any, ids: Tensor, *, zero: bool = False) -> tuple[Tensor, Tensor]:
    """u_t and c_t [tokens, D] of one document, from zero; every context is detached before the next token reads it.

    Written from the specification's equations, not from the model's code.
    """
    embedded = F.layer_norm(
        model.embedding.weight[ids], (model.embedding.weight.shape[1],), model.norm_embed.weight, model.norm_embed.bias
    )
    before, states, contexts = torch.zeros_like(embedded[0]), [], []
    for token in embedded:
        c, e = before, token
        for block in model.blocks:
            added = torch.relu(block.linear.weight @ torch.cat([c, e]) + block.linear.bias)
            d_c, d_e = added[: len(c)], added[len(c) :]
            c = F.layer_norm(block.decay * c + d_c, c.shape, block.norm_context.weight, block.norm_context.bias)
            e = F.layer_norm(e + d_e, e.shape, block.norm_token.weight, block.norm_token.bias)
        states.append(e)
        contexts.append(c)
        before = torch.zeros_like(c) if zero else c.detach()
    return torch.stack(states), torch.stack(contexts)


def nats(model: Any, ids: Tensor, *, zero: bool = False) -> tuple[Tensor, Tensor]:
    """Nats of every label of a document [tokens - 1], and whether each was the likeliest."""
    states, _ = states_and_contexts(model, ids, zero=zero)
    logits = states[:-1] @ model.head.weight.T + model.head.bias
    return F.cross_entropy(logits, ids[1:], reduction="none"), logits.argmax(-1) == ids[1:]


def rows(batch: DocumentBatch) -> list[Tensor]:
    """The ids of each row, without what is behind its end."""
    return [ids[:length] for ids, length in zip(batch.ids, batch.lengths.tolist(), strict=True)]
