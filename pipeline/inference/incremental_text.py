"""Tokens to text as they come: no piece ends inside a character."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers make of bytes that are no character, such as the first of one whose others are still to come."""
BEFORE = 8
"""Tokens before the first that decide how it reads: where a word begins, whether a character goes on."""


LONGEST = 12
"""Tokens that are held back; more of them are no character that is still to be completed."""
UNDECIDED = 4
"""Of these, tokens at the end that may begin a character: it has four bytes at the most."""


class IncrementalText:
    """The text of one row's tokens, piece by piece; the pieces together are the text of all of them.

    A piece is what a token adds to the text of a few tokens before it (decoding a token by itself would lose spaces
    between words), held back while the text ends inside a character of UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """`before`: the last tokens of the text that is gone on with; they are in no piece."""
        self._tokenizer = tokenizer
        self._given, self._held = list(before)[-BEFORE:], list[int]()

    def push(self, token: int) -> str:
        """What can be said for certain with one more token; often its text, or nothing."""
        self._held.append(token)
        piece = self._added()
        if not piece or piece.endswith(UNKNOWN):
            return self._decided(piece) if len(self._held) > LONGEST else ""
        self._given, self._held = self._held, []
        return piece

    def _decided(self, piece: str) -> str:
        """Of what is held back, the beginning that no later token changes; nothing where the cut is in a character."""
        held, rest = self._held[:-UNDECIDED], self._held[-UNDECIDED:]
        cut = IncrementalText(self._tokenizer)
        cut._given, cut._held = self._given, held
        begin = cut._added()
        cut._given, cut._held = held[-BEFORE:], rest
        if begin + cut._added() != piece:
            return ""
        self._given, self._held = cut._given, rest
        return begin

    def end(self) -> str:
        """What was held back, at the end of the text."""
        piece = self._added() if self._held else ""
        self._given, self._held = self._held, []
        return piece

    def _added(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._given + self._held)[len(decode(self._given)) :]
