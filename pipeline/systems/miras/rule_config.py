"""What each rule of the MIRAS family has to choose, a section per rule; titans and delta have none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError
from pipeline.model_config import at_least


@dataclass(frozen=True)
class MonetaConfig:
    """The rule moneta: p-norm bias, q-norm retention (MIRAS, arXiv 2504.13173)."""

    p: float = 3.0
    """Exponent of the loss |e|_p^p on the error e; its error signal is p sign(e) |e|^(p - 1)."""
    q: float = 4.0
    """Exponent of the norm that links the dual state to the memory; 2 is the identity."""
    link: Literal["mirror", "printed"] = "mirror"
    """mirror: the mirror map |A|_q^(2 - q) |A|^(q - 1) sign(A), of degree 1; printed: the paper's A / |A|_q^(q - 2),
    which grows without bound near an empty memory when q is above 3."""
    smooth: Literal["none", "sqrt", "tanh"] = "none"
    """Error signal near 0. none: as it is (p of 2 or more); sqrt: |e| as sqrt(e^2 + eps); tanh: sign(e) as well."""
    clip: float = 10.0
    """Largest norm of a token's gradient: the memory then grows linearly at most."""
    momentum: bool = False
    """Add momentum as titans has it; the paper has none."""

    def __post_init__(self) -> None:
        if not 1 <= self.p < math.inf or (self.p < 2 and self.smooth == "none"):
            raise UserError(f"--model.memory.moneta.p {self.p}: give 2 or more, or 1 or more with a --...moneta.smooth")
        if not 2 <= self.q < math.inf:
            raise UserError(f"--model.memory.moneta.q {self.q}: give 2 or more")
        if not self.clip > 0:
            raise UserError(f"--model.memory.moneta.clip {self.clip}: give a value above 0")


@dataclass(frozen=True)
class YaadConfig:
    """The rule yaad: Huber bias, local and global L2 retention (MIRAS, arXiv 2504.13173)."""

    form: Literal["elementwise", "norm"] = "elementwise"
    """Where the error is cut: each component at delta, or its norm."""
    threshold: Literal["head", "token"] = "token"
    """head: delta is one learned number per head; token: a learned function of the token's key."""
    delta: float = 0.5
    """Initial delta of every head."""
    momentum: bool = False
    """Add momentum as titans has it; the paper has none."""

    def __post_init__(self) -> None:
        if not 0 < self.delta < math.inf:
            raise UserError(f"--model.memory.yaad.delta {self.delta}: give a value above 0")


@dataclass(frozen=True)
class MemoraConfig:
    """The rule memora: rows of the memory are scaled distributions (MIRAS, arXiv 2504.13173)."""

    scale: float = 8.0
    """What the entries of a row add up to."""
    momentum: bool = False
    """Add momentum as titans has it; the paper has none."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise UserError(f"--model.memory.memora.scale {self.scale}: give a value above 0")


@dataclass(frozen=True)
class MlpConfig:
    """The rule mlp: the memory is a perceptron with one hidden layer (Titans, arXiv 2501.00663)."""

    hidden: int = 4
    """Width of the hidden layer, as a multiple of head_dim."""
    clip: float = 10.0
    """Largest norm of a token's gradient: the memory then grows linearly at most."""
    momentum: bool = True
    """Momentum as titans has it."""

    def __post_init__(self) -> None:
        at_least(1, self, "memory.mlp", "hidden")
        if not self.clip > 0:
            raise UserError(f"--model.memory.mlp.clip {self.clip}: give a value above 0")


@dataclass(frozen=True)
class SlotsConfig:
    """The attachment slots: keys and values behind the window, merged where they are too many."""

    count: int = 256
    """Slots per key-value head. They and the chunk's tokens are the memory's state, twice head_dim numbers each."""
    chunk: int = 64
    """Tokens after which what has left the window is stored, at the chunk's end, at multiples of it in a row; it is
    part of the result. A query sees the window, and what the tokens of its chunk have pushed out of it."""
    reach: int = 2048
    """Positions behind the window at which a slot stands at the most; nearer, it is at its newest token's. With the
    window and the chunk, no more than the backbone was trained for."""
    importance: bool = False
    """Tokens weigh, in the criterion of merging and in the means, the root of the attention that is predicted for them
    from key and value; learned beside the loss, from the attention of a step's own queries."""

    def __post_init__(self) -> None:
        at_least(1, self, "memory.slots", "count", "chunk", "reach")
        if self.chunk > self.count:
            raise UserError(
                f"--model.memory.slots.chunk {self.chunk}: {self.count} slots cannot take so many tokens at once: give"
                " no more than --model.memory.slots.count"
            )


@dataclass(frozen=True)
class SwigluConfig:
    """The rule swiglu: SwiGLU fast weights, updated once per large chunk (LaCT, arXiv 2505.23884)."""

    gradient_chunk: int = 2048
    """Tokens that make one update, read by the chunks after it: attention has to cover what lies in a token's own.
    It is part of the result."""
    hidden: int = 2
    """Width of the hidden layer, as a multiple of head_dim."""
    muon: bool = False
    """Orthogonalise each update by five Newton-Schulz steps."""
    momentum: bool = True
    """Add each update, damped by the momentum, to the next."""

    def __post_init__(self) -> None:
        at_least(1, self, "memory.swiglu", "gradient_chunk", "hidden")
