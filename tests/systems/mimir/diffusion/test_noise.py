"""Random numbers as functions of what they are for."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from pipeline.systems.mimir.diffusion.noise import categorical, uniforms

MASK = (1 << 64) - 1


def splitmix(state: int, count: int) -> list[int]:
    """The published generator, in Python's integers: 64-bit words."""
    words = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        words.append(finalised(state))
    return words


def finalised(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_is_the_published_generator() -> None:
    assert splitmix(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("draw", [0, 5, -3, 2**62])
def test_a_draw_is_a_splitmix_sequence(draw: int) -> None:
    key = int.from_bytes(hashlib.blake2b(b"7/train", digest_size=8).digest(), "little")
    start = finalised(finalised((draw * 0x9E3779B97F4A7C15 + key) & MASK) ^ key)
    expected = [((word >> 12) + 0.5) / 2**52 for word in splitmix(start, 10)]
    assert uniforms(7, "train", torch.tensor([draw]), 5, 2).flatten().tolist() == expected


def test_numbers_depend_on_no_split_and_no_width() -> None:
    draws = torch.tensor([3, 100, 4, 2**40])
    whole = uniforms(0, "a", draws, 20, 2)
    assert torch.equal(whole[1:3], uniforms(0, "a", draws[1:3], 20, 2))
    assert torch.equal(whole[:, :7], uniforms(0, "a", draws, 7, 2))
    for other in (uniforms(1, "a", draws, 20, 2), uniforms(0, "b", draws, 20, 2), uniforms(0, "a", draws + 1, 20, 2)):
        assert not (whole == other).any()


def test_numbers_are_uniform_and_independent() -> None:
    u = uniforms(0, "train", torch.arange(2000), 25, 2).numpy()
    assert u.min() > 0 and u.max() < 1
    flat = np.sort(u.ravel())
    distance = np.abs(flat - (np.arange(len(flat)) + 0.5) / len(flat)).max()
    assert distance < 1.95 / np.sqrt(len(flat))  # Kolmogorov-Smirnov, 0.1 %
    centred = (u - 0.5).reshape(2000, 50) * np.sqrt(12)
    positions, draws = centred.T @ centred / 2000, (centred[1:] * centred[:-1]).mean()
    assert np.abs(positions - np.diag(np.diag(positions))).max() < 5 / np.sqrt(2000)
    assert abs(draws) < 4 / np.sqrt(centred.size)


def test_the_largest_word_is_below_one() -> None:
    assert (2**52 - 1 + 0.5) * 2.0**-52 < 1


def test_draws_have_their_probabilities() -> None:
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    drawn = categorical(p * 3, uniforms(0, "x", torch.arange(20_000), 1)[:, 0, 0])
    share = drawn.bincount(minlength=6) / len(drawn)
    assert share[p == 0].eq(0).all()
    assert (share - p).abs().max() < 4 * 0.5 / 20_000**0.5


def test_extreme_numbers_draw_only_what_is_possible() -> None:
    p = torch.tensor([0.0, 1e-30, 1.0, 0.0])
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert categorical(p.expand(2, 4), ends).tolist() == [2, 2]
