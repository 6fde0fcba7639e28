"""The task forms over long text: every question has one right answer, which another reading of the sentences gives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.long_recall import generator
from pipeline.data.text_tasks import (
    CANDIDATES,
    COMMON,
    HOPS,
    OBJECTS,
    PEOPLE,
    PLACES,
    RARE,
    TextTask,
    common_words,
    haystack,
    needles,
    story,
    together,
    variables,
)
from pipeline.errors import UserError

WORDS = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(60)]
seeds = st.integers(0, 10**9)
many = settings(max_examples=150, deadline=None, derandomize=True)


def check(task: TextTask) -> None:
    """What holds for every form."""
    depths = [depth for depth, _ in task.facts]
    assert depths == sorted(depths) and all(0 <= depth <= 1 for depth in depths)
    for question in task.questions:
        assert len(set(question.candidates)) == CANDIDATES == len(question.candidates)
        assert question.answer in question.candidates
        assert question.answer.startswith(" ") and not question.prompt.endswith(" ")


@many
@given(seeds, st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_a_needle_says_the_number_of_its_key(seed: int, depths: list[float]) -> None:
    task = needles(generator(seed), WORDS, depths)
    check(task)
    said = dict(re.fullmatch(r"The special magic number for (\w+) is (\d{7})\.", s).groups() for _, s in task.facts)  # type: ignore[union-attr]
    assert len(said) == len(set(said.values())) == len(depths) == len(task.questions)
    for (depth, sentence), question in zip(task.facts, task.questions, strict=True):
        key = re.fullmatch(r"The special magic number for (\w+) is", question.prompt).group(1)  # type: ignore[union-attr]
        assert f" {said[key]}" == question.answer and question.depth == depth and key in sentence
        wrong = {c.strip() for c in question.candidates} - {said[key]}
        assert len(wrong & set(said.values())) == min(CANDIDATES - 1, len(depths) - 1)


@many
@given(seeds)
def test_a_chain_of_variables_leads_to_its_number(seed: int) -> None:
    task = variables(generator(seed))
    check(task)
    values: dict[str, str] = {}
    hops: dict[str, int] = {}
    for _, sentence in task.facts:
        name, source = re.fullmatch(r"VAR (X\d+) = (\d+|VAR X\d+)", sentence).groups()  # type: ignore[union-attr]
        assert name not in values
        origin = source.removeprefix("VAR ")
        values[name], hops[name] = values.get(origin, origin), hops.get(origin, -1) + 1
        assert values[name].isdigit(), "a variable stands after what it is assigned"
    (question,) = task.questions
    asked = re.fullmatch(r"The value of VAR (X\d+) is", question.prompt).group(1)  # type: ignore[union-attr]
    assert question.answer == f" {values[asked]}" and hops[asked] == HOPS
    assert {c.strip() for c in question.candidates} <= set(values.values())


@many
@given(seeds)
def test_the_common_word_is_the_commonest_by_far(seed: int) -> None:
    task = common_words(generator(seed), WORDS)
    check(task)
    listed = Counter(w for _, s in task.facts for w in s.removeprefix("List of words: ").removesuffix(".").split())
    (first, most), *rest = listed.most_common()
    (question,) = task.questions
    assert question.answer == f" {first}" and most == COMMON and {count for _, count in rest} == {RARE}
    assert {c.strip() for c in question.candidates} <= set(listed)


def simulate(sentences: Sequence[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Where people are, and the places of every object one after the other, by reading the sentences alone."""
    where: dict[str, str] = {}
    place_of: dict[str, str] = {}
    holder: dict[str, str] = {}
    history: dict[str, list[str]] = {thing: [] for thing in OBJECTS}
    for sentence in sentences:
        person, verb, last = re.fullmatch(r"(\w+) (went to|took|dropped) the (\w+)\.", sentence).groups()  # type: ignore[union-attr]
        assert person in PEOPLE
        if verb == "went to":
            assert last in PLACES and where.get(person) != last
            where[person] = last
        elif verb == "took":
            assert last not in holder and place_of.get(last, where[person]) == where[person], (
                "it lies where it is taken"
            )
            holder[last] = person
        else:
            assert holder.pop(last) == person
        for thing, owner in holder.items():
            place_of[thing] = where[owner]
        for thing, place in place_of.items():
            if history[thing][-1:] != [place]:
                history[thing].append(place)
    return where, history


@many
@given(seeds)
def test_a_story_answers_its_questions(seed: int) -> None:
    task = story(generator(seed))
    check(task)
    where, history = simulate([sentence for _, sentence in task.facts])
    one, two, three = task.questions
    assert (one.form, two.form, three.form) == ("qa1", "qa2", "qa3")
    person = re.fullmatch(r"(\w+) is now in the", one.prompt).group(1)  # type: ignore[union-attr]
    assert one.answer == f" {where[person]}"
    thing = re.fullmatch(r"The (\w+) is now in the", two.prompt).group(1)  # type: ignore[union-attr]
    assert two.answer == f" {history[thing][-1]}"
    now, same = re.fullmatch(r"Before the (\w+) the (\w+) was in the", three.prompt).groups()  # type: ignore[union-attr]
    assert (now, same) == (history[thing][-1], thing)
    assert three.answer == f" {history[thing][-2]}" and f" {now}" not in three.candidates


def test_answers_say_nothing_by_their_place_and_by_their_text() -> None:
    tasks = [story(generator("place", n)) for n in range(600)]
    for form in range(3):
        questions = [task.questions[form] for task in tasks]
        places = Counter(question.candidates.index(question.answer) for question in questions)
        assert max(places.values()) < 1.35 * len(tasks) / CANDIDATES
        answers = Counter(question.answer for question in questions)
        assert set(answers) == {f" {place}" for place in PLACES} and max(answers.values()) < 1.5 * len(tasks) / 6


@many
@given(
    seeds,
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5)), max_size=8),
    st.integers(0, 200),
)
def test_a_haystack_is_exactly_as_long_as_asked(
    start: int, lengths: list[int], stored: list[tuple[float, int]], room: int
) -> None:
    ends = np.cumsum([0, *lengths])
    pieces = [np.arange(a, b) for a, b in pairwise(ends)]
    facts = [
        (depth, np.full(size, -1 - index))
        for index, (depth, size) in enumerate(sorted(stored, key=lambda fact: fact[0]))
    ]
    length = room + sum(len(ids) for _, ids in facts)
    ids = haystack(pieces, length, facts, start)
    assert len(ids) == length and ids.dtype == np.int64
    background = ids[ids >= 0]
    # Text goes on from piece to piece, and from the last to the first.
    assert len(background) == room and (np.diff(background) % ends[-1] == 1 % ends[-1]).all()
    for index, (depth, fact) in enumerate(facts):
        places = np.flatnonzero(ids == -1 - index)
        assert len(places) == len(fact) and np.array_equal(places, np.arange(places[0], places[0] + len(fact)))
        before = (ids[: places[0]] >= 0).sum()
        assert abs(before - depth * room) <= max(lengths), "as near to its depth as the pieces allow"
        # Between two pieces.
        assert before in (0, room) or background[before] in ends
    order = [-int(n) for n in dict.fromkeys(ids[ids < 0].tolist())]
    assert order == sorted(order), "sentences keep their order"


def test_texts_that_are_too_short_are_refused() -> None:
    with pytest.raises(UserError, match="--lengths 5: the sentences of the tasks take 6 tokens: give 6 or more"):
        haystack([np.arange(9)], 5, [(0.5, np.arange(6))], 0)
    with pytest.raises(UserError, match="held-out text is empty"):
        haystack([], 5, [], 0)


def test_tasks_in_one_text_keep_their_own_order() -> None:
    tasks = [needles(generator(1), WORDS, (0, 0.5, 1)), variables(generator(2)), story(generator(3))]
    both = together(tasks)
    check(both)
    assert len(both.questions) == 3 + 1 + 3
    for task in tasks:
        kept = [sentence for _, sentence in both.facts if sentence in {s for _, s in task.facts}]
        assert kept == [sentence for _, sentence in task.facts]


def test_a_task_is_a_function_of_its_seed() -> None:
    assert story(generator(5)) == story(generator(5)) != story(generator(6))
    assert common_words(generator(5), WORDS) == common_words(generator(5), WORDS)
