"""Random numbers that are a function of what they are for, not of the order in which they are drawn."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniforms(seed: int, domain: str, draw: Tensor, length: int, n: int = 1) -> Tensor:
    """[rows, length, n] float64 in the open interval (0, 1), on the device of draw, [rows] int64.

    Each is a hash of (seed, domain, draw, position, k): the same on every device, in every batch and on any number of
    ranks. A draw has a SplitMix64 sequence of its own (Steele, Lea and Flood 2014, Fast splittable pseudorandom number
    generators), whose start is a hash of seed, domain and draw. Growing length leaves the numbers of the first
    positions as they were.
    """
    digest = hashlib.blake2b(f"{seed}/{domain}".encode(), digest_size=8).digest()
    key = _signed(int.from_bytes(digest, "little"))
    start = _mixed(_mixed(draw.to(torch.int64) * _signed(_GOLDEN) + key) ^ key)
    counter = torch.arange(1, length * n + 1, device=draw.device, dtype=torch.int64) * _signed(_GOLDEN)
    bits = _shifted(_mixed(start[:, None] + counter), 12)  # 52 bits, so that adding a half is exact
    return ((bits.to(torch.float64) + 0.5) * 2.0**-52).view(len(draw), length, n)


def categorical(probabilities: Tensor, u: Tensor) -> Tensor:
    """Draws by inversion: the first state whose cumulative probability reaches u, [...] in (0, 1), of probabilities
    [..., states] that need not sum to exactly 1. int64; a state of probability 0 is never drawn."""
    cumulative = probabilities.to(torch.float64).cumsum(-1)
    return (cumulative < u[..., None] * cumulative[..., -1:]).sum(-1)


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser of 64-bit integers; products wrap, as int64 does."""
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x shifted to the right as an unsigned integer, which int64 is not."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
