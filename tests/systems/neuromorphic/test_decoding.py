"""The token path is the span path: the same logits, and the same memories at every span's end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.systems.neuromorphic.decoding import NeuromorphicDecoder
from pipeline.systems.neuromorphic.state import Uses
from pipeline.systems.neuromorphic.stream_tensors import named
from tests.systems.neuromorphic.small import EOS, SIZES, documents, small_model

TOKENS, SPAN = 40, SIZES.span
USES = [Uses(), Uses(lifelong=True), Uses(episodic="absent"), Uses(procedural="empty"), Uses(working="empty")]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Three rows: without an end of document, with ends at the ends of spans, and with several in one span."""
    found = torch.randint(1, SIZES.vocab, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    found[1, SPAN - 1] = found[1, 3 * SPAN] = EOS
    found[2, 10] = found[2, 13] = found[2, 27] = EOS
    return found


def spans(model, ids: Tensor, uses: Uses) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits [rows, tokens, vocabulary] and the states after each span, by the span path of training."""
    labels, segments, positions = documents(ids)
    state, logits, states = model.initial_state(len(ids), ids.device, torch.float64), [], []
    with torch.no_grad():
        for start in range(0, ids.shape[1], SPAN):
            part = slice(start, start + SPAN)
            arguments = ids[:, part], segments[:, part], positions[:, part]
            hidden = model(arguments[0], None, *arguments[1:], state, uses).hidden
            logits.append(torch.nn.functional.linear(hidden, model.head.weight))
            state = model(arguments[0], labels[:, part], *arguments[1:], state, uses).state
            states.append(named(state))
    return torch.cat(logits, 1), states


def check_state(state, expected: dict[str, Tensor]) -> None:
    for name, tensor in named(state.begin).items():
        if name.startswith("working") and name not in expected:
            continue  # nothing was kept of it
        torch.testing.assert_close(tensor, expected[name], msg=name)


@pytest.mark.parametrize("uses", USES)
def test_token_by_token_is_as_in_training(model, ids: Tensor, uses: Uses) -> None:
    wanted, states = spans(model, ids, uses)
    decoder = NeuromorphicDecoder(model, uses, eos_id=EOS)
    state = decoder.empty(3)
    for t in range(TOKENS):
        torch.testing.assert_close(decoder.step(ids[:, t], state), wanted[:, t])
        # A span is written once the token behind it is known.
        if t and t % SPAN == 0:
            check_state(state, states[t // SPAN - 1])
    assert state.lengths.tolist() == [TOKENS] * 3


@pytest.mark.parametrize("uses", USES[:2])
@pytest.mark.parametrize("cuts", [(TOKENS,), (5, 30, 40), (8, 16, 17, 40), (1, 39, 40), (33, 40)])
def test_reading_in_pieces_is_the_same(model, ids: Tensor, uses: Uses, cuts: tuple[int, ...]) -> None:
    wanted, states = spans(model, ids, uses)
    for every in (False, True):
        decoder = NeuromorphicDecoder(model, uses, eos_id=EOS, piece=2 * SPAN)
        state, begin = decoder.empty(3), 0
        for end in cuts:
            found = (decoder.logits if every else decoder.read)(ids[:, begin:end], state)
            torch.testing.assert_close(found, wanted[:, begin:end] if every else wanted[:, end - 1])
            begin = end
        check_state(state, states[-2])


def test_rows_are_apart_wherever_their_spans_end(model, ids: Tensor) -> None:
    uses = Uses(lifelong=True)
    wanted, _ = spans(model, ids, uses)
    decoder = NeuromorphicDecoder(model, uses, eos_id=EOS)
    parts = []
    lengths = (7, 16, 20)
    for row, length in enumerate(lengths):
        parts.append(decoder.empty(1))
        decoder.read(ids[row : row + 1, :length], parts[-1])
    state = decoder.select(decoder.join(parts), torch.tensor([2, 0, 1, 0]))
    order = torch.tensor([2, 0, 1, 0])
    assert state.lengths.tolist() == [20, 7, 16, 7]
    for number in range(12):
        places = torch.tensor(lengths)[order] + number
        found = decoder.step(ids[order, places], state)
        torch.testing.assert_close(found, wanted[order, places])
    places = (torch.tensor(lengths)[order] + 12)[:, None] + torch.arange(4)
    found = decoder.logits(ids[order[:, None], places], state)
    torch.testing.assert_close(found, wanted[order[:, None], places])
    # What was copied is as it was.
    torch.testing.assert_close(decoder.step(ids[:1, 7], parts[0]), wanted[:1, 7])


def test_the_state_has_one_size_and_comes_back(model, ids: Tensor) -> None:
    decoder = NeuromorphicDecoder(model, Uses(), eos_id=EOS)
    sizes = []
    for tokens in (0, 3, 17, 32):
        state = decoder.empty(2)
        if tokens:
            decoder.read(ids[:2, :tokens], state)
        sizes.append({name: tuple(tensor.shape) for name, tensor in state.tensors().items()})
        again = decoder.restore({name: tensor.clone() for name, tensor in state.tensors().items()})
        for t in range(tokens, tokens + 6):
            assert torch.equal(decoder.step(ids[:2, t], again), decoder.step(ids[:2, t], state))
    assert all(found == sizes[0] for found in sizes)


def test_the_state_of_a_model_in_bfloat16_is_float32(ids: Tensor) -> None:
    decoder = NeuromorphicDecoder(small_model(torch.bfloat16), Uses(lifelong=True), eos_id=EOS)
    state = decoder.empty(3)
    assert decoder.read(ids[:, :19], state).dtype == torch.float32
    assert {tensor.dtype for tensor in state.tensors().values()} == {torch.float32, torch.int64}
    assert decoder.step(ids[:, 19], state).isfinite().all()


def test_without_an_end_a_text_is_one_document(model, ids: Tensor) -> None:
    decoder = NeuromorphicDecoder(model, Uses())
    state = decoder.empty(3)
    decoder.read(ids, state)
    assert state.segments.unique().tolist() == [0]
    assert state.position.tolist() == [TOKENS] * 3


@pytest.mark.parametrize("uses", USES[:4])
def test_greedy_decoding_goes_on_as_the_span_path_would(model, ids: Tensor, uses: Uses) -> None:
    """The reference computes each text anew from its start for every token, with spans of training.

    Not without working memory: a token that comes again, as the likeliest does, then has the same key again, and which
    of equal episodes is read or written is a matter of rounding.
    """
    decoder = NeuromorphicDecoder(model, uses, eos_id=EOS)
    state, texts = decoder.empty(3), ids[:, :11]
    logits = decoder.read(texts, state)
    for _ in range(2 * SPAN + 3):
        filled = torch.nn.functional.pad(texts, (0, -texts.shape[1] % SPAN), value=1)
        wanted = spans(model, filled, uses)[0][:, texts.shape[1] - 1]
        torch.testing.assert_close(logits, wanted)
        assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
        texts = torch.cat([texts, logits.argmax(-1, keepdim=True)], 1)
        logits = decoder.step(texts[:, -1], state)


def test_each_token_goes_through_each_module_once(model, ids: Tensor) -> None:
    counts: dict[str, int] = {}

    def counting(name: str, tokens: Callable[[Tensor], int]) -> Callable[..., None]:
        return lambda _, inputs: counts.update({name: counts.get(name, 0) + tokens(inputs[0])})

    modules = {
        "embedding": (model.embedding, Tensor.numel),
        "working memory": (model.working, lambda x: x.shape[0] * x.shape[1]),
        "decoder": (model.decoder, lambda layers: layers.shape[2] * layers.shape[3]),
        "head": (model.head, lambda hidden: hidden.shape[0] * hidden.shape[1]),
        **{f"layer {number}": (layer, lambda x: x.shape[1] * x.shape[2]) for number, layer in enumerate(model.layers)},
    }
    hooks = [module.register_forward_pre_hook(counting(name, tokens)) for name, (module, tokens) in modules.items()]
    try:
        decoder = NeuromorphicDecoder(model, Uses(lifelong=True), eos_id=EOS)
        state = decoder.empty(3)
        decoder.read(ids[:, : 2 * SPAN + 3], state)
        for t in range(2 * SPAN + 3, TOKENS):
            decoder.step(ids[:, t], state)
        assert counts == dict.fromkeys(modules, 3 * TOKENS)
        # Rows whose spans end at different places, and the logits of all tokens.
        parts = [decoder.empty(1) for _ in range(3)]
        counts.clear()
        for row, part in enumerate(parts):
            decoder.logits(ids[row : row + 1, : 5 + row], part)
        decoder.logits(ids[:, :30], decoder.join(parts))
        assert counts == dict.fromkeys(modules, 5 + 6 + 7 + 3 * 30)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lengths", lambda x: x.float()),
        ("lengths", lambda x: -1 - x),
        ("begin.procedural.keys", lambda x: x[:, :1]),
        ("held", lambda x: x + SPAN + 1),
        ("read.hidden", lambda x: x.float()),
        ("ids", None),
    ],
)
def test_a_state_of_another_model_is_refused(model, name: str, change) -> None:
    decoder = NeuromorphicDecoder(model, Uses())
    tensors = decoder.empty(2).tensors()
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=name):
        decoder.restore(tensors)


def test_ids_of_another_shape_are_refused(model) -> None:
    decoder = NeuromorphicDecoder(model, Uses())
    for call in (decoder.read, decoder.logits):
        with pytest.raises(ValueError, match="expected"):
            call(torch.ones(3, 4, dtype=torch.int64), decoder.empty(2))
    with pytest.raises(ValueError, match="expected"):
        decoder.step(torch.ones(3, dtype=torch.int64), decoder.empty(2))
