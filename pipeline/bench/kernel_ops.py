"""What `bench kernels` measures: each op with its inputs, its backends, and the FLOPs of its definition."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.ops import miras_scan
from pipeline.ops.affine_scan import affine_scan
from pipeline.ops.attention_slots import SlotPlan, plan_slots, slot_attention
from pipeline.ops.attention_slots_native import takes
from pipeline.ops.checks import sum_dtype
from pipeline.ops.dual_maps import HuberError, PNormError, QNormLink, SoftmaxLink
from pipeline.ops.dual_scan import dual_scan
from pipeline.ops.mlp_scan import mlp_scan
from pipeline.ops.rope import Rope
from pipeline.ops.scan_split import miras_scan_split
from pipeline.ops.slots import SlotMaps, Slots, SlotsByChunk
from pipeline.ops.swiglu_scan import swiglu_scan

CHUNK = 64
"""Tokens solved together in the count of the exact rule, whatever a backend takes."""


@dataclass(frozen=True)
class Shape:
    """Batch x tokens x heads x dimension of a head."""

    batch: int
    tokens: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.heads}x{self.dim}"

    @property
    def vectors(self) -> int:
        """Tokens of all rows and heads."""
        return self.batch * self.tokens * self.heads


def parse_shape(text: str) -> Shape:
    """A shape as 1x8192x4x64; K is 1,024 (1x64Kx16x128). Raises UserError."""
    words = text.split("x")
    if len(words) != 4 or not all(re.fullmatch(r"[1-9]\d*K?", word) for word in words):
        raise UserError(f"--shapes has {text!r}: write batch x tokens x heads x head dimension, as in 1x8192x4x64")
    batch, tokens, heads, dim = (int(word.removesuffix("K")) * (1024 if word.endswith("K") else 1) for word in words)
    return Shape(batch, tokens, heads, dim)


@dataclass(frozen=True)
class Op:
    """One op: how to make its inputs, to call it, and to count it."""

    name: str
    backends: tuple[str, ...]
    inputs: Callable[[Shape, torch.dtype, torch.device], list[Tensor]]
    """Leaves that all need gradients, from a fixed seed."""
    call: Callable[[Sequence[Tensor], str], Tensor]
    """The output, by one of `contenders`. Raises ValueError where the backend does not take the inputs."""
    flops: Callable[[Shape], tuple[float, float]] | None
    """Of the forward and of the backward pass; None where the count depends on how it is done."""
    check_tokens: int = 256
    """Length at which a backend is compared with float64."""
    besides: Callable[[Shape, torch.dtype], float] = lambda shape, dtype: 0.0
    """Bytes of constants that each pass reads."""
    splits: bool = False
    """Whether every backend also runs with the sequence in pieces, as in cpu/4."""

    def contenders(self, backends: Sequence[str], pieces: Sequence[int] = ()) -> list[str]:
        """What is timed: those of ``backends`` that the op has, each plain and, if the op splits, in pieces."""
        ends = ["", *(f"/{count}" for count in pieces)] if self.splits else [""]
        return [name + end for name in backends if name in self.backends for end in ends]

    def has(self, contender: str) -> bool:
        """Whether it is the op's own, and not a peer."""
        return contender.partition("/")[0] in self.backends

    def moved(self, shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
        """Bytes of the forward and the backward pass, each tensor moved once.

        Forward: the inputs and the output. Backward: the inputs, the output's gradient, and the inputs' gradients.
        """
        one = self.inputs(Shape(1, 1, 1, shape.dim), dtype, torch.device("cpu"))
        # Weights have no token.
        inputs = float(sum(x.nbytes for x in one if x.shape[:3] == (1, 1, 1)))
        output = float(self.call(one, "torch").nbytes)
        besides = self.besides(shape, dtype)
        return shape.vectors * (inputs + output) + besides, shape.vectors * (2 * inputs + output) + besides


def memory_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v, alpha, eta, theta: unit keys and queries, and gates where the memory cannot grow."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.tokens, shape.heads)
    accumulate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (torch.randn(*size, shape.dim, generator=generator) for _ in range(3))
    alpha, beta = (torch.rand(size, generator=generator) for _ in range(2))
    eta = torch.full(size, 0.5)
    tokens = [x.to(device, dtype) for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)]
    gates = [x.to(device, accumulate_dtype) for x in (0.01 * alpha, eta, 0.9 * beta * (1 - eta) ** 2)]
    return [x.requires_grad_() for x in (*tokens, *gates)]


def exact_flops(shape: Shape, states: int = 2) -> tuple[float, float]:
    """Multiplications and additions of the exact chunked rule, forward and backward, with nothing recomputed twice.

    Per token and head, with J states (2; 1 without momentum), d = key and value dimension and chunks of C tokens:
    forward, 6 J d^2 for what states give to residuals and read-outs and take from a chunk, 8 C d for four products of
    squares with rows, C^2 for the inverse. Backward, twice the products with states, from residuals and states that
    were kept, and 18 C d + C^2 for the squares, K K^T, Q K^T and the inverse made anew.
    """
    square, rows = 6.0 * states * shape.dim**2, float(CHUNK * shape.dim)
    forward = square + 8 * rows + CHUNK**2
    backward = 2 * square + 18 * rows + CHUNK**2
    return shape.vectors * forward, shape.vectors * backward


def _titans(x: Sequence[Tensor], backend: str) -> Tensor:
    return miras_scan(*x, rule="titans", backend=backend)[0]  # type: ignore[arg-type]


def _delta(x: Sequence[Tensor], backend: str) -> Tensor:
    return miras_scan(*x, rule="delta", backend=backend)[0]  # type: ignore[arg-type]


def _split(x: Sequence[Tensor], contender: str) -> Tensor:
    backend, _, pieces = contender.partition("/")
    return miras_scan_split(*x, backend=backend, pieces=int(pieces or 1))[0]  # type: ignore[arg-type]


def affine_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """a in [0.9, 1) and b, each [batch, tokens, heads, dim]; a in float32 at least, where 1 - 1e-3 is not 1."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.tokens, shape.heads, shape.dim)
    accumulate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    a = 1 - 0.1 * torch.rand(size, generator=generator)
    b = torch.randn(size, generator=generator)
    return [a.to(device, accumulate_dtype).requires_grad_(), b.to(device, dtype).requires_grad_()]


def affine_flops(shape: Shape) -> tuple[float, float]:
    """Forward a h + b. Backward the same recurrence in reverse, and its product with h for a's gradient."""
    elements = float(shape.vectors * shape.dim)
    return 2 * elements, 3 * elements


def _affine(x: Sequence[Tensor], backend: str) -> Tensor:
    return affine_scan(x[0], x[1], backend=backend)[0]  # type: ignore[arg-type]


def deep_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, *, matrices: int, hidden: int) -> list[Tensor]:
    """As `memory_inputs`, and the initial weights of a deep memory, each [heads, hidden x dim, dim]."""
    tokens = memory_inputs(shape, dtype, device)
    generator = torch.Generator().manual_seed(2)
    size = (matrices, shape.heads, hidden * shape.dim, shape.dim)
    weights = torch.randn(size, generator=generator) / math.sqrt(shape.dim)
    return tokens + [w.to(device, tokens[3].dtype).requires_grad_() for w in weights]


def _moneta(x: Sequence[Tensor], backend: str) -> Tensor:
    q, k, v, alpha, _, theta = x
    return dual_scan(q, k, v, alpha, None, theta, error=PNormError(), link=QNormLink())[0]


def _yaad(x: Sequence[Tensor], backend: str) -> Tensor:
    q, k, v, alpha, _, theta = x
    return dual_scan(q, k, v, alpha, None, theta, error=HuberError(), threshold=torch.ones_like(theta))[0]


def _memora(x: Sequence[Tensor], backend: str) -> Tensor:
    q, k, v, alpha, _, theta = x
    return dual_scan(q, k, v, alpha, None, theta, link=SoftmaxLink())[0]


def _mlp(x: Sequence[Tensor], backend: str) -> Tensor:
    q, k, v, alpha, eta, theta, w_in, w_out = x
    return mlp_scan(q, k, v, alpha, eta, theta, (w_in, w_out), clip=1.0)[0]


def _swiglu(x: Sequence[Tensor], backend: str) -> Tensor:
    q, k, v, alpha, eta, theta, gate, up, down = x
    return swiglu_scan(q, k, v, alpha, eta, theta, (gate, up, down))[0]


SLOTS = {"window": 256, "chunk": 64, "slots": 512}
"""Of the attention that is measured with slots: as `miras_smollm2` has them."""


def slot_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v and what is added to the logits of slots, small enough that tokens keep a part of the weight: else its
    gradient is what rounding leaves."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.tokens, shape.heads)
    accumulate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = [torch.randn(*size, shape.dim, generator=generator).to(device, dtype) for _ in range(3)]
    shift = (torch.randn(size, generator=generator) - 4).to(device, accumulate_dtype)
    return [x.requires_grad_() for x in (*tokens, shift)]


@lru_cache(maxsize=2)
def _stored(shape: Shape, dtype: torch.dtype, backend: Literal["sdpa", "native"]) -> tuple[SlotPlan, SlotsByChunk]:
    """The plan of one document in every row, and full slots for each of its chunks."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.arange(shape.tokens).expand(shape.batch, -1)
    rope = Rope(10000.0 ** -(torch.arange(0, shape.dim, 2, dtype=torch.float64) / shape.dim))
    plan = plan_slots(
        torch.zeros_like(positions), positions, None,
        rope=rope, sinks=4, reach=1024, dtype=dtype, backend=backend, **SLOTS,
    )  # fmt: skip
    chunks = -(-shape.tokens // SLOTS["chunk"])
    size = (shape.batch, chunks, shape.heads, SLOTS["slots"])
    # The same numbers for every dtype, so that each is compared with what it was given.
    drawn = (torch.randn(*size, shape.dim, generator=generator).bfloat16() for _ in range(2))
    keys, values = (x.to(dtype) for x in drawn)
    counts, ages = (torch.randint(1, 9, size, generator=generator).to(sum_dtype(keys)) for _ in range(2))
    empty = Slots.empty(shape.batch, shape.heads, SLOTS["slots"], shape.dim, keys)
    return plan, SlotsByChunk(keys, values, counts, ages, empty)


def slot_flops(shape: Shape) -> tuple[float, float]:
    """Forward 4 d per query and key that it sees. Backward twice that, but for slots, whose values have no gradient."""
    window, chunk, far = SLOTS["window"], SLOTS["chunk"], SLOTS["slots"]
    chunks = [(start, min(chunk, shape.tokens - start)) for start in range(0, shape.tokens, chunk)]
    near = sum(length * (min(window, start) + (length + 1) / 2) for start, length in chunks) / shape.tokens
    return shape.vectors * 4.0 * shape.dim * (near + far), shape.vectors * shape.dim * (8.0 * near + 6.0 * far)


def slot_bytes(shape: Shape, dtype: torch.dtype) -> float:
    """Of keys and values of the slots of every chunk, with their counts and ages in float32."""
    slots = shape.batch * -(-shape.tokens // SLOTS["chunk"]) * shape.heads * SLOTS["slots"]
    return float(slots * (2 * shape.dim * dtype.itemsize + 8))


def _slots(x: Sequence[Tensor], backend: str) -> Tensor:
    q, k, v, shift = x
    if backend == "cpu" and not takes(q.device, q.dtype, q.shape[3]):
        raise ValueError(
            "the native kernel of slot_attention takes float32 and bfloat16, and heads of a multiple of 16"
        )
    plan, slots = _stored(Shape(*q.shape), q.dtype, "native" if backend == "cpu" else "sdpa")
    heads, dim = q.shape[2:]
    key_map, value_map = q.new_zeros(2, heads, dim, dim)
    maps = SlotMaps(key_map, value_map, q.new_zeros(heads, dim))
    return slot_attention(q, k, v, plan, None, slots, maps, shift, q.shape[3] ** -0.5)


def ops() -> dict[str, Op]:
    """Every op by name. The family has PyTorch paths alone; its rules are called with what their recipes default to."""
    native = ("torch", "cpu", "cuda")
    found = [
        Op("miras_scan", native, memory_inputs, _titans, exact_flops),
        Op("miras_scan_delta", native, memory_inputs, _delta, partial(exact_flops, states=1)),
        Op("miras_scan_split", native, memory_inputs, _split, exact_flops, splits=True),
        Op("affine_scan", native, affine_inputs, _affine, affine_flops),
        Op("slot_attention", ("torch", "cpu"), slot_inputs, _slots, slot_flops, besides=slot_bytes),
        Op("moneta", ("torch",), memory_inputs, _moneta, None),
        Op("yaad", ("torch",), memory_inputs, _yaad, None),
        Op("memora", ("torch",), memory_inputs, _memora, None),
        Op("mlp", ("torch",), partial(deep_inputs, matrices=2, hidden=4), _mlp, None),
        Op("swiglu", ("torch",), partial(deep_inputs, matrices=3, hidden=2), _swiglu, None),
    ]
    return {op.name: op for op in found}
