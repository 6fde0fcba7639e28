"""The loader of token files: OLMo's windows, a global order without a table, an exact position for every layout."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.batch import IGNORED
from pipeline.data.tokens.loader import WindowLoader
from tests.data.tokens.conftest import open_loader, write


def windows_of(files: list[str], length: int) -> list[tuple[int, ...]]:
    """OLMo's: non-overlapping, per file, the tail dropped."""
    found = []
    for file in files:
        ids = np.fromfile(file, "<u2").tolist()
        found += [tuple(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    return found


def rows(loaders: list[WindowLoader]) -> list[tuple[int, ...]]:
    """The windows of one step, in the order of its rows."""
    batches = [batch for loader in loaders for batch in loader.next_step()]
    assert torch.cat([batch.streams for batch in batches]).tolist() == list(range(loaders[0].rows))
    for batch in batches:
        assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
        assert (batch.labels[:, -1] == IGNORED).all()
        assert torch.equal(batch.positions, torch.arange(batch.input_ids.shape[1]).expand_as(batch.positions))
    return [tuple(row) for batch in batches for row in batch.input_ids.tolist()]


def ranks(files: list[str], degree: int, rows: int = 8, **options: object) -> list[WindowLoader]:
    size = options.pop("batch_size", rows // degree)
    assert isinstance(size, int)
    accum = rows // degree // size
    return [
        open_loader(files, rank=rank, ranks=degree, batch_size=size, grad_accum=accum, **options)
        for rank in range(degree)
    ]


def test_an_epoch_reads_every_window_of_training_once_and_the_rest_is_held_out(token_files: list[str]) -> None:
    every = windows_of(token_files, 16)
    assert len(every) == 62 + 5 + 25
    (training,) = ranks(token_files, 1, rows=1, holdout=0.1)
    held_out = open_loader(token_files, batch_size=1, held_out=True, holdout=0.1)
    count = len(training.sources[0])
    assert len(held_out.sources[0]) == 9 and count == 83
    first, second = ([rows([training])[0] for _ in range(count)] for _ in range(2))
    held = [rows([held_out])[0] for _ in range(9)]
    assert sorted(first) == sorted(second) and first != second
    assert sorted(first + held) == sorted(every)
    assert first != sorted(first, key=every.index)


def test_natural_order_is_that_of_the_files(token_files: list[str]) -> None:
    (loader,) = ranks(token_files, 1, rows=4, shuffle=False, held_out_tokens=(token_files[1],))
    read = list(itertools.chain.from_iterable(rows([loader]) for _ in range(23)))
    assert read == windows_of(token_files, 16)
    assert rows([loader]) == read[:4]


@pytest.mark.parametrize("prefetch", [True, False])
def test_every_layout_reads_the_same_and_a_resume_in_mid_epoch_goes_on(token_files: list[str], prefetch: bool) -> None:
    one = ranks(token_files, 1)
    expected = [rows(one) for _ in range(30)]
    assert len(set(map(tuple, expected))) == 30
    for before, after in itertools.product((1, 2, 4), (1, 2, 4)):
        saving = ranks(token_files, before, batch_size=2)
        assert [rows(saving) for _ in range(7)] == expected[:7]
        states = [json.loads(json.dumps(loader.state_dict())) for loader in saving]
        assert all(state == states[0] for state in states)
        assert states[0]["taken"] == [56] and sum(states[0]["windows_per_epoch"]) == 91
        assert len(json.dumps({**states[0], "fingerprint": None})) < 200, "a few integers"
        resumed = ranks(token_files, after, batch_size=1)
        for loader in resumed:
            loader.load_state_dict(states[0])
        assert [rows(resumed) for _ in range(10)] == expected[7:17]


def test_a_mask_keeps_documents_apart(tmp_path: Path) -> None:
    # Two windows of 8; 9 ends a document.
    file = write(tmp_path / "a.npy", [1, 2, 9, 3, 9, 9, 4, 5, 6, 9, 7, 8, 1, 2, 3, 9])
    loader = open_loader([file], sequence_length=8, batch_size=2, document_mask=True, eos_id=9, shuffle=False,
                         held_out_tokens=(file,))  # fmt: skip
    (batch,) = loader.next_step()
    assert batch.labels.tolist() == [
        [2, 9, IGNORED, 9, IGNORED, IGNORED, 5, IGNORED],
        [9, IGNORED, 8, 1, 2, 3, 9, IGNORED],
    ]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 1, 1, 1, 1, 1, 1]]
    (again,) = loader.next_step()
    assert again.segment_ids.min() > batch.segment_ids.max(), "no document goes on in the next window of a row"


def test_sources_have_their_ratios_at_any_length_and_their_own_epochs(token_files: list[str], tmp_path: Path) -> None:
    other = write(tmp_path / "other.npy", np.full(16 * 5, 257))
    named = [f"{token_files[0]}=0.7", f"{other}=0.3"]
    (loader,) = ranks(named, 1, rows=4, held_out_tokens=(other,))
    read = list(itertools.chain.from_iterable(rows([loader]) for _ in range(50)))
    for length in range(1, len(read)):
        assert abs(sum(row[0] == 257 for row in read[:length]) - length * 0.3) < 1
    assert loader.state_dict()["taken"] == [140, 60]
    assert loader.epochs == [140 / 62, 60 / 5]
    own = [row for row in read if row[0] != 257]
    assert sorted(own[:62]) == sorted(windows_of(token_files[:1], 16)) == sorted(own[62:124])
    assert loader.ratios == [Fraction(7, 10), Fraction(3, 10)]


def test_several_sources_are_read_in_one_order_on_every_layout(token_files: list[str], tmp_path: Path) -> None:
    """And after a resume in the middle of an epoch, of each of them."""
    other = write(tmp_path / "other.npy", np.random.default_rng(1).integers(0, 256, 16 * 13))
    named = [f"{token_files[0]}=0.62", f"{other}=0.25", f"{token_files[2]}=0.13"]
    one = ranks(named, 1)
    expected = [rows(one) for _ in range(30)]
    for before, after in itertools.product((1, 2, 4), (1, 2, 4)):
        saving = ranks(named, before, batch_size=2)
        assert [rows(saving) for _ in range(11)] == expected[:11]
        states = [json.loads(json.dumps(loader.state_dict())) for loader in saving]
        assert all(state == states[0] for state in states) and sum(states[0]["taken"]) == 88
        passed = [
            taken / count for taken, count in zip(states[0]["taken"], states[0]["windows_per_epoch"], strict=True)
        ]
        assert all(share % 1 for share in passed) and max(passed) > 1 > min(passed), "epochs of different lengths"
        resumed = ranks(named, after, batch_size=1)
        for loader in resumed:
            loader.load_state_dict(states[0])
        assert [rows(resumed) for _ in range(19)] == expected[11:]


def test_a_file_without_a_window_among_others_is_named(token_files: list[str], tmp_path: Path, refusal) -> None:
    short = write(tmp_path / "short.npy", [1] * 15)
    (loader,) = ranks([*token_files, short], 1)
    assert f"; 1 files shorter than a window left out, such as {short}" in loader.describe()
    assert "left out" not in ranks(token_files, 1)[0].describe()
    assert "short.npy has no window of --sequence-length 16" in refusal(
        ranks, [f"{token_files[0]}=0.5", f"{short}=0.5"], 1
    )
