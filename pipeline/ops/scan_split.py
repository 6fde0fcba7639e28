"""The memory op over pieces of the sequence at once: the same result, more rows to fill a device with.

The rule is linear in the state X = [M; S] that a piece finds, so a piece takes X to P X + c, and its read-outs are
those from an empty state plus F X::

    y = y_0 + F X,    X' = P X + c        P [2 Dk, J Dk], F [tokens, J Dk], J = 2 states (1 without momentum)

P, F and the columns of values c, y_0 come from one call of the op itself: columns of a value never meet, so J Dk more
columns with no values and the identity for a state carry X -> (F X, P X). Joining the pieces is then a product per
piece, in float64. A segment that starts inside a piece makes P zero by the op's own masking.

The gradient of the state X is the same chain backwards: dX = F^T dy + P^T dX'. With the true states at both ends known,
one more scan of all pieces at once gives the gradients of everything else; neither P nor F is differentiated.

FLOPs per token of a head of dimension d, chunks of C tokens, against 12 d^2 + 8 C d + C^2 forward and
24 d^2 + 18 C d + C^2 backward of the plain scan::

    forward     40 d^2 + 16 C d + C^2    3 d columns instead of d, and F X
    backward    40 d^2 + 26 C d + 2 C^2  F^T dy, the scan once more, and its backward pass

With C = d that is 2.7 times the forward and 1.6 times the backward of the plain scan: 1.95 times in all. Scanning a
second time from the true states, instead of adding F X, would cost 48 d^2 + 24 C d + 2 C^2 forward. The backward pass
keeps F besides the inputs: J Dk numbers per token and head, in the dtype of v.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops.checks import sum_dtype
from pipeline.ops.scan import Backend, Rule, State, check_arguments, check_backend, miras_scan

# Time of the split scan over that of the plain one at equal use of the device, forward and backward: 1.95 by the count
# above, 2.1 to 2.6 measured with the native kernel of the CPU (docs/benchmarks.md has the command).
COST = 2.3
# Columns of values that a native kernel gives to one thread or multiprocessor at least.
SLICE = 16
# A piece shorter than this spends more on joining ends than on tokens.
SHORTEST_PIECE = 256


class Scan(NamedTuple):
    """How to call the op; the same for every piece."""

    rule: Rule
    backend: Backend
    chunk: int

    @property
    def states(self) -> int:
        """J: the states that a later token depends on."""
        return 1 if self.rule == "delta" else 2

    def __call__(self, tokens: Sequence[Tensor | None], state: State | None, segment_ids: Tensor | None) -> Any:
        q, k, v, alpha, eta, theta = tokens
        assert q is not None and k is not None and v is not None and alpha is not None and theta is not None
        return miras_scan(
            q, k, v, alpha, eta, theta,
            state=state, segment_ids=segment_ids, rule=self.rule, backend=self.backend, chunk=self.chunk,
        )  # fmt: skip


class Piece(NamedTuple):
    """What pieces do with the state X before them; every row of the batch is one."""

    matrix: Tensor
    """P [rows, heads, 2 Dk, J Dk]."""
    offset: Tensor
    """c [rows, heads, 2 Dk, Dv]."""
    reads: Tensor
    """F [rows, tokens, heads, J Dk], in the dtype of v."""
    outputs: Tensor
    """y_0 [rows, tokens, heads, Dv], in the dtype of v."""


def miras_scan_split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    *,
    state: State | None = None,
    segment_ids: Tensor | None = None,
    rule: Rule = "titans",
    backend: Backend = "auto",
    chunk: int = 64,
    pieces: int | Literal["auto"] = "auto",
) -> tuple[Tensor, State]:
    """``miras_scan``, with the sequence cut into ``pieces`` parts that are scanned at once.

    Shapes, meaning and errors are those of ``miras_scan``, and so is the result, to rounding: values, final state and
    every gradient. It takes about 2.3 times the work, on ``pieces`` times as many rows.

    Args:
        pieces: parts of the sequence, reduced to one per token where there are fewer tokens; ``auto`` takes what
            ``pieces_for`` says. Tokens that do not make one more in every piece are scanned after the last.

    Raises:
        ValueError: as ``miras_scan``, or ``pieces`` is not a positive integer.
    """
    check_arguments(q, k, v, alpha, eta, theta, state, segment_ids, rule, chunk)
    # Not left to the calls on pieces: the message names the tensors that the caller gave.
    check_backend(backend, q, k, v, alpha, None if rule == "delta" else eta, theta, state)
    batch, sequence, heads, _ = q.shape
    slices = max(1, -(-v.shape[-1] // SLICE))
    count = pieces_for(batch * heads * slices, sequence, device=q.device) if pieces == "auto" else pieces
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"pieces is {pieces!r}; expected a positive integer or 'auto'")
    count = min(count, sequence)
    if count == 1:
        return miras_scan(
            q, k, v, alpha, eta, theta, state=state, segment_ids=segment_ids, rule=rule, backend=backend, chunk=chunk
        )

    scan = Scan(rule, backend, chunk)
    tokens = [q, k, v, alpha, None if rule == "delta" else eta, theta]
    if state is None:
        zeros = empty_state(q, v)
        state = (zeros, zeros)
    whole = sequence - sequence % count
    if whole == sequence:
        y, memory, momentum = _SplitScan.apply(scan, count, segment_ids, *tokens, *state)
        return y, (memory, momentum)
    cuts = [whole, sequence - whole]
    parts = [(None, None) if x is None else x.split(cuts, dim=1) for x in tokens]
    ids = (None, None) if segment_ids is None else segment_ids.split(cuts, dim=1)
    y, memory, momentum = _SplitScan.apply(scan, count, ids[0], *(part[0] for part in parts), *state)
    if segment_ids is not None:
        same_document = (segment_ids[:, whole] == segment_ids[:, whole - 1])[:, None, None, None]
        memory, momentum = (x.where(same_document, 0) for x in (memory, momentum))
    last, state = scan([part[1] for part in parts], (memory, momentum), ids[1])
    return torch.cat([y, last], dim=1), state


def pieces_for(rows: int, sequence: int, *, device: torch.device, units: int | None = None) -> int:
    """Pieces that make a scan of ``rows`` fastest; 1 where splitting does not pay.

    ``rows`` is what the native kernels work on independently already: batch x heads x slices of value columns.
    ``units`` is what can work on a row each: threads of a CPU, multiprocessors of a GPU; found out when None. Where
    the rows keep all of them busy nothing is gained, and the split takes COST times the work, so that it pays from
    more than COST times as many units as rows on.
    """
    if units is None:
        if device.type == "cuda":
            units = torch.cuda.get_device_properties(device).multi_processor_count
        else:
            units = torch.get_num_threads()
    plain = -(-rows // units)
    most = min(sequence // SHORTEST_PIECE, 2 * -(-units // rows))
    times = {pieces: COST * -(-rows * pieces // units) / pieces for pieces in range(2, most + 1)}
    # The fewest pieces that do: every one keeps a state for the backward pass.
    best = next((pieces for pieces, time in times.items() if time <= 1.05 * min(times.values())), 1)
    # A tenth covers what the count leaves out: the join and a few more calls.
    return best if best > 1 and times[best] < 0.9 * plain else 1


def empty_state(q: Tensor, v: Tensor) -> Tensor:
    """A memory of zeros [batch, heads, Dk, Dv], in the dtype of the op's state."""
    batch, _, heads, key_dim = q.shape
    return q.new_zeros(batch, heads, key_dim, v.shape[-1], dtype=sum_dtype(q))


def scan_piece(scan: Scan, tokens: Sequence[Tensor | None], segment_ids: Tensor | None) -> Piece:
    """The pieces that the rows of ``tokens`` (q, k, v, alpha, eta, theta) are. Not differentiable."""
    q, k, v, *gates = tokens
    assert q is not None and v is not None
    (rows, _, heads, key_dim), value_dim = q.shape, v.shape[-1]
    width = scan.states * key_dim
    memory = empty_state(q, v)
    eye = torch.eye(key_dim, dtype=memory.dtype, device=q.device).expand(rows, heads, -1, -1)
    nothing = torch.zeros_like(eye)
    states = [torch.cat([memory, eye, nothing][: 1 + scan.states], dim=-1)]
    states += [torch.cat([memory, nothing, eye][: 1 + scan.states], dim=-1)]
    with torch.no_grad():
        values = torch.cat([v, v.new_zeros(*v.shape[:-1], width)], dim=-1)
        y, after = scan([q, k, values, *gates], (states[0], states[1]), segment_ids)
        end = torch.cat(after, dim=-2)
        # Copies: what is kept should not hold on to the wider tensor.
        return Piece(
            end[..., value_dim:].contiguous(), end[..., :value_dim].contiguous(),
            y[..., value_dim:].contiguous(), y[..., :value_dim],
        )  # fmt: skip


def join(first: Tensor, matrices: Tensor, offsets: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state X before every piece, and [M; S] after the last, from the state X before the first.

    first [batch, heads, J Dk, Dv], matrices P [pieces, batch, heads, 2 Dk, J Dk], offsets c [pieces, batch, heads,
    2 Dk, Dv]; keep [pieces, batch]: whether a piece goes on with the segment of the one before. Returns starts
    [pieces, batch, heads, J Dk, Dv] and the end [batch, heads, 2 Dk, Dv], in the dtype of ``first``.
    """
    width = first.shape[-2]
    x, starts = first.double(), []
    for index in range(len(matrices)):
        if keep is not None and index:
            x = x.where(keep[index][:, None, None, None], 0)
        starts.append(x.to(first.dtype))
        end = torch.baddbmm(
            offsets[index].double().flatten(0, 1), matrices[index].double().flatten(0, 1), x.flatten(0, 1)
        ).unflatten(0, first.shape[:2])
        x = end[..., :width, :]
    return torch.stack(starts), end.to(first.dtype)


def join_backward(matrices: Tensor, keep: Tensor | None, from_outputs: Tensor, grad_end: Tensor) -> Tensor:
    """Gradients of [M; S] after every piece [pieces, batch, heads, 2 Dk, Dv].

    matrices and keep as in ``join``; from_outputs [pieces, batch, heads, J Dk, Dv]: F^T dy of every piece; grad_end
    [batch, heads, 2 Dk, Dv]: of the state after the last piece.
    """
    x = grad_end.double()
    grads = [x]
    for index in reversed(range(1, len(matrices))):
        before = from_outputs[index].double() + matrices[index].double().mT @ x
        if keep is not None:
            before = before.where(keep[index][:, None, None, None], 0)
        # Without momentum nothing after a piece depends on its last update.
        x = torch.cat([before, before.new_zeros(*x.shape[:-2], x.shape[-2] - before.shape[-2], x.shape[-1])], dim=-2)
        grads.append(x)
    return torch.stack(grads[::-1]).to(from_outputs.dtype)


def add_reads(piece: Piece, starts: Tensor) -> Tensor:
    """y = y_0 + F X from the states X [rows, heads, J Dk, Dv] before the pieces; [rows, tokens, heads, Dv]."""
    reads = (piece.reads.transpose(1, 2).to(starts.dtype) @ starts).transpose(1, 2)
    return (piece.outputs + reads).to(piece.outputs.dtype)


def grad_from_outputs(reads: Tensor, grad_y: Tensor, dtype: torch.dtype) -> Tensor:
    """F^T dy [rows, heads, J Dk, Dv]: the gradient of the state before a piece through the piece's outputs."""
    reads = rearrange(reads, "rows tokens heads keys -> rows heads keys tokens")
    return reads.to(dtype) @ grad_y.transpose(1, 2).to(dtype)


def scan_backward(
    scan: Scan,
    tokens: Sequence[Tensor | None],
    segment_ids: Tensor | None,
    starts: Tensor,
    grad_y: Tensor,
    grad_ends: Tensor,
) -> tuple[list[Tensor | None], State]:
    """Gradients of the tokens and of the state before each piece, from those of its outputs and of [M; S] after it.

    starts [rows, heads, J Dk, Dv], grad_y [rows, tokens, heads, Dv], grad_ends [rows, heads, 2 Dk, Dv].
    """
    leaves = [None if x is None else x.detach().requires_grad_() for x in tokens]
    states = [x.requires_grad_() for x in starts.detach().chunk(scan.states, dim=-2)]
    if scan.states == 1:
        states.append(torch.zeros_like(states[0], requires_grad=True))
    with torch.enable_grad():
        y, after = scan(leaves, (states[0], states[1]), segment_ids)
    grad_memory, grad_momentum = (x.contiguous() for x in grad_ends.chunk(2, dim=-2))
    wanted = [x for x in leaves if x is not None] + states
    found = iter(
        torch.autograd.grad(
            [y, *after], wanted, [grad_y.contiguous(), grad_memory, grad_momentum], materialize_grads=True
        )
    )
    return [None if x is None else next(found) for x in leaves], (next(found), next(found))


class _SplitScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scan: Scan, pieces: int, segment_ids: Tensor | None, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        *tokens, memory, momentum = inputs
        assert memory is not None and momentum is not None
        batch = memory.shape[0]
        folded = [_fold(x, pieces) for x in tokens]
        ids = _fold(segment_ids, pieces)
        keep = None
        if ids is not None:
            ends = ids[:, [0, -1]].unflatten(0, (batch, pieces))
            keep = torch.cat([torch.ones_like(ends[:, :1, 0]) > 0, ends[:, 1:, 0] == ends[:, :-1, 1]], dim=1).mT

        with torch.autocast(device_type=memory.device.type, enabled=False):
            piece = scan_piece(scan, folded, ids)
            first = torch.cat([memory, momentum][: scan.states], dim=-2)
            matrices, offsets = (_by_piece(x, pieces) for x in (piece.matrix, piece.offset))
            starts, end = join(first, matrices, offsets, keep)
            y = _unfold(add_reads(piece, _by_row(starts)), pieces)
        ctx.save_for_backward(segment_ids, keep, starts, matrices, piece.reads, *tokens)
        ctx.scan, ctx.pieces = scan, pieces
        after = end.chunk(2, dim=-2)
        return y, after[0].clone(), after[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_memory: Tensor, grad_momentum: Tensor) -> tuple[Any, ...]:
        segment_ids, keep, starts, matrices, reads, *tokens = ctx.saved_tensors
        scan, pieces = ctx.scan, ctx.pieces
        with torch.autocast(device_type=grad_y.device.type, enabled=False):
            grad_y = _fold(grad_y, pieces)
            from_outputs = _by_piece(grad_from_outputs(reads, grad_y, starts.dtype), pieces)
            grad_end = torch.cat([grad_memory, grad_momentum], dim=-2)
            grad_ends = join_backward(matrices, keep, from_outputs, grad_end)
            folded = [_fold(x, pieces) for x in tokens]
            grads, states = scan_backward(
                scan, folded, _fold(segment_ids, pieces), _by_row(starts), grad_y, _by_row(grad_ends)
            )
        first = [_by_piece(x, pieces)[0] for x in states]
        return (None, None, None, *(None if x is None else _unfold(x, pieces) for x in grads), *first)


def _fold(x: Any, pieces: int) -> Any:
    """[batch, sequence, ...] to [batch x pieces, sequence / pieces, ...]."""
    return None if x is None else rearrange(x, "batch (pieces tokens) ... -> (batch pieces) tokens ...", pieces=pieces)


def _unfold(x: Tensor, pieces: int) -> Tensor:
    """The inverse of ``_fold``."""
    return rearrange(x, "(batch pieces) tokens ... -> batch (pieces tokens) ...", pieces=pieces)


def _by_piece(x: Tensor, pieces: int) -> Tensor:
    """[batch x pieces, ...] to [pieces, batch, ...]."""
    return rearrange(x, "(batch pieces) ... -> pieces batch ...", pieces=pieces)


def _by_row(x: Tensor) -> Tensor:
    """The inverse of ``_by_piece``."""
    return rearrange(x, "pieces batch ... -> (batch pieces) ...")
