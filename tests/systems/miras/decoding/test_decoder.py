"""Decoding gives what the parallel pass gives: token by token, in pieces, and both in turn, for rows at any places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.capabilities import Generates
from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.decoding.decoder import MirasDecoder
from pipeline.systems.miras.rule_config import MlpConfig, SwigluConfig
from tests.launch.parity_main import attached
from tests.lm.families import FAMILIES
from tests.systems.miras.decoding.harness import (
    CHUNK,
    TOKENS,
    assert_close,
    decoded,
    model_of,
    parallel_logits,
    texts,
)
from tests.systems.miras.harness import built

ATTACHMENTS = ("residual", "mal", "mag", "mac", "overflow", "mixed")
RULES = ("titans", "delta", "moneta", "yaad", "memora", "mlp", "swiglu")
RULED = [(attachment, rule) for attachment in ATTACHMENTS for rule in RULES] + [("slots", "titans")]
PARTS = (8, -1, -1, -1, -1, -1, -1, 13, -1, 9, -1, -1, -1)
"""Reads that begin and end within chunks and segments; steps over the borders of both, and to where the window of 10
has lost first the 2 sinks, then another token."""


@pytest.mark.parametrize(("attachment", "rule"), RULED)
def test_reads_and_steps_in_turn_equal_the_parallel_pass(attachment: str, rule: str) -> None:
    model, ids = model_of(attachment, rule), texts()
    decoder = MirasDecoder(model)
    state = decoder.empty(2)
    found = decoded(decoder, ids, state, PARTS)
    assert_close(found, parallel_logits(model, ids))
    assert state.lengths.tolist() == [TOKENS, TOKENS]


@pytest.mark.parametrize(("attachment", "rule"), [pair for pair in RULED if pair[1] in ("titans", "swiglu")])
def test_token_by_token_equals_the_parallel_pass_in_float32(attachment: str, rule: str) -> None:
    model, ids = model_of(attachment, rule, dtype=torch.float32), texts()
    decoder = MirasDecoder(model)
    found = decoded(decoder, ids, decoder.empty(2), [-1] * TOKENS)
    assert found.dtype == torch.float32
    assert_close(found, parallel_logits(model, ids), 1e-4)


@pytest.mark.parametrize("rule", ["titans", "mlp"])
@pytest.mark.parametrize("attachment", ["residual", "mal", "mag", "mac"])
def test_full_attention_keeps_all_keys(attachment: str, rule: str) -> None:
    model, ids = model_of(attachment, rule, kind="full"), texts()
    decoder = MirasDecoder(model)
    assert_close(decoded(decoder, ids, decoder.empty(2), PARTS), parallel_logits(model, ids))


@pytest.mark.parametrize("attachment", ["residual", "mac", "overflow", "slots"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_backbones(family: str, attachment: str) -> None:
    model, ids = model_of(attachment, family=FAMILIES[family]), texts()
    decoder = MirasDecoder(model)
    assert_close(decoded(decoder, ids, decoder.empty(2), PARTS), parallel_logits(model, ids))


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "mlp", "mlp": MlpConfig(momentum=False)},
        {"rule": "swiglu", "swiglu": SwigluConfig(gradient_chunk=16, muon=True, momentum=False)},
        {"rule": "titans", "key_activation": "none", "persistent": 0, "conv": 2, "write_gate": "hard"},
        {"rule": "yaad", "context": 1, "gradient_chunk": 3, "conv": 5},
        {"rule": "titans", "context": 64},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
@pytest.mark.parametrize("attachment", ["residual", "mixed"])
def test_other_settings_of_the_memory(attachment: str, options: dict[str, object]) -> None:
    model, ids = model_of(attachment, **options), texts()  # type: ignore[arg-type]
    decoder = MirasDecoder(model)
    assert_close(decoded(decoder, ids, decoder.empty(2), PARTS), parallel_logits(model, ids))


def test_without_a_memory_it_is_the_backbone() -> None:
    model, ids = model_of("residual", layers=()), texts()
    decoder = MirasDecoder(model)
    assert_close(decoded(decoder, ids, decoder.empty(2), PARTS), parallel_logits(model, ids))


@st.composite
def parts(draw: st.DrawFn) -> list[int]:
    """Reads and steps that make up a text."""
    found: list[int] = []
    while (left := TOKENS - sum(map(abs, found))) > 0:
        found.append(draw(st.one_of(st.just(-1), st.integers(1, left))))
    return found


@pytest.mark.parametrize(
    ("attachment", "rule"), [("residual", "swiglu"), ("mixed", "moneta"), ("mixed", "delta"), ("slots", "titans")]
)
def test_wherever_reads_and_steps_begin(attachment: str, rule: str) -> None:
    model, ids = model_of(attachment, rule), texts(1)
    expected = parallel_logits(model, ids)
    decoder = MirasDecoder(model, piece=2 * CHUNK)

    @settings(max_examples=6, deadline=None)
    @given(parts())
    def holds(cuts: list[int]) -> None:
        assert_close(decoded(decoder, ids, decoder.empty(1), cuts), expected)

    holds()


@pytest.mark.parametrize("kind", ["window", "full"])
@pytest.mark.parametrize("piece", [7, 16])
def test_the_length_of_a_piece_changes_nothing(piece: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of full attention become shorter the more there is to see."""
    monkeypatch.setattr("pipeline.systems.miras.decoding.decoder.SCORES", 150)
    model, ids = model_of("mac", "yaad", kind=kind), texts(1)
    decoder = MirasDecoder(model, piece=piece)
    state = decoder.empty(1)
    last = decoder.read(ids[:, :-1], state)
    expected = parallel_logits(model, ids)
    assert_close(last, expected[:, -2])
    assert_close(decoder.step(ids[:, -1], state), expected[:, -1])
    longest = (piece, piece) if kind == "window" else (min(piece, 150 // piece), 150 // (30 + piece))
    assert (decoder._piece(0), decoder._piece(30)) == longest


@pytest.mark.parametrize(
    ("attachment", "rule"), [("residual", "swiglu"), ("mixed", "titans"), ("mac", "moneta"), ("slots", "titans")]
)
def test_rows_at_different_places_are_apart(attachment: str, rule: str) -> None:
    """Texts that have been read to other lengths are joined, continued together, and as they would be alone."""
    model, ids = model_of(attachment, rule), texts(4)
    expected = parallel_logits(model, ids)
    decoder = MirasDecoder(model)
    lengths = (0, 3, 12, 22)
    states = []
    for row, length in enumerate(lengths):
        states.append(decoder.empty(1))
        if length:
            decoder.read(ids[row : row + 1, :length], states[row])
    joined = decoder.join(states)
    assert joined.rows == 4 and joined.lengths.tolist() == list(lengths)
    rows = torch.arange(4)
    for step in range(12):
        at = torch.tensor(lengths) + step
        assert_close(decoder.step(ids[rows, at], joined), expected[rows, at])
    # Read together from where they are, in another order; and the states that were joined have stayed as they were.
    order = torch.tensor([2, 0, 3])
    fewer = decoder.select(joined, order)
    at = joined.lengths[order][:, None] + torch.arange(6)
    assert_close(decoder.logits(ids[order[:, None], at], fewer), expected[order[:, None], at])
    assert fewer.lengths.tolist() == [30, 18, 40] and joined.lengths.tolist() == [12, 15, 24, 34]
    assert_close(decoder.step(ids[3:, 22], states[3]), expected[3:, 22])
    assert_close(decoder.step(ids[rows, joined.lengths], joined), expected[rows, joined.lengths - 1])


def test_a_copy_of_a_row_goes_its_own_way() -> None:
    model, ids = model_of("mixed", "mlp"), texts(2)
    expected = parallel_logits(model, ids)
    decoder = MirasDecoder(model)
    state = decoder.empty(1)
    decoder.read(ids[:1, :23], state)
    copies = decoder.select(state, torch.tensor([0, 0]))
    other = torch.cat([ids[0, :23], ids[1, 23:]])[None]
    both = torch.cat([ids[:1], other])
    found = decoded(decoder, both[:, 23:], copies, [-1] * 9 + [8])
    assert_close(found[:1], expected[:1, 23:])
    assert_close(found[1:], parallel_logits(model, other)[:, 23:])
    assert_close(decoder.step(ids[:1, 23], state), expected[:1, 23])


@pytest.mark.parametrize("attachment", ["residual", "mixed", "slots"])
def test_a_windowed_state_does_not_grow_with_the_text(attachment: str) -> None:
    decoder = MirasDecoder(model_of(attachment))
    state = decoder.empty(2)
    sizes = []
    for _ in range(3):
        decoder.read(texts(), state)
        sizes.append(sum(x.nbytes for x in state.tensors().values()))
    assert sizes[0] == sizes[1] == sizes[2]


def test_bfloat16_gives_finite_float32_logits_near_those_of_float32() -> None:
    ids = texts()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        decoder = MirasDecoder(model_of("mixed", "titans", dtype=dtype))
        state = decoder.empty(2)
        decoder.read(ids[:, :20], state)
        found.append(decoder.step(ids[:, 20], state))
    assert found[1].dtype == torch.float32
    probabilities = [logits.softmax(-1) for logits in found]
    assert (probabilities[0] - probabilities[1]).abs().max() < 0.1


def test_wrong_shapes_and_foreign_states_are_refused() -> None:
    decoder = MirasDecoder(model_of("residual"))
    with pytest.raises(ValueError, match=r"ids are \[2, 0\]; expected \[2, tokens\] with a token"):
        decoder.read(texts()[:, :0], decoder.empty(2))
    with pytest.raises(ValueError, match=r"ids are \[3\]; expected one per row, \[2\]"):
        decoder.step(torch.zeros(3, dtype=torch.int64), decoder.empty(2))
    with pytest.raises(TypeError, match="is not a state of this decoder"):
        decoder.step(torch.zeros(1, dtype=torch.int64), object())  # type: ignore[arg-type]


def test_full_attention_takes_texts_as_long_as_in_training() -> None:
    config = attached("residual", "full")
    system, model = built(config)
    assert isinstance(system, Generates)
    assert system.decoder(model).limit == config.sequence_length


def test_the_system_generates() -> None:
    system, model = built(attached("residual"))
    assert isinstance(system, Generates)
    decoder = system.decoder(model)
    assert decoder.vocab_size == 64 and decoder.limit is None
    assert isinstance(system.sizes.memory, MemoryConfig)
    ids = texts(1)
    assert_close(decoder.read(ids, decoder.empty(1)), parallel_logits(model, ids)[:, -1])
