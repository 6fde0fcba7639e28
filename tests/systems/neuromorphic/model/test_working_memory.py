from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.systems.neuromorphic.model.working_memory import WorkingMemory
from tests.systems.neuromorphic.model.reference import turned

D, E, HEADS, W, T = 6, 8, 2, 5, 16


def memory(rotated: bool) -> WorkingMemory:
    torch.manual_seed(0)
    return WorkingMemory(D, E, HEADS, W, rotated=rotated).double()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    segments = torch.stack([torch.zeros(T), torch.arange(T) // 7, (torch.arange(T) > 2).double()]).long()
    positions = torch.zeros(3, T, dtype=torch.int64)
    for t in range(1, T):
        positions[:, t] = torch.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
    return torch.randn(3, T, D, generator=torch.Generator().manual_seed(1)).double(), segments, positions


@pytest.mark.parametrize("rotated", [True, False])
def test_a_token_sees_the_window_of_its_document(rotated: bool) -> None:
    module, (x, segments, positions) = memory(rotated), inputs()
    carry, found = None, []
    for at in (0, 4, 12):  # steps of other lengths than the window
        part = slice(at, {0: 4, 4: 12, 12: 16}[at])
        out, carry = module(x[:, part], segments[:, part], positions[:, part], carry)
        found.append(out)
    wanted = torch.zeros(3, T, D, dtype=torch.float64)
    q, k, v = (m(x).unflatten(-1, (HEADS, -1)) for m in (module.query, module.key, module.value))
    for row in range(3):
        for t in range(T):
            seen = [s for s in range(max(0, t - W + 1), t + 1) if segments[row, s] == segments[row, t]]
            heads = []
            for h in range(HEADS):
                where = positions[row].tolist() if rotated else [0] * T
                query = turned(q[row, t, h], where[t])
                logits = torch.stack([query.dot(turned(k[row, s, h], where[s])) for s in seen])
                heads.append(torch.softmax(logits / math.sqrt(E / HEADS), 0) @ v[row, seen, h])
            wanted[row, t] = module.output(torch.cat(heads))
    torch.testing.assert_close(torch.cat(found, 1), wanted)


def test_an_empty_memory_is_that_of_a_documents_first_token_and_an_absent_one_says_nothing() -> None:
    module, (x, segments, positions) = memory(True), inputs()
    alone, _ = module(x, torch.arange(T).expand(3, T), torch.zeros(3, T, dtype=torch.int64), None)
    _, carry = module(x, segments, positions, None)
    out, after = module(x, segments, positions, carry, "empty")
    torch.testing.assert_close(out, alone)
    assert after is carry
    out, after = module(x, segments, positions, carry, "absent")
    assert after is carry and not out.any()
