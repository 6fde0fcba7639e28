"""What a misspelt word may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

CLOSE = 0.75
"""Least similarity (difflib's ratio) of a word and what it may have meant."""
MOST = 3
"""Suggestions at most."""


def nearest(word: str, known: Iterable[str], most: int = MOST) -> list[str]:
    """The known words that `word` may have meant, the likeliest first: what it is the start of, then similar ones."""
    words = sorted(set(known))

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, word, name).ratio()

    longer = [name for name in words if len(word) > 2 and name.startswith(word)]
    similar = difflib.get_close_matches(word, words, n=most, cutoff=CLOSE)
    return sorted(dict.fromkeys([*longer, *similar]), key=likeness, reverse=True)[:most]


def nearest_flag(word: str, known: Iterable[str]) -> list[str]:
    """The flags that `word`, without dots or with some, may have meant: those of the run come before sections' own.

    A section's flag is also meant by its last part: `--tokenizer` is `--data.tokenizer`.
    """
    name = _bare(word)
    flags = {_bare(flag): flag for flag in known}
    plain = {bare: flag for bare, flag in flags.items() if "." not in bare}
    ends: dict[str, list[str]] = {}
    for bare, flag in flags.items():
        if "." in bare:
            ends.setdefault(bare.rpartition(".")[2], []).append(flag)
    last = name.rpartition(".")[2]
    if name in flags:
        # Dashes or underscores alone were wrong.
        found = [flags[name]]
    elif "." in name:
        found = [flags[bare] for bare in nearest(name, flags)] or ends.get(last, [])
    else:
        one_off = [bare for bare in nearest(name, plain) if _one_letter_off(name, bare)]
        found = [plain[bare] for bare in one_off or nearest(name, plain, most=1)] + ends.get(last, [])
    if not found:
        found = [flag for end in nearest(last, ends) for flag in ends[end]]
    return found[:MOST]


def _one_letter_off(word: str, other: str) -> bool:
    """Whether one letter more, less or other is all that differs: several words may be that near, none nearer."""
    changed = difflib.SequenceMatcher(None, word, other, autojunk=False).get_opcodes()
    return sum(max(to - start, till - begin) for tag, start, to, begin, till in changed if tag != "equal") <= 1


def _bare(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")


def did_you_mean(found: Sequence[str]) -> str:
    """`: did you mean a, b or c?`; empty where nothing was found."""
    if not found:
        return ""
    *most, last = found
    return f": did you mean {', '.join(most)} or {last}?" if most else f": did you mean {last}?"
