"""The tile program of kernels/miras_scan/cuda in PyTorch, step by step: the same tiles, order and roundings.

It stands in for a device where there is none, and shows what the roundings cost at larger sizes. Two things are not
mirrored: the order of the sums within a product of tiles, and that tensor cores cut sums off.

A comment names the file that a part mirrors. N is batch x heads, C = 64 the tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK, BLOCK = 64, 16


def round_tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16, and that of what it leaves."""
    high = x.bfloat16().float()
    return high, (x - high).bfloat16().float()


def double(x: Tensor) -> tuple[Tensor, Tensor]:
    high = round_tf32(x)
    return high, round_tf32(x - high)


@dataclass(frozen=True)
class Arithmetic:
    """fragments.cuh: how products round, by the dtype of q, k, v. Inputs are given as float32 that holds that dtype."""

    bf16: bool

    def inputs(self, a: Tensor, b: Tensor) -> Tensor:
        """An input times an input."""
        return a @ b if self.bf16 else self._doubles(a, b)

    def mixed(self, a: Tensor, b: Tensor, *, value: str) -> Tensor:
        """An input times a value; ``value`` says which is the value."""
        if not self.bf16:
            return self._doubles(a, b)
        if value == "left":
            high, low = split(a)
            return low @ b + high @ b
        high, low = split(b)
        return a @ low + a @ high

    def values(self, a: Tensor, b: Tensor) -> Tensor:
        return round_tf32(a) @ round_tf32(b) if self.bf16 else self._doubles(a, b)

    @staticmethod
    def _doubles(a: Tensor, b: Tensor) -> Tensor:
        (a_high, a_low), (b_high, b_low) = double(a), double(b)
        return a_low @ b_high + a_high @ b_low + a_high @ b_high


@dataclass(frozen=True)
class Coefficients:
    """coefficients.cuh. Of all chunks, n of them; `at` gives those of one, without the dimension n."""

    retain: Tensor  # [N, n, C], as eta, theta, keep
    eta: Tensor
    theta: Tensor
    keep: Tensor
    update: Tensor  # [N, n, C, C]  G
    momentum_update: Tensor  # [N, n, C, C]  E
    weights: Tensor  # [N, n, C, 3]  beta, f, m
    update_before: Tensor  # [N, n, C, C]  G^-
    before: Tensor  # [N, n, C, 2]  beta^-, f^-
    end: Tensor  # [N, n, 3]  the weights of the chunk's last token
    update_end: Tensor  # [N, n, C]  its row of G
    momentum_end: Tensor  # [N, n, C]  and of E

    def at(self, chunk: int) -> Coefficients:
        return Coefficients(**{field.name: getattr(self, field.name)[:, chunk] for field in fields(self)})


def coefficients(retain: Tensor, eta: Tensor, theta: Tensor, keep: Tensor, last: Tensor) -> Coefficients:
    """From gates [N, n, C]; ``last`` [n] is the place of each chunk's last token."""
    g, e = torch.zeros_like(theta), torch.zeros_like(theta)
    beta, f, m = torch.ones_like(theta[..., 0]), torch.zeros_like(theta[..., 0]), torch.ones_like(theta[..., 0])
    rows: list[list[Tensor]] = [[], [], [], [], []]
    for t in range(CHUNK):
        before = keep[..., t, None] * g, torch.stack([keep[..., t] * beta, keep[..., t] * f], dim=-1)
        e = eta[..., t, None] * e
        e[..., t] = theta[..., t]
        g = retain[..., t, None] * g + e
        m = m * eta[..., t]
        beta = beta * retain[..., t]
        f = retain[..., t] * f + m
        for row, x in zip(rows, (g, e, torch.stack([beta, f, m], dim=-1), *before), strict=True):
            row.append(x)
    update, momentum_update, weights, update_before, before_rows = (torch.stack(row, dim=2) for row in rows)
    chunks = torch.arange(len(last))
    ends = (x[:, chunks, last] for x in (weights, update, momentum_update))
    return Coefficients(retain, eta, theta, keep, update, momentum_update, weights, update_before, before_rows, *ends)


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """prepare.cuh: (I + T)^-1 by blocks of 16, the diagonal ones by substitution, then diagonal by diagonal."""
    blocks = CHUNK // BLOCK
    inverse = torch.zeros_like(lower)

    def at(x: Tensor, i: int, j: int) -> Tensor:
        return x[..., i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]

    for i in range(blocks):
        solved = torch.zeros_like(at(lower, i, i))
        for r in range(BLOCK):
            solved[..., r, :] = -(at(lower, i, i)[..., r, None, :r] @ solved[..., :r, :])[..., 0, :]
            solved[..., r, r] += 1
        at(inverse, i, i).copy_(solved)
    for distance in range(1, blocks):
        for j in range(blocks - distance):
            i = j + distance
            above = slice(j * BLOCK, i * BLOCK)
            product = lower[..., i * BLOCK : (i + 1) * BLOCK, above] @ inverse[..., above, j * BLOCK : (j + 1) * BLOCK]
            at(inverse, i, j).copy_(-(at(inverse, i, i) @ product))
    return inverse


class Tiles:
    """One call: arguments as the native ops have them (pipeline/ops), everything on the CPU."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        eta: Tensor,
        theta: Tensor,
        memory: Tensor,
        momentum: Tensor,
        resets: Tensor | None,
    ) -> None:
        self.batch, self.tokens, self.heads, self.key_dim = q.shape
        self.value_dim, self.dtype = v.shape[-1], q.dtype
        self.arithmetic = Arithmetic(q.dtype == torch.bfloat16)
        self.chunks = -(-self.tokens // CHUNK)
        self.q, self.k, self.v = (self.fold(x) for x in (q, k, v))
        keep = torch.ones_like(alpha) if resets is None else (~resets).float().unsqueeze(-1).expand_as(alpha)
        gates = ((1 - alpha) * keep, eta * keep, theta, keep)
        # Past the end: no step size, no momentum, nothing forgotten.
        retain, eta, theta, keep = (self.fold(x, fill) for x, fill in zip(gates, (1.0, 0.0, 0.0, 1.0), strict=True))
        last = torch.full((self.chunks,), CHUNK - 1)
        last[-1] = (self.tokens - 1) % CHUNK
        self.last, self.coefficients = last, coefficients(retain, eta, theta, keep, last)
        self.initial = memory.flatten(0, 1), momentum.flatten(0, 1)

    def fold(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, H, ...] to float32 [N, chunks, C, ...]."""
        missing = self.chunks * CHUNK - self.tokens
        x = F.pad(x.float(), (0, 0) * (x.dim() - 2) + (0, missing), value=fill)
        return x.movedim(2, 1).flatten(0, 1).unflatten(1, (self.chunks, CHUNK))

    def unfold(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, chunks, C, ...] to [B, T, H, ...]."""
        x = x.flatten(1, 2)[:, : self.tokens].unflatten(0, (self.batch, self.heads)).movedim(1, 2)
        return x.to(dtype).contiguous()

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """y and the state after the last token; keeps what the backward pass needs."""
        a = self.arithmetic
        # prepare.cuh
        self.keys = a.inputs(self.k, self.k.mT)
        self.products = a.inputs(self.q, self.k.mT)
        self.pairs = -(self.products * self.coefficients.update)
        self.inverses = unit_lower_inverse(torch.tril(self.keys * self.coefficients.update_before, -1))
        memory, momentum = self.initial
        self.starts, self.residuals, outputs = [], [], []
        for i in range(self.chunks):
            c, q, k, v = self.coefficients.at(i), self.q[:, i], self.k[:, i], self.v[:, i]
            # states.cuh
            self.starts.append((memory, momentum))
            u = self.read(memory, momentum, k, c.before[..., 0], c.before[..., 1], -v)
            residual = a.values(self.inverses[:, i], u)
            memory, momentum = self.advance(memory, momentum, residual, k, c)
            # outputs.cuh
            read = a.mixed(q, self.starts[-1][0], value="right"), a.mixed(q, self.starts[-1][1], value="right")
            y = c.weights[..., :1] * read[0] + c.weights[..., 1:2] * read[1]
            outputs.append(y + a.values(self.pairs[:, i], residual))
            self.residuals.append(residual)
        state = (x.unflatten(0, (self.batch, self.heads)) for x in (memory, momentum))
        return self.unfold(torch.stack(outputs, dim=1), self.dtype), *state

    def read(self, memory: Tensor, momentum: Tensor, k: Tensor, first: Tensor, second: Tensor, start: Tensor) -> Tensor:
        """start + first o (K M) + second o (K S), a warp's key dimensions after the other."""
        own = self.key_dim // (4 if self.key_dim >= 64 else 2)
        for part in (slice(d, d + own) for d in range(0, self.key_dim, own)):
            read = [self.arithmetic.mixed(k[..., part], x[:, part], value="right") for x in (memory, momentum)]
            start = start + (first.unsqueeze(-1) * read[0] + second.unsqueeze(-1) * read[1])
        return start

    def advance(
        self, memory: Tensor, momentum: Tensor, residual: Tensor, k: Tensor, c: Coefficients
    ) -> tuple[Tensor, Tensor]:
        weighted = [-x.unsqueeze(-1) * residual for x in (c.update_end, c.momentum_end)]
        change = [self.arithmetic.mixed(k.mT, x, value="right") for x in weighted]
        beta, f, m = (x[:, None, None] for x in c.end.unbind(-1))
        return beta * memory + (f * momentum + change[0]), m * momentum + change[1]

    def backward(self, grad_y: Tensor, grad_memory: Tensor, grad_momentum: Tensor) -> list[Tensor]:
        """Gradients of q, k, v, alpha, eta, theta, memory and momentum."""
        a = self.arithmetic
        grad_y = self.fold(grad_y)
        after = grad_memory.flatten(0, 1), grad_momentum.flatten(0, 1)
        # prepare.cuh
        update = a.mixed(self.pairs.mT, grad_y, value="left")
        columns: list[list[Tensor]] = [[] for _ in range(11)]
        for i in reversed(range(self.chunks)):
            c, q, k, dy = self.coefficients.at(i), self.q[:, i], self.k[:, i], grad_y[:, i]
            # adjoint.cuh
            u = self.read(*after, k, -c.update_end, -c.momentum_end, update[:, i])
            solved = a.values(self.inverses[:, i].mT, u)
            before = self.retreat(after, solved, dy, q, k, c)
            # gradients.cuh
            for column, x in zip(columns, self.gradients(i, c, after, solved, dy), strict=True):
                column.insert(0, x)
            after = before
        dq, dk, dv, grad_update, dots, *sums = (torch.stack(x, dim=1) for x in columns)
        grads = [self.unfold(x, self.dtype) for x in (dq, dk, dv)]
        gates = gate_gradients(self.coefficients, self.last, grad_update, sums, dots)
        grads += [self.unfold(x, torch.float32) for x in gates]
        return grads + [x.unflatten(0, (self.batch, self.heads)) for x in after]

    def retreat(
        self, after: tuple[Tensor, Tensor], solved: Tensor, dy: Tensor, q: Tensor, k: Tensor, c: Coefficients
    ) -> tuple[Tensor, Tensor]:
        change = []
        for j in range(2):
            from_y = self.arithmetic.mixed(q.mT, c.weights[..., j, None] * dy, value="right")
            change.append(from_y + self.arithmetic.mixed(k.mT, c.before[..., j, None] * solved, value="right"))
        beta, f, m = (x[:, None, None] for x in c.end.unbind(-1))
        return beta * after[0] + change[0], m * after[1] + (f * after[0] + change[1])

    def gradients(
        self, i: int, c: Coefficients, after: tuple[Tensor, Tensor], solved: Tensor, dy: Tensor
    ) -> list[Tensor]:
        """Of q, k, v, of G, of the states' weights at the end, and the six sums over key dimensions."""
        a, q, k = self.arithmetic, self.q[:, i], self.k[:, i]
        residual, starts = self.residuals[i], self.starts[i]

        def weigh(read: Tensor, rows: Tensor, weight: Tensor, sign: float) -> tuple[Tensor, Tensor]:
            return sign * weight.unsqueeze(-1) * read, sign * (read * rows).sum(dim=-1)

        dq, sums = torch.zeros_like(q), []
        for j in range(2):
            part, total = weigh(a.mixed(dy, starts[j].mT, value="right"), q, c.weights[..., j], 1.0)
            dq, sums = dq + part, [*sums, total]
        grad_pairs = -torch.tril(a.mixed(dy, residual.mT, value="right"))
        grad_lower = -torch.tril(a.values(solved, residual.mT), -1)
        grad_update = grad_pairs * self.products[:, i]
        from_lower = grad_lower * self.keys[:, i] * c.keep.unsqueeze(-1)
        grad_update = grad_update + F.pad(from_lower[:, 1:], (0, 0, 0, 1))
        square, system = grad_pairs * c.update, grad_lower * c.update_before

        dq = dq + a.mixed(square, k, value="left")
        dk = a.mixed(square.mT, q, value="left") + a.mixed(system + system.mT, k, value="left")
        weights = (c.before[..., 0], c.before[..., 1], c.update_end, c.momentum_end)
        for j, weight in enumerate(weights):
            rows, state = (solved, starts[j]) if j < 2 else (residual, after[j - 2])
            part, total = weigh(a.values(rows, state.mT), k, weight, 1.0 if j < 2 else -1.0)
            dk, sums = dk + part, [*sums, total]
        pairs_of_states = ((after[0], starts[0]), (after[0], starts[1]), (after[1], starts[1]))
        dots = torch.stack([(x * y).sum(dim=(1, 2)) for x, y in pairs_of_states], dim=-1)
        return [dq, dk, -solved, grad_update, dots, *sums]


def gate_gradients(
    c: Coefficients, last: Tensor, grad_update: Tensor, sums: list[Tensor], dots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """coefficients.cuh: of alpha, eta and theta, each [N, n, C], by the recurrences backwards."""
    zero = torch.zeros_like(c.theta)
    g_before, e_before = (F.pad(x[..., :-1, :], (0, 0, 1, 0)) for x in (c.update, c.momentum_update))
    start = c.weights.new_tensor([1.0, 0.0, 1.0]).expand_as(c.weights[..., :1, :])
    weights = torch.cat([start, c.weights[..., :-1, :]], dim=-2)
    dg, de, dtheta = torch.zeros_like(zero), torch.zeros_like(zero), torch.zeros_like(zero)
    dbeta, df, dm = (torch.zeros_like(zero[..., 0]) for _ in range(3))
    retain, eta = torch.zeros_like(zero), torch.zeros_like(zero)
    for t in reversed(range(CHUNK)):
        ends = (last == t).float()
        dg, de = dg + ends.unsqueeze(-1) * sums[4], de + ends.unsqueeze(-1) * sums[5]
        dg = dg + grad_update[..., t, :]
        de = de + dg
        retain[..., t] = (dg * g_before[..., t, :]).sum(dim=-1)
        eta[..., t] = (de * e_before[..., t, :]).sum(dim=-1)
        dtheta[..., t] = de[..., t]
        dg, de = dg * c.retain[..., t, None], de * c.eta[..., t, None]

        dbeta, df = dbeta + sums[0][..., t], df + sums[1][..., t]
        if t + 1 < CHUNK:
            dbeta = dbeta + c.keep[..., t + 1] * sums[2][..., t + 1]
            df = df + c.keep[..., t + 1] * sums[3][..., t + 1]
        dbeta, df, dm = (x + ends * y for x, y in zip((dbeta, df, dm), dots.unbind(-1), strict=True))
        dm = dm + df
        retain[..., t] += dbeta * weights[..., t, 0] + df * weights[..., t, 1]
        eta[..., t] += dm * weights[..., t, 2]
        dbeta, df, dm = dbeta * c.retain[..., t], df * c.retain[..., t], dm * c.eta[..., t]
    return -c.keep * retain, c.keep * eta, dtheta
