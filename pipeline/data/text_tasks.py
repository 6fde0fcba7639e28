"""Questions about sentences that stand far apart in a text: the task forms of RULER and BABILong, drawn from a seed.

RULER (arXiv 2404.06654, section 3): needles of one or several keys, variable tracking, common words. BABILong (arXiv
2406.10149): the stories of bAbI (arXiv 1502.05698) tasks 1 to 3, spread over other text. A form is drawn here, and put
into a text of exactly so many tokens by `haystack`. Every question has one right answer among CANDIDATES, so that a
guess has a known share; the published tasks that want a list of answers (all variables of a chain, all common words)
ask for one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError

FORMS = ("needle", "variables", "common words", "qa1", "qa2", "qa3")
"""What is asked about text."""
CANDIDATES = 4
"""Answers to choose from: a guess is right once in so many."""
HOPS = 3
"""Assignments of a chain of variables after the first."""
CHAINS = CANDIDATES
"""Chains of variables; one is asked for, the others are answers that stand in the text too."""
COMMON, RARE = 8, 2
"""How often common and rare words stand in the list of words."""
RARE_WORDS = 12
"""Rare words in the list."""
WORDS_PER_LINE = 10
"""Words of a line of the list of words."""
PEOPLE = ("Mary", "John", "Sandra", "Daniel")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
STORY = 24
"""Events of a story."""


@dataclass(frozen=True)
class Question:
    """What is asked at the end of the text."""

    form: str
    prompt: str
    """It ends where the answer begins."""
    answer: str
    candidates: tuple[str, ...]
    """CANDIDATES different answers, the right one among them."""
    depth: float | None = None
    """Where the one sentence stands that answers it, as a share of the text; None: several do."""


@dataclass(frozen=True)
class TextTask:
    """Sentences for the text, in their order, each with a depth in [0, 1] that never falls, and what is asked."""

    facts: tuple[tuple[float, str], ...]
    questions: tuple[Question, ...]


def _choices(draw: np.random.Generator, answer: str, others: Sequence[str]) -> tuple[str, ...]:
    """The answer among CANDIDATES - 1 different others, in an order that says nothing."""
    rest = sorted(set(others) - {answer})
    chosen = [answer, *(rest[i] for i in draw.choice(len(rest), CANDIDATES - 1, replace=False))]
    return tuple(chosen[i] for i in draw.permutation(CANDIDATES))


def _numbers(draw: np.random.Generator, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(1_000_000 + n) for n in draw.choice(9_000_000, count, replace=False)]


def needles(draw: np.random.Generator, words: Sequence[str], depths: Sequence[float]) -> TextTask:
    """RULER's needle in a haystack (niah), one needle a depth: "The special magic number for KEY is N.".

    With one depth it is the single needle; with several, the needle of every key is asked for. The other candidates are
    the numbers of the other needles, as far as there are any.
    """
    rising = sorted(depths)
    keys = [words[i] for i in draw.choice(len(words), len(rising), replace=False)]
    values = _numbers(draw, len(rising) + CANDIDATES)
    facts, questions = [], []
    spare = values[len(rising) :]
    for depth, key, value in zip(rising, keys, values, strict=False):
        facts.append((depth, f"The special magic number for {key} is {value}."))
        present = [other for other in values[: len(rising)] if other != value]
        others = present if len(present) >= CANDIDATES - 1 else [*present, *spare[: CANDIDATES - 1 - len(present)]]
        prompt = f"The special magic number for {key} is"
        questions.append(
            Question("needle", prompt, f" {value}", tuple(f" {c}" for c in _choices(draw, value, others)), depth)
        )
    return TextTask(tuple(facts), tuple(questions))


def variables(draw: np.random.Generator) -> TextTask:
    """RULER's variable tracking: CHAINS chains of HOPS + 1 assignments; asked for the value of a chain's last name."""
    names = [f"X{n}" for n in draw.choice(np.arange(100, 1000), CHAINS * (HOPS + 1), replace=False)]
    values = _numbers(draw, CHAINS)
    chains = [names[i * (HOPS + 1) : (i + 1) * (HOPS + 1)] for i in range(CHAINS)]
    # Assignments of the chains in turns at random, those of each in order.
    turns = draw.permutation(np.repeat(np.arange(CHAINS), HOPS + 1))
    depths = np.sort(draw.random(len(turns)))
    done = [0] * CHAINS
    facts = []
    for depth, chain in zip(depths.tolist(), turns.tolist(), strict=True):
        hop = done[chain]
        source = values[chain] if hop == 0 else f"VAR {chains[chain][hop - 1]}"
        facts.append((depth, f"VAR {chains[chain][hop]} = {source}"))
        done[chain] += 1
    asked = int(draw.integers(CHAINS))
    answer = values[asked]
    prompt = f"The value of VAR {chains[asked][-1]} is"
    choices = tuple(f" {c}" for c in _choices(draw, answer, values))
    return TextTask(tuple(facts), (Question("variables", prompt, f" {answer}", choices),))


def common_words(draw: np.random.Generator, words: Sequence[str]) -> TextTask:
    """RULER's common words: a list in which one word stands COMMON times and RARE_WORDS others RARE times each."""
    chosen = [words[i] for i in draw.choice(len(words), 1 + RARE_WORDS, replace=False)]
    listed = draw.permutation(np.repeat(np.array(chosen, object), [COMMON, *[RARE] * RARE_WORDS])).tolist()
    lines = [listed[i : i + WORDS_PER_LINE] for i in range(0, len(listed), WORDS_PER_LINE)]
    depths = np.sort(draw.random(len(lines))).tolist()
    facts = [(depth, f"List of words: {' '.join(line)}.") for depth, line in zip(depths, lines, strict=True)]
    choices = tuple(f" {c}" for c in _choices(draw, chosen[0], chosen[1:]))
    return TextTask(
        tuple(facts),
        (Question("common words", "The most common word in the list of words is", f" {chosen[0]}", choices),),
    )


def story(draw: np.random.Generator) -> TextTask:
    """bAbI's tasks 1 to 3 over one story of STORY events, in which people move, take objects and drop them.

    qa1: where a person is (one fact); qa2: where an object is (two facts: who has it or dropped it, and where that
    person was); qa3: where the object was before that (three facts).
    """
    while True:
        events, where, track = _events(draw)
        known = [thing for thing in OBJECTS if len(track[thing]) > 1]
        # bAbI asks only what the story answers; where no object has been in two places it is drawn again.
        if known and where:
            break
    facts = tuple(zip(np.sort(draw.random(len(events))).tolist(), events, strict=True))
    person = sorted(where)[draw.integers(len(where))]
    thing = known[draw.integers(len(known))]
    now, before = track[thing][-1], track[thing][-2]
    asked = (
        ("qa1", f"{person} is now in the", where[person]),
        ("qa2", f"The {thing} is now in the", now),
        ("qa3", f"Before the {now} the {thing} was in the", before),
    )
    questions = []
    for form, prompt, answer in asked:
        others = [place for place in PLACES if form != "qa3" or place != now]
        questions.append(Question(form, prompt, f" {answer}", tuple(f" {c}" for c in _choices(draw, answer, others))))
    return TextTask(facts, tuple(questions))


def _events(draw: np.random.Generator) -> tuple[list[str], dict[str, str], dict[str, list[str]]]:
    """(sentences, where each person is, the places each object has been in, in their order)."""
    events: list[str] = []
    where: dict[str, str] = {}
    held: dict[str, str] = {}
    track: dict[str, list[str]] = {thing: [] for thing in OBJECTS}
    lying: dict[str, str] = {}

    def note(thing: str, place: str) -> None:
        if track[thing][-1:] != [place]:
            track[thing].append(place)

    while len(events) < STORY:
        person = PEOPLE[draw.integers(len(PEOPLE))]
        carried = sorted(thing for thing, owner in held.items() if owner == person)
        # An object that was never dropped lies wherever someone first takes it.
        free = [t for t in OBJECTS if t not in held and (t not in lying or lying[t] == where.get(person))]
        kind = draw.random()
        if person in where and free and kind < 0.25:
            thing = free[draw.integers(len(free))]
            held[thing] = person
            lying.pop(thing, None)
            note(thing, where[person])
            events.append(f"{person} took the {thing}.")
        elif carried and kind < 0.4:
            thing = carried[draw.integers(len(carried))]
            del held[thing]
            lying[thing] = where[person]
            events.append(f"{person} dropped the {thing}.")
        else:
            places = [place for place in PLACES if place != where.get(person)]
            where[person] = places[draw.integers(len(places))]
            events.append(f"{person} went to the {where[person]}.")
            for thing in carried:
                note(thing, where[person])
    return events, where, track


def of_forms(task: TextTask, forms: Sequence[str]) -> TextTask:
    """The same with the questions of these forms alone."""
    return dataclasses.replace(task, questions=tuple(one for one in task.questions if one.form in forms))


def together(tasks: Sequence[TextTask]) -> TextTask:
    """All of them in one text: their sentences by depth (those of a task keep their order), and all their questions."""
    facts = sorted((fact for task in tasks for fact in task.facts), key=lambda fact: fact[0])
    return TextTask(tuple(facts), tuple(question for task in tasks for question in task.questions))


def haystack(
    pieces: Sequence[np.ndarray], length: int, facts: Sequence[tuple[float, np.ndarray]], start: int
) -> np.ndarray:
    """Exactly `length` token ids, int64: `facts` (depth, ids) within the text of `pieces` from number `start` on.

    Facts stand between two pieces, as near to their depths as these allow, in their order. The text goes on with the
    first piece after the last, and its beginning is cut off, so that the length is exact. Raises
    UserError where the facts alone are longer.
    """
    room = length - sum(len(ids) for _, ids in facts)
    if room < 0 or not sum(map(len, pieces)):
        raise UserError(
            f"--lengths {length}: the sentences of the tasks take {length - room} tokens: give {length - room} or more"
            if room < 0
            else "the held-out text is empty: give more with --data.path, or raise --data.holdout"
        )
    used: list[np.ndarray] = []
    total, index = 0, start
    while total < room:
        used.append(pieces[index % len(pieces)])
        total += len(used[-1])
        index += 1
    surplus = total - room
    while used and surplus >= len(used[0]):
        surplus -= len(used.pop(0))
    if used:
        used[0] = used[0][surplus:]
    ends = np.cumsum([0, *map(len, used)])
    parts: list[np.ndarray] = []
    placed = [int(np.abs(ends - depth * room).argmin()) for depth, _ in facts]
    for border in range(len(ends)):
        parts += [ids for (_, ids), place in zip(facts, placed, strict=True) if place == border]
        parts += used[border : border + 1]
    return np.concatenate([*parts, np.empty(0, np.int64)]).astype(np.int64)


Encode = Callable[[str], np.ndarray]
"""Text to token ids [tokens] int64."""
