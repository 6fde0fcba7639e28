"""Slots and attention to them as their definition has it: loops over tokens and pairs, in Python floats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.ops.slots import shuffle


@dataclass
class Slot:
    """What one slot of one head holds."""

    key: Tensor
    value: Tensor
    count: int
    newest: int
    """When its newest token came."""
    place: int = 0
    """Of a new token: in its chunk."""
    weight: float = 1.0
    """In the criterion and the means: the sum of its tokens'."""


def stored(slots: list[Slot], tokens: list[Slot], limit: int, chunk: int, now: int) -> list[Slot]:
    """The slots after `tokens`, at the time `now`: one more than the last token's."""
    indices = [*range(len(slots)), *(limit + token.place for token in tokens)]
    # The order in which candidates are halved has no meaning of its own.
    goes = shuffle(limit + chunk)
    candidates = zip(indices, slots + tokens, strict=True)
    together = [slot for _, slot in sorted(candidates, key=lambda pair: goes[pair[0]])]
    first, second = together[0::2], together[1::2]

    def cost(one: Slot, other: Slot) -> float:
        apart = float((one.key - other.key).square().sum())
        age = now - max(one.newest, other.newest)
        return apart * one.weight * other.weight / (one.weight + other.weight) / math.sqrt(age + 1)

    cheapest = [min(range(len(second)), key=lambda j, one=one: cost(one, second[j])) for one in first if second]  # type: ignore[misc]
    order = sorted(range(len(cheapest)), key=lambda i: cost(first[i], second[cheapest[i]]))
    gone = order[: max(0, len(together) - limit)]
    sums = {j: [other.key * other.weight, other.value * other.weight] for j, other in enumerate(second)}
    for i in gone:
        one, other = first[i], second[cheapest[i]]
        sums[cheapest[i]][0] = sums[cheapest[i]][0] + one.key * one.weight
        sums[cheapest[i]][1] = sums[cheapest[i]][1] + one.value * one.weight
        other.count += one.count
        other.weight += one.weight
        other.newest = max(other.newest, one.newest)
    for j, other in enumerate(second):
        other.key, other.value = (total / other.weight for total in sums[j])
    return [slot for i, slot in enumerate(together) if i % 2 or i // 2 not in gone]


def rotated(x: Tensor, position: int, frequencies: Tensor) -> Tensor:
    cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
    one, two = x.chunk(2)
    return torch.cat([one * cos - two * sin, two * cos + one * sin])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heavy: Tensor,
    shift: Tensor,
    key_map: Tensor,
    value_map: Tensor,
    start: int,
    *,
    frequencies: Tensor,
    window: int,
    sinks: int,
    slots: int,
    chunk: int,
    reach: int,
    scale: float,
) -> tuple[Tensor, list[Slot]]:
    """Of one head and one document: q, k, v [tokens, dim] before RoPE, what tokens weigh [tokens], shift [tokens] and
    maps [dim, dim]; the document begins at place `start` of its row. The output, and the slots that the last token has
    seen."""
    held: list[Slot] = []
    out = []
    done = sinks
    for token in range(len(q)):
        first = (start + token) // chunk * chunk - start
        # What no query of this chunk sees any more is stored, chunk by chunk.
        for begin in range(min(first, chunk - start % chunk - (chunk if start % chunk == 0 else 0)), first + 1, chunk):
            left = range(done, max(done, begin - window))
            since = begin - chunk - window
            new = [Slot(k[j].clone(), v[j].clone(), 1, j, j - since, float(heavy[j])) for j in left]
            if new:
                held = stored(held, new, slots, chunk, begin - window)
            done = max(done, begin - window)
        logits, values = [], []
        for j in range(max(0, first - window), token + 1):
            logits.append(float(rotated(q[token], token, frequencies) @ rotated(k[j], j, frequencies)) * scale)
            values.append(v[j])
        for j in range(min(sinks, max(0, first - window))):
            place = max(0, first - window - sinks) + j
            logits.append(float(rotated(q[token], token, frequencies) @ rotated(k[j], place, frequencies)) * scale)
            values.append(v[j])
        for slot in held if first > 0 else []:
            key = rotated(slot.key + slot.key @ key_map, max(slot.newest, first - window - reach), frequencies)
            logit = float(rotated(q[token], token, frequencies) @ key) * scale
            logits.append(logit + math.log(slot.count) + float(shift[token]))
            values.append(slot.value + slot.value @ value_map)
        weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
        out.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
    return torch.stack(out), held  # type: ignore[arg-type]
