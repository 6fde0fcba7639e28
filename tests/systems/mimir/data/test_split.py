"""What is held out, against comparing each peptide with each."""

from __future__ import annotations

from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from pipeline.systems.mimir.data.process import Process, ProcessSettings
from pipeline.systems.mimir.data.split import HELD_OUT, HELD_OUT_TARGET, LEFT_OUT, TRAINING, Split, split
from pipeline.systems.mimir.data.synthetic import synthetic_table
from pipeline.systems.mimir.peptides import INTERACTING, NO_TARGET

Rows = list[tuple[int, str, str]]


def rows_of(count: int, **settings: int) -> Rows:
    table = synthetic_table(Process(ProcessSettings(**settings)), count)
    columns = (table.labels.to_pylist(), table.targets.to_pylist(), table.sequences.to_pylist())
    return [(int(label), target, text) for label, target, text in zip(*columns, strict=True)]


def divide(rows: Rows, holdout: float) -> Split:
    names = list(dict.fromkeys(target for _, target, _ in rows))
    targets = np.array([names.index(target) if target else NO_TARGET for _, target, _ in rows])
    labels = np.array([label for label, _, _ in rows])
    return split(pa.array([text for _, _, text in rows]), labels, targets, names, holdout)


def chosen(rows: Rows, parts: np.ndarray, *kinds: int, label: int | None = None) -> Rows:
    return [row for row, part in zip(rows, parts, strict=True) if part in kinds and label in (None, row[0])]


def near_background(rows: Rows, parts: np.ndarray, *kinds: int) -> set[tuple[int, str, str]]:
    """Background that is too near to background that is held out, compared with each."""
    held_out = [row[2] for row in chosen(rows, parts, HELD_OUT, label=0)]
    some = chosen(rows, parts, *kinds, label=0)
    edits = process.cdist([row[2] for row in some], held_out, scorer=Levenshtein.distance)
    shorter = np.minimum.outer([len(row[2]) for row in some], [len(text) for text in held_out])
    apart = np.where(shorter >= 8, 2, np.where(shorter >= 6, 1, 0))
    return {row for row, near in zip(some, (edits <= apart).any(1).tolist(), strict=True) if near}


@pytest.fixture(scope="module")
def rows() -> Rows:
    """With short peptides, of which many are near each other, copies, an overlap, and background that overlaps with
    other background, as fragments of one protein do."""
    found = rows_of(3000, targets=12, min_length=5, max_length=12)
    interacting = next(row for row in found if row[0] == 1)
    background = [text for label, _, text in found if label == 0]
    cut = [(f"{text[1:]}W", text[:-1]) for text in background[:400]]
    fragments = [(0, "", text) for both in cut for text in both]
    known = {text for _, _, text in found}
    fragments = [row for row in dict.fromkeys(fragments) if row[2] not in known]
    return [*found, *fragments, interacting, (0, "", interacting[2]), (0, "", background[0])]


def test_training_is_apart_from_what_is_held_out(rows: Rows) -> None:
    parts = divide(rows, 0.1).parts
    training = chosen(rows, parts, TRAINING)
    held_out = chosen(rows, parts, HELD_OUT, HELD_OUT_TARGET, label=1)
    edits = process.cdist([row[2] for row in held_out], [row[2] for row in training], scorer=Levenshtein.distance)
    assert edits.min() == 3
    background = {row[2] for row in chosen(rows, parts, HELD_OUT, label=0)}
    assert background and not background & {row[2] for row in training}
    assert not near_background(rows, parts, TRAINING)
    known = {row[1] for row in training}
    unseen = {row[1] for row in chosen(rows, parts, HELD_OUT_TARGET)}
    assert len(unseen) == 1 and not unseen & known
    assert {row[1] for row in chosen(rows, parts, HELD_OUT)} <= known | {""}


def test_what_is_left_out_is_left_out_for_a_reason_that_is_counted(rows: Rows) -> None:
    found = divide(rows, 0.1)
    left_out = chosen(rows, found.parts, LEFT_OUT)
    assert sum(found.left_out.values()) == len(left_out)
    assert found.left_out["copies"] == 2
    assert found.left_out["background that interacts as well"] == 1
    held_out = [row[2] for row in chosen(rows, found.parts, HELD_OUT, HELD_OUT_TARGET, label=1)]
    edits = process.cdist([row[2] for row in left_out], held_out, scorer=Levenshtein.distance).min(1)
    near = {row for row, distance in zip(left_out, edits.tolist(), strict=True) if distance <= 2}
    background = near_background(rows, found.parts, LEFT_OUT)
    assert near and background - near
    assert len(set(left_out) - near - background) <= 3
    counts = {why: count for why, count in found.left_out.items() if "edits of background" in why}
    assert len(counts) == 2 and sum(counts.values()) == len(background - near)


def test_short_background_is_not_emptied() -> None:
    """Of the shortest lengths a set has most peptides that there are: all of them are near each other."""
    rows: Rows = [(0, "", "".join(letters)) for letters in product("ACDE", repeat=5)]
    parts = divide(rows, 0.1).parts
    assert set(parts.tolist()) == {TRAINING, HELD_OUT}
    assert 0.05 < (parts == HELD_OUT).mean() < 0.15


def test_the_share_is_that_which_is_asked_for() -> None:
    rows = rows_of(4000, targets=20)
    parts = divide(rows, 0.1).parts
    interacting = np.array([row[0] == INTERACTING for row in rows])
    background = np.isin(parts[~interacting], [HELD_OUT])
    clustered = parts[interacting & (parts != HELD_OUT_TARGET)] == HELD_OUT
    for found in (background, clustered):
        assert abs(found.mean() - 0.1) < 4 * np.sqrt(0.09 / len(found))
    assert len({row[1] for row in chosen(rows, parts, HELD_OUT_TARGET)}) == 2


def test_the_order_of_rows_changes_nothing(rows: Rows) -> None:
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    parts, again = divide(rows, 0.1), divide([rows[place] for place in order], 0.1)
    assert parts.left_out == again.left_out
    for kind in (TRAINING, HELD_OUT, HELD_OUT_TARGET):
        assert sorted(chosen(rows, parts.parts, kind)) == sorted(
            chosen([rows[place] for place in order], again.parts, kind)
        )


def test_without_a_share_nothing_is_held_out_but_copies_go(rows: Rows) -> None:
    found = divide(rows, 0.0)
    assert set(found.parts.tolist()) == {TRAINING, LEFT_OUT}
    assert (found.parts == LEFT_OUT).sum() == 3


def test_labels_alone_and_one_target_have_no_held_out_target() -> None:
    for target in ("", "P1"):
        rows = [(1, target, text) for _, _, text in rows_of(200, targets=4)]
        parts = divide(rows, 0.1).parts
        assert set(parts.tolist()) <= {TRAINING, HELD_OUT, LEFT_OUT}
        assert (parts == HELD_OUT).any()
