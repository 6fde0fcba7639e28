"""Greedy continuations, side by side, are those of each prompt alone, up to where they stop."""

from __future__ import annotations

import torch

from pipeline.data.tokenizer import ByteTokenizer
from pipeline.downstream.generation import Prompt, continuations
from tests.inference.fake_decoder import FakeDecoder, pseudo_random, scripted

BYTES = ByteTokenizer()


def ids(text: str) -> list[int]:
    found: list[int] = BYTES.encode(text).tolist()
    return found


def test_each_prompt_goes_on_by_itself() -> None:
    def ascii_alone(tokens: list[int]) -> torch.Tensor:
        logits = pseudo_random(300)(tokens)
        logits[:97] = logits[123:260] = -torch.inf  # letters; rows behind the tokenizer's ids are never chosen
        return logits

    prompts = [Prompt(ids(text), most, ()) for text, most in (("ab", 5), ("the longest", 2), ("c", 7))]
    together = FakeDecoder(ascii_alone, 300)
    found = continuations(together, BYTES, prompts)
    assert [len(text) for text in found] == [5, 2, 7] and together.calls == [3, 2, 2, 2, 1, 1]
    assert found == [continuations(FakeDecoder(ascii_alone, 300), BYTES, [prompt])[0] for prompt in prompts]
    history = ids("ab")
    for character in found[0]:
        assert ord(character) == int(ascii_alone(history)[:260].argmax())
        history.append(ord(character))


def test_a_text_ends_before_a_word_at_the_end_of_a_document_and_at_its_length() -> None:
    script = [*ids("one. Two; and"), 256, *ids("never")]
    decoder = FakeDecoder(scripted(script, 3, 260), 260)

    def after(most: int, *until: str) -> str:
        return continuations(decoder, BYTES, [Prompt([1, 2, 3], most, until)])[0]

    assert after(50) == "one. Two; and"
    assert after(50, ";", ". Two") == "one"
    assert after(4, ";") == "one."
    assert after(50, "absent") == "one. Two; and"


def test_a_prompt_leaves_room() -> None:
    decoder = FakeDecoder(lambda tokens: torch.eye(260)[97 + len(tokens)], 260, limit=6)
    assert continuations(decoder, BYTES, [Prompt([1] * 9, 2, ())]) == ["ef"], "four tokens were read"
    assert continuations(decoder, BYTES, []) == []
