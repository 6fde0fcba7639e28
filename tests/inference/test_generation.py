"""Text after a prompt: against a plain loop, and against `generate` of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from pipeline.inference import Token, generate, read, stream
from pipeline.lm.sampling import Sampling
from tests.inference.fake_decoder import FakeDecoder, pseudo_random, scripted
from tests.lm.families import decoder

BYTES = ByteTokenizer()


def naive(fake: FakeDecoder, prompt: str, index: int, sampling: Sampling, count: int) -> list[int]:
    """One token after the other, each from the whole text."""
    tokens = list(prompt.encode())
    found: list[int] = []
    for _ in range(count):
        logits = fake.following(tokens + found)[: BYTES.vocab_size]
        found += sampling.choose(logits.unsqueeze(0), [index], [len(tokens) + len(found)])
        if found[-1] == BYTES.eos_id or len(tokens) + len(found) == fake.limit:
            break
    return found


def by_row(tokens: list[Token]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for token in tokens:
        found.setdefault(token.row, []).append(token.id)
    return found


@settings(max_examples=40)
@given(
    prompts=st.lists(st.text("abcé", min_size=1, max_size=5), min_size=1, max_size=4),
    count=st.integers(1, 60),
    seed=st.integers(0, 50),
    temperature=st.sampled_from([0.0, 1.0, 4.0]),
    limit=st.sampled_from([None, 25]),
)
def test_rows_are_as_each_alone(
    prompts: list[str], count: int, seed: int, temperature: float, limit: int | None
) -> None:
    """A vocabulary larger than the tokenizer's, rows that end at different times."""
    fake = FakeDecoder(pseudo_random(300, seed), 300, limit)
    sampling = Sampling(temperature, seed=seed)
    options: dict[str, Any] = {"max_new_tokens": count, "temperature": temperature, "seed": seed}
    tokens = list(stream(fake, BYTES, prompts, **options))
    found = by_row(tokens)
    for row, prompt in enumerate(prompts):
        assert found[row] == naive(fake, prompt, row, sampling, count)
        last = [token for token in tokens if token.row == row]
        assert [token.ended for token in last[:-1]] == [None] * (len(last) - 1)
        at_limit = len(prompt.encode()) + len(last) == limit
        why = "eos" if last[-1].id == BYTES.eos_id else "limit" if at_limit else "length"
        assert last[-1].ended == why
        assert "".join(token.text for token in last) == BYTES.decode(found[row])
    # The first is not read again, nor is what comes after the last, and rows that have ended take no part.
    longest = max(map(len, found.values()))
    assert fake.calls == [sum(len(ids) > step for ids in found.values()) for step in range(1, longest)]
    texts = generate(fake, BYTES, prompts, **options)
    assert texts == [BYTES.decode(found[row]) for row in range(len(prompts))]
    assert generate(fake, BYTES, prompts[0], **options) == texts[0]


@pytest.mark.parametrize("name", ["olmo2", "mistral"])
def test_the_likeliest_tokens_are_those_of_transformers(name: str) -> None:
    model = decoder(name).eval()
    model.generation_config.eos_token_id = None
    small = _Letters()
    prompts = ["abc", "The quick brown fox jumps over the lazy dog", "z"]
    found = by_row(list(stream(model, small, prompts, max_new_tokens=20, temperature=0)))
    for row, prompt in enumerate(prompts):
        ids = torch.from_numpy(small.encode(prompt)).unsqueeze(0)
        wanted = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert found[row] == wanted[0, ids.shape[1] :].tolist()


class _Letters(ByteTokenizer):
    """Bytes into 64 ids, none of which ends a document."""

    name, vocab_size, eos_id = "letters", 64, -1

    def encode(self, text: str) -> Any:
        return super().encode(text) % 64


def test_what_was_read_once_is_gone_on_from_many_times() -> None:
    """From a state of one text, of several, and without a prompt; it stays as it is."""
    fake = FakeDecoder(pseudo_random(260), 260)
    book = read(fake, BYTES, "a long book. ")
    pair = read(fake, BYTES, ["who? ", "what? "], state=book)
    assert book.lengths == [13] and pair.lengths == [18, 19]
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 4}
    wanted = generate(fake, BYTES, ["a long book. who? ", "a long book. what? "], **options)
    for _ in range(2):
        assert generate(fake, BYTES, ["who? ", "what? "], state=book, **options) == wanted
        assert generate(fake, BYTES, state=pair, **options) == wanted
    assert generate(fake, BYTES, "who? ", state=book, **options) == wanted[0]
    again = generate(fake, BYTES, ["!", "?"], state=pair, **options)
    assert again == generate(fake, BYTES, ["a long book. who? !", "a long book. what? ?"], **options)
    both = generate(fake, BYTES, "!", state=pair, **options)
    assert both == generate(fake, BYTES, ["a long book. who? !", "a long book. what? !"], **options)
    assert book.lengths == [13] and pair.lengths == [18, 19]
    with pytest.raises(UserError, match="the state is of 2 texts, and there are 3 prompts"):
        read(fake, BYTES, ["a", "b", "c"], state=pair)


def test_characters_are_whole_on_the_way() -> None:
    script = [*"né 日\U0001f9e0!".encode(), BYTES.eos_id]
    tokens = list(stream(FakeDecoder(scripted(script, 3, 260), 260), BYTES, "abc", max_new_tokens=99))
    assert [token.text for token in tokens if token.text] == ["n", "é", " ", "日", "\U0001f9e0", "!"]
    assert tokens[-1] == Token(0, BYTES.eos_id, "", "eos")


def test_a_text_that_ends_inside_a_character_shows_it() -> None:
    fake = FakeDecoder(scripted("日".encode(), 1, 260), 260)
    assert generate(fake, BYTES, "a", max_new_tokens=2) == "\ufffd"
    assert generate(fake, BYTES, "a", max_new_tokens=0) == ""


def test_the_prompt_is_read_before_the_first_token_is_asked_for() -> None:
    """A mistake in it is no surprise of a loop."""
    fake = FakeDecoder(pseudo_random(260), 260, limit=10)
    with pytest.raises(UserError, match="the prompt has 11 tokens, the model takes 10: shorten"):
        stream(fake, BYTES, "a" * 11)
    with pytest.raises(UserError, match="prompt 2 is empty"):
        stream(fake, BYTES, ["a", ""])
    with pytest.raises(UserError, match="the prompt with one token more has 11 tokens"):
        stream(fake, BYTES, "a" * 10)
    assert list(stream(fake, BYTES, "a" * 10, max_new_tokens=0)) == []
    assert [token.ended for token in stream(fake, BYTES, "a" * 9, temperature=0)] == ["limit"]


@pytest.mark.parametrize(
    "prompts, options, words",
    [
        ("", {}, "the prompt is empty"),
        ("a\0b", {}, "the prompt is binary"),
        ("a\udcffb", {}, "the prompt is not UTF-8"),
        ([], {}, "there is no prompt"),
        (None, {}, "neither a prompt nor a state"),
        ("a", {"max_new_tokens": -1}, "--max-new-tokens -1"),
        ("a", {"top_p": 2.0}, "--top-p"),
        ("\xff", {}, "the tokenizer bytes gives the token 195, the model has 128"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(prompts: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        stream(FakeDecoder(pseudo_random(128), 128), BYTES, prompts, **options)


def test_gradients_stay_as_they_were() -> None:
    tokens = stream(decoder("olmo2").eval(), _Letters(), "abc", max_new_tokens=4)
    for _ in tokens:
        assert torch.is_grad_enabled()
