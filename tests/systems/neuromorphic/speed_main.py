"""Started by test_speed.py: steps of tier b in phase B, and float32 matrix products between them.

Usage: speed_main DTYPE ROWS TOKENS RESULT. Writes RESULT: seconds of each step, GFLOP/s of the products around each,
and the peak memory in bytes of the process, which holds AdamW's state too.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from pipeline.host.hardware import peak_memory
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.model.model import NeuromorphicModel
from pipeline.systems.neuromorphic.state import StreamState, Uses
from pipeline.systems.neuromorphic.stream_tensors import mapped
from pipeline.systems.neuromorphic.weights import initialise

SIDE, PRODUCTS, STEPS, DOCUMENT = 1536, 24, 4, 150


def products() -> float:
    """GFLOP/s of float32 matrix products."""
    x, y, out = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), torch.empty(SIDE, SIDE)
    torch.mm(x, y, out=out)
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(x, y, out=out)
    return PRODUCTS * 2 * SIDE**3 / (time.perf_counter() - began) / 1e9


def text(config: NeuromorphicConfig, rows: int, tokens: int, step: int) -> tuple[torch.Tensor, ...]:
    """Documents of DOCUMENT tokens, which begin elsewhere in each row."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, config.vocab, (rows, tokens), generator=generator)
    at = torch.arange(tokens) + step * tokens + 37 * torch.arange(rows)[:, None]
    segments, positions = at // DOCUMENT, at % DOCUMENT
    return ids, ids.roll(-1, 1).masked_fill(positions == DOCUMENT - 1, -100), segments, positions


def main(dtype: torch.dtype, rows: int, tokens: int, result: Path) -> None:
    config = NeuromorphicConfig(tier="b")
    model = NeuromorphicModel(config)
    initialise(model, 0)
    model = model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    found: dict[str, list[float]] = {"seconds": [], "products": [products()], "loss": []}
    state: StreamState | None = None
    for step in range(STEPS):
        given = text(config, rows, tokens, step)
        began = time.perf_counter()
        out = model(*given, state, Uses())
        loss = out.losses.sum() / given[0].numel() + 0.01 / rows * sum(out.penalties.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = mapped(out.state, lambda _, x: x.detach())
        found["seconds"].append(time.perf_counter() - began)
        found["loss"].append(float(loss.detach()))
        del out, loss
        found["products"].append(products())
    whole = found | {"peak": peak_memory(), "threads": torch.get_num_threads()}
    result.write_text(json.dumps(whole))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
