"""What a decoding state is made of, and what is refused when one is restored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.systems.miras.decoding.decoder import MirasDecoder
from tests.systems.miras.decoding.harness import assert_close, decoded, model_of, parallel_logits, texts


@pytest.mark.parametrize(
    ("attachment", "rule", "kind"),
    [
        ("residual", "swiglu", "window"),
        ("mixed", "memora", "window"),
        ("mal", "titans", "full"),
        ("slots", "titans", "window"),
    ],
)
def test_a_restored_state_goes_on_bit_for_bit(attachment: str, rule: str, kind: str) -> None:
    model, ids = model_of(attachment, rule, kind=kind), texts(2)
    decoder = MirasDecoder(model)
    short, long = decoder.empty(1), decoder.empty(1)
    decoder.read(ids[:1, :8], short)
    decoder.read(ids[1:, :27], long)
    state = decoder.join([short, long])
    tensors = {name: x.clone() for name, x in state.tensors().items()}
    assert all(len(x) == 2 for x in tensors.values())
    restored = decoder.restore(tensors)
    at = torch.tensor([[8], [27]]) + torch.arange(9)
    following = ids[torch.arange(2)[:, None], at]
    expected = decoded(decoder, following, state, [-1] * 9)
    assert torch.equal(decoded(decoder, following, restored, [-1] * 9), expected)
    # What it was restored from is not touched by going on.
    again = decoder.restore(tensors)
    assert_close(decoder.logits(following, again), parallel_logits(model, ids)[torch.arange(2)[:, None], at])


def _without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("1.memory.tail"), "1.memory.tail is missing"),
        (_without("2.attention.keys"), "2.attention.keys is missing"),
        (_without("lengths"), "lengths is not a list of numbers of tokens"),
        (lambda x: x.update({"3.memory.tail": x["1.memory.tail"]}), "3.memory.tail is nothing that this model keeps"),
        (lambda x: x.update({"1.memory.tail": x["1.memory.tail"][:, 1:]}), r"1.memory.tail is \[2, 2, .*expected"),
        (lambda x: x.update({"0.attention.keys": x["0.attention.keys"][:1]}), r"0.attention.keys is \[1, .*expected"),
        (lambda x: x.update({"0.attention.keys": x["0.attention.keys"].half()}), "0.attention.keys is torch.float16"),
        (lambda x: x["lengths"].add_(5), r"0.attention.keys is \[2, 2, 8, 8\]; expected \[2, 2, 12, 8\]"),
    ],
)
def test_what_is_not_of_this_model_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    decoder = MirasDecoder(model_of("residual"))
    state = decoder.empty(2)
    decoder.read(texts(2, 6), state)
    tensors = {name: x.clone() for name, x in state.tensors().items()}
    change(tensors)
    with pytest.raises(ValueError, match=message):
        decoder.restore(tensors)
