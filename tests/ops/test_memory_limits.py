"""What limits how long a memory keeps what it stores: overwriting, forgetting, rounding; each with its theory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import miras_scan
from pipeline.ops.slots import Slots, shuffle
from pipeline.ops.store_slots import store_slots
from tests.ops.test_scan_cpu import BF16_REPEATED, FP32, make

DIM = 32


def random_pairs(rows: int, pairs: int, dim: int, values: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Unit keys and unit values [rows, pairs, 1, dim] float64, and which of `values` [n, dim] each is."""
    rng = torch.Generator().manual_seed(pairs)
    keys = F.normalize(torch.randn(rows, pairs, 1, dim, generator=rng, dtype=torch.float64), dim=-1)
    if values is None:
        values = F.normalize(torch.randn(4096, dim, generator=rng, dtype=torch.float64), dim=-1)
    which = torch.randint(len(values), (rows, pairs), generator=rng)
    return keys, values[which][:, :, None], which


def written(keys: Tensor, values: Tensor, step: float) -> Tensor:
    """The memory [rows, dim, dim] after all pairs by the delta rule, without forgetting, in float64."""
    gate = torch.full(keys.shape[:3], step, dtype=torch.float64)
    zero = torch.zeros_like(gate)
    _, (memory, _) = miras_scan(keys, keys, values, zero, zero, gate, rule="delta", backend="torch")
    return memory[:, 0]


@pytest.mark.parametrize("step", [1.0, 0.5, 0.1])
def test_a_pair_fades_with_those_written_after_it(step: float) -> None:
    """M -> (I - step k k^T) M + step k v^T and E[k k^T] = I / d for random unit keys: what a key still finds of its
    value after m others is step (1 - step / d)^m, on average. So a head holds about d / step pairs."""
    pairs, rows = 3 * DIM, 1500
    keys, values, _ = random_pairs(rows, pairs, DIM)
    memory = written(keys, values, step)
    read = torch.einsum("rpk,rkv->rpv", keys[:, :, 0], memory)
    share = (read * values[:, :, 0]).sum(-1).mean(0) / step
    after = torch.arange(pairs - 1, -1, -1, dtype=torch.float64)
    expected = (1 - step / DIM) ** after
    # A read has the noise of all other pairs, of m of them sqrt(m) / d at most, and less by the root of the rows.
    assert (share - expected).abs().max() <= 4.5 * math.sqrt(pairs) / DIM / math.sqrt(rows)
    assert float(expected[0]) < (0.06 if step == 1.0 else 1.0)


@pytest.mark.slow
def test_capacity_by_pairs_and_key_size(
    capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """The value that a read is nearest to, of 16: nearly always right up to d / 4 pairs, and falling from d on."""
    with capsys.disabled():
        print("\nright answers of 16 values, delta rule, one writing of every pair, random keys:")
        for dim in (16, 32, 64):
            rng = torch.Generator().manual_seed(0)
            choices = F.normalize(torch.randn(16, dim, generator=rng, dtype=torch.float64), dim=-1)
            shares = {}
            for quarter in (1, 2, 4, 8, 16):
                pairs = dim * quarter // 4
                keys, values, which = random_pairs(200, pairs, dim, choices)
                read = torch.einsum("rpk,rkv->rpv", keys[:, :, 0], written(keys, values, 1.0))
                shares[pairs] = float(((read @ choices.T).argmax(-1) == which).double().mean())
            line = ", ".join(f"{pairs} pairs {share:.3f}" for pairs, share in shares.items())
            print(f"  d = {dim}: {line}")
            record_property(f"right with d = {dim}", line)
            assert shares[dim // 4] > 0.9 > shares[4 * dim]


@pytest.mark.slow
def test_a_state_that_nothing_is_written_to_keeps_what_its_forget_rate_says(
    record_property: Callable[[str, object], None],
) -> None:
    """(1 - alpha)^n over a million tokens, by the native op: also where 1 - alpha is 1 in float32. With a forget rate
    and a step size of exactly 0 no bit changes."""
    total, piece, rates = 1_048_576, 16_384, (0.0, 1e-8, 1e-7, 1e-6, 1e-5)
    state = make(1, 1, len(rates), DIM, DIM)[6]
    momentum, first = torch.zeros_like(state), state.clone()
    x = make(1, piece, len(rates), DIM, DIM)
    alpha = torch.tensor(rates).expand(1, piece, -1).contiguous()
    zero = torch.zeros_like(alpha)
    current = (state, momentum)
    for _ in range(0, total, piece):
        _, current = miras_scan(*x[:3], alpha, zero, zero, state=current, rule="delta", backend="cpu")
    assert torch.equal(current[0][:, 0], first[:, 0])
    for index, rate in enumerate(rates):
        kept = float(current[0][0, index].double().norm() / first[0, index].double().norm())
        expected = math.exp(total * math.log1p(-float(alpha[0, 0, index])))
        record_property(f"kept at a forget rate of {rate:g}", f"{kept:.4f}, exact {expected:.4f}")
        assert kept == pytest.approx(expected, rel=0.1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drift_over_a_million_tokens(
    dtype: torch.dtype, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """Errors of the native op's float32 state, against float64, do not build up from the first 16K tokens to the last.

    Forget rates go down to 1e-6 at most, keys repeat in two heads. Beside it the state is rounded to bfloat16 every 256
    tokens, as if it were kept so: that does lose.
    """
    total, piece, short = 1_048_576, 16_384, 256
    repeated = make(1, 24, 4, DIM, 16)[1]
    state = exact = rounded = None
    found: list[float] = []
    lost = 0.0
    with torch.no_grad():
        for start in range(0, total, piece):
            x = make(1, piece, 4, DIM, 16, dtype=dtype, seed=1 + start)
            x[3] = x[3] * torch.tensor([1.0, 1e-2, 1e-3, 1e-4])
            x[1][:, :, 2:] = repeated[:, (start + torch.arange(piece)) % 24, 2:].to(dtype)
            y, state = miras_scan(*x[:6], state=state, backend="cpu")
            wanted, exact = miras_scan(*(z.double() for z in x[:6]), state=exact, backend="torch")
            errors = [(a.double() - b).norm() / b.norm() for a, b in ((y, wanted), (state[0], exact[0]))]
            found.append(max(map(float, errors)))
            for at in range(0, piece, short):
                _, rounded = miras_scan(*(z[:, at : at + short] for z in x[:6]), state=rounded, backend="cpu")
                rounded = tuple(part.bfloat16().float() for part in rounded)
            lost = float((rounded[0].double() - exact[0]).norm() / exact[0].norm())
    with capsys.disabled():
        line = f"first 16K {found[0]:.1e}, last 16K {found[-1]:.1e}, largest {max(found):.1e}"
        print(
            f"\n{dtype} inputs, {total} tokens, relative RMSE of reads and state: {line}; state in bfloat16 {lost:.1e}"
        )
    record_property(f"relative RMSE, {dtype} inputs", line)
    record_property(f"the same with a bfloat16 state, {dtype} inputs", f"{lost:.1e}")
    assert max(found) <= (FP32 if dtype == torch.float32 else BF16_REPEATED)
    if dtype == torch.float32:
        assert lost > 10 * max(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slots_do_not_drift_over_a_million_tokens(
    dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    """What all slots hold together is the sum of what was stored, in float64: merging is a mean, which rounds. Beside
    it slots that are kept in bfloat16 between steps of 4,096 tokens."""
    total, piece, chunk, count = 1_048_576, 4096, 64, 512
    size = (1, piece // chunk, chunk, 1, 64)
    rng = torch.Generator().manual_seed(0)
    whole = torch.ones(size[:3], dtype=torch.bool)
    order = torch.tensor(shuffle(count + chunk))
    slots = rounded = Slots.empty(1, 1, count, 64, torch.zeros(1))
    stored = torch.zeros(2, 64, dtype=torch.float64)
    found = lost = 0.0
    for _ in range(total // piece):
        # Far from zero: a sum that loses something of every token shows it.
        k, v = (1 + torch.randn(size, generator=rng)).to(dtype), (torch.randn(size, generator=rng) - 1).to(dtype)
        stored += torch.stack([x.double().sum((0, 1, 2, 3)) for x in (k, v)])
        slots = store_slots(slots, k, v, None, whole, whole[..., 0], order).after
        rounded = store_slots(rounded, k, v, None, whole, whole[..., 0], order).after
        rounded = rounded._replace(keys=rounded.keys.bfloat16().float(), values=rounded.values.bfloat16().float())
        found, lost = (_lost(x, stored) for x in (slots, rounded))
    assert slots.counts.sum() == rounded.counts.sum() == total
    record_property(f"slots after a million tokens, relative error of their sum, {dtype} inputs", f"{found:.1e}")
    record_property(f"the same of slots in bfloat16, {dtype} inputs", f"{lost:.1e}")
    # A slot takes in total / count tokens, each with a rounding: as random ones they add up with the root.
    assert found < math.sqrt(total / count) * 2**-24


def _lost(slots: Slots, stored: Tensor) -> float:
    """The relative error of the sums of keys and values of the slots."""
    sums = torch.stack([(x.double() * slots.counts.double()[..., None]).sum((0, 1, 2)) for x in slots[:2]])
    return float((sums - stored).norm() / stored.norm())
