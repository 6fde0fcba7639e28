"""A bounded store of keys and values: what does not fit is merged, the nearest keys first.

A softmax over all keys that lie behind a window is approximated by one over `slots` means of keys, each with the
logarithm of the number of tokens that it stands for added to its logit: exact where the merged keys are equal
(Transformer-VQ, arXiv 2309.16354, does the same with a learned codebook). Which keys are merged is Ward's criterion (J.
Am. Stat. Assoc. 58, 1963): the pair that adds least to the sum of squared distances of keys from their slot's mean,
found among pairs of two halves of the candidates as token merging does (arXiv 2210.09461), so that a round of merges is
one matrix of distances. The criterion is divided by the root of the pair's age: without that new keys, each of one
token, are the cheapest to merge, and what lies right behind the window is blurred first. So resolution falls with
distance. Tokens may have weights, in place of 1 each, in the sum of squares and in the means: what is merged
with a heavy token moves it little.

What is stored is a constant to the gradient, as the keys that a window carries between steps are.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.ops import store_slots_native
from pipeline.ops.checks import TOKENS, cannot_run, check_tensor, not_taken, sum_dtype
from pipeline.ops.slots import Slots, SlotsByChunk
from pipeline.ops.store_slots_torch import store_slots_torch

Backend = Literal["auto", "torch", "cpu"]


def store_slots(
    slots: Slots,
    k: Tensor,
    v: Tensor,
    weights: Tensor | None,
    taken: Tensor,
    goes_on: Tensor,
    order: Tensor,
    *,
    backend: Backend = "auto",
) -> SlotsByChunk:
    """Stores the tokens of all chunks of a step, one chunk after the other. Has no gradient.

    Of a chunk, as many pairs are merged as there are tokens too many.

    Args:
        slots: as the first chunk finds them; not changed.
        k, v: ``[batch, chunks, tokens, heads, dim]``, k before RoPE; float64, float32, bfloat16 or float16.
        weights: ``[batch, chunks, tokens, heads]``, above 0: of the tokens in the criterion and the means, float64 for
            float64 keys, else float32. None: 1 each.
        taken: ``[batch, chunks, tokens]`` bool: the tokens that are stored, the others are not.
        goes_on: ``[batch, chunks]`` bool: False empties the slots after the chunk has found them, before it is stored.
        order: ``[slots + tokens]`` int64: `pipeline.ops.slots.shuffle` of as many, on the tensors' device.
        backend: ``auto`` takes the native kernel for CPU tensors where it is built, passes its check at first use, and
            takes the arguments: k and v float32 or bfloat16, dim a multiple of 16. Else it takes the PyTorch path, as
            ``torch`` always does. ``cpu`` names the native kernel, and refuses what it does not take.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, and the message names it; a chunk has more tokens
            than there are slots, as every merge takes one of two halves away; or a backend asked for by name does not
            take an argument, is not built, or fails its check.

    The two paths round differently: where two merges cost the same up to rounding, each may choose another one.
    """
    if backend not in ("auto", "torch", "cpu"):
        raise ValueError(f"backend is {backend!r}; expected auto, torch or cpu")
    if weights is None:
        weights = k.new_ones(k.shape[:-1], dtype=sum_dtype(k))
    _check(slots, k, v, weights, taken, goes_on, order)
    k, v, weights = k.detach(), v.detach(), weights.detach()
    with torch.no_grad(), torch.autocast(device_type=k.device.type, enabled=False):
        run = store_slots_native.store_slots_native if _runs_natively(backend, k, v) else store_slots_torch
        return run(slots, k, v, weights, taken, goes_on, order)


def _runs_natively(backend: str, k: Tensor, v: Tensor) -> bool:
    if backend == "torch":
        return False
    wrong = store_slots_native.unsupported(k, v)
    if wrong is not None:
        if backend == "auto":
            return False
        name, expected = wrong
        raise not_taken(backend, name, {"k": k, "v": v}[name], expected)
    if backend == "auto":
        return store_slots_native.fits(k.dtype)
    if (failure := store_slots_native.why_not(k.dtype)) is not None:
        raise cannot_run(backend, failure)
    return True


def _check(slots: Slots, k: Tensor, v: Tensor, weights: Tensor, taken: Tensor, goes_on: Tensor, order: Tensor) -> None:
    if k.dim() != 5:
        raise ValueError(f"k has shape {list(k.shape)}; expected [batch, chunks, tokens, heads, dim]")
    batch, chunks, tokens, heads, dim = k.shape
    count = slots.keys.shape[2]
    if tokens > count:
        raise ValueError(f"{tokens} tokens at once into {count} slots: give at most as many")
    check_tensor("k", k, k.shape, TOKENS, k, "k")
    check_tensor("v", v, k.shape, (k.dtype,), k, "k")
    check_tensor("weights", weights, k.shape[:-1], (sum_dtype(k),), k, "k")
    check_tensor("taken", taken, (batch, chunks, tokens), (torch.bool,), k, "k")
    check_tensor("goes_on", goes_on, (batch, chunks), (torch.bool,), k, "k")
    check_tensor("order", order, (count + tokens,), (torch.int64,), k, "k")
    for name, x in slots._asdict().items():
        shape = (batch, heads, count, dim) if x.dim() == 4 else (batch, heads, count)
        check_tensor(f"slots.{name}", x, shape, (sum_dtype(k),), k, "k")
