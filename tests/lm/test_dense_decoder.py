"""Decoding token by token against one pass of transformers without a cache, in float64; every family that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import UserError
from pipeline.lm import dense_decoder
from pipeline.lm.dense_decoder import DenseDecoder
from tests.lm.families import FAMILIES, decoder

EXACT = {"rtol": 0, "atol": 1e-10}
MODELS: dict[str, Any] = {}


def model_of(name: str) -> Any:
    """In float64; mistral's window is short enough to be left behind."""
    if name not in MODELS:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            if name == "gpt2":
                config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=128)
                model: Any = transformers.GPT2LMHeadModel(config)
            elif name == "hybrid":
                # Every second layer has a window.
                config = transformers.Gemma3TextConfig(
                    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=64,
                    num_key_value_heads=2, head_dim=8, sliding_window=7, max_position_embeddings=256,
                    layer_types=["sliding_attention", "full_attention"] * 2,
                )  # fmt: skip
                model = transformers.Gemma3ForCausalLM(config)
            else:
                model = decoder(name)
                if name == "mistral":
                    model.config.sliding_window = 7
        # The eager one takes its softmax in float32.
        model.set_attn_implementation("sdpa")
        MODELS[name] = model.double().eval()
    return MODELS[name]


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain(model: Any, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


NAMES = [*FAMILIES, "gpt2", "hybrid"]


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_rows_of_different_lengths_equal_one_pass_over_each(name: str) -> None:
    model, lengths, steps = model_of(name), [5, 19, 1, 11], 12
    own = DenseDecoder(model)
    texts = [ids_of(1, length + steps, seed=length) for length in lengths]
    states, behind = [], []
    for text, length in zip(texts, lengths, strict=True):
        states.append(own.empty(1))
        behind.append(own.read(text[:, :length], states[-1]))
    state, logits = own.join(states), [torch.cat(behind)]
    assert state.rows == 4 and state.lengths.tolist() == lengths
    for step in range(steps):
        ids = torch.stack([text[0, length + step] for text, length in zip(texts, lengths, strict=True)])
        logits.append(own.step(ids, state))
    found = torch.stack(logits, dim=1)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        torch.testing.assert_close(found[row], plain(model, text)[0, length - 1 :], **EXACT)
    assert state.lengths.tolist() == [length + steps for length in lengths]


@pytest.mark.parametrize("name", ["olmo", "mistral", "hybrid"])
def test_pieces_of_a_prompt_equal_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows that are padded already, and with logits behind every token."""
    monkeypatch.setattr(dense_decoder, "PIECE", 5)
    monkeypatch.setattr(dense_decoder, "SPARE", 2)
    model = model_of(name)
    own = DenseDecoder(model)
    short, long, more = ids_of(1, 3), ids_of(1, 16, seed=1), ids_of(2, 13, seed=2)
    states = [own.empty(1), own.empty(1)]
    own.read(short, states[0])
    own.read(long, states[1])
    state = own.join(states)
    found = own.logits(more, state)
    again = own.join(states)
    torch.testing.assert_close(own.read(more, again), found[:, -1], **EXACT)
    for row, first in enumerate((short, long)):
        whole = plain(model, torch.cat([first, more[row : row + 1]], dim=1))[:, first.shape[1] :]
        torch.testing.assert_close(found[row : row + 1], whole, **EXACT)
    # What was joined is as it was.
    assert [state.lengths.tolist() for state in states] == [[3], [16]]
    torch.testing.assert_close(own.step(more[:1, 0], states[0]), found[:1, 0], **EXACT)


@settings(max_examples=12)
@given(st.data())
def test_select_and_join_and_restore_keep_rows_apart(data: st.DataObject) -> None:
    """Whatever is done with rows in whatever order, each is the text that it has read."""
    name = data.draw(st.sampled_from(["olmo2", "hybrid"]))
    model = model_of(name)
    own = DenseDecoder(model)
    texts: list[list[int]] = [[], []]
    state = own.empty(2)
    logits = None
    for number in range(data.draw(st.integers(1, 6))):
        match data.draw(st.sampled_from(["read", "step", "select", "join", "restore"])):
            case "read":
                ids = ids_of(len(texts), data.draw(st.integers(1, 9)), seed=number)
                logits = own.read(ids, state)
                texts = [text + row.tolist() for text, row in zip(texts, ids, strict=True)]
            case "step":
                ids = ids_of(len(texts), seed=number)
                logits = own.step(ids, state)
                texts = [text + [int(token)] for text, token in zip(texts, ids, strict=True)]
            case "select":
                rows = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=3))
                state, texts, logits = own.select(state, torch.tensor(rows)), [texts[row] for row in rows], None
            case "join":
                other = own.empty(1)
                own.read(ids_of(1, 4, seed=99), other)
                state, texts, logits = own.join([other, state]), [ids_of(1, 4, seed=99)[0].tolist(), *texts], None
            case "restore":
                state = own.restore({name: tensor.clone() for name, tensor in state.tensors().items()})
        assert state.lengths.tolist() == [len(text) for text in texts]
    if logits is None:
        ids = ids_of(len(texts), seed=77)
        logits, texts = own.step(ids, state), [text + [int(i)] for text, i in zip(texts, ids, strict=True)]
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row], plain(model, torch.tensor([text]))[0, -1], **EXACT)


def test_a_state_has_no_columns_that_no_row_needs() -> None:
    own = DenseDecoder(model_of("hybrid"))
    states = [own.empty(1), own.empty(1)]
    own.read(ids_of(1, 30), states[0])
    own.read(ids_of(1, 4), states[1])
    both = own.join(states)
    assert {tensor.shape[2] for name, tensor in both.tensors().items() if name != "lengths"} == {30, 6}
    short = own.select(both, torch.tensor([1]))
    assert {tensor.shape[2] for name, tensor in short.tensors().items() if name != "lengths"} == {4}
    own.step(torch.tensor([3]), short)
    assert both.lengths.tolist() == [30, 4]


def test_room_for_more_tokens_is_not_made_for_each() -> None:
    own = DenseDecoder(model_of("olmo"))
    state = own.empty(1)
    own.read(ids_of(1, 4), state)
    places = set()
    for token in range(40):
        own.step(torch.tensor([token]), state)
        places.add(state.tensors()["layers.0.keys"].data_ptr())
    assert len(places) == 1


def test_logits_are_float32_whatever_the_model_is() -> None:
    model = decoder("olmo2").to(torch.bfloat16).eval()
    own = DenseDecoder(model)
    assert own.read(ids_of(1, 4), own.empty(1)).dtype == torch.float32
    assert own.vocab_size == 64 and own.limit == 256


@pytest.mark.parametrize(
    "change, said",
    [
        ({"lengths": None}, "lengths: is missing"),
        ({"layers.9.keys": torch.zeros(1)}, r"layers\.9\.keys: is not of this model"),
        ({"layers.1.keys": torch.zeros(1, 2, 3, 8)}, r"layers\.1\.keys: is \(1, 2, 3, 8\)"),
        ({"layers.1.keys": torch.zeros(1, 2, 4, 8)}, r"layers\.1\.keys: is .*float32"),
        ({"lengths": torch.tensor([-1])}, "lengths"),
        ({"lengths": torch.tensor([5])}, r"layers\.0\.keys: is \(1, 2, 4, 8\)"),
    ],
)
def test_what_is_not_of_the_model_is_not_restored(change: dict[str, Tensor | None], said: str) -> None:
    own = DenseDecoder(model_of("smollm2"))
    state = own.empty(1)
    own.read(ids_of(1, 4), state)
    tensors = {**state.tensors(), **change}
    with pytest.raises(ValueError, match=said):
        own.restore({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_model_that_keeps_more_than_keys_and_values_is_refused() -> None:
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(UserError, match="MambaForCausalLM: its layer 0 is of the kind"):
        DenseDecoder(transformers.MambaForCausalLM(config).eval())
