"""A resume over a corpus that has changed: when it goes on by itself, when it asks, and what it then does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.loader import PackedLoader
from pipeline.data.resume import different_rank
from pipeline.data.sources.huggingface import HuggingFaceStream
from pipeline.data.tokenizer import ByteTokenizer
from pipeline.errors import UserError
from tests.data.conftest import local_files
from tests.data.test_loader import SPLITS, merged, step


def write(path: Path, texts: dict[int, str], count: int = 80) -> Path:
    lines = (texts.get(row, json.dumps({"text": f"row {row:02} " + "x" * (row % 9)})) for row in range(count))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def ranks(split: tuple[int, int, int], source: Any, **options: Any) -> list[PackedLoader]:
    degree, accum, size = split
    plain = {"sequence_length": 16, "vocab_size": 257, "holdout": 0.1, "seed": 5}
    shape = {"data_degree": degree, "grad_accum": accum, "batch_size": size}
    return [
        PackedLoader(source, ByteTokenizer(), data_rank=rank, **shape, **(plain | options)) for rank in range(degree)
    ]


def local(path: Path) -> Any:
    return local_files([str(path)])


def stream(path: Path) -> Any:
    return HuggingFaceStream("json", data_files=[str(path)], shuffle_buffer=7)


def run_until_it_stops(loaders: list[PackedLoader]) -> tuple[dict[str, Any], str]:
    """The state before the step that failed, and the message."""
    while True:
        state = merged(loaders)
        try:
            step(loaders)
        except UserError as error:
            return state, str(error)


@pytest.mark.parametrize("read", [local, stream])
def test_a_line_that_is_corrected_where_it_stands_is_gone_on_with(
    tmp_path: Path, read: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """As the message says: and from then on the run is the one that never met the bad line."""
    path = write(tmp_path / "rows.jsonl", {})
    expected = ranks((1, 1, 2), read(path))
    steps = [step(expected) for _ in range(120)]
    write(path, {52: '{"text": "row 52'})
    state, message = run_until_it_stops(ranks((1, 1, 2), read(path)))
    assert f"{path}:53 is not JSON" in message and "correct the record where it stands" in message
    write(path, {})
    resumed = ranks((2, 1, 1), read(path))
    for loader in resumed:
        loader.load_state_dict(state)
    (said,) = [record.getMessage() for record in caplog.records]  # of one rank
    assert said == (
        f"the data ({resumed[0].source.name}) has changed, in no record that was read: the run goes on."
        " What is held out may have changed, and evaluations with it"
    )
    first = step(resumed)
    done = next(number for number in range(120) if torch.equal(steps[number], first))
    assert all(torch.equal(expected, step(resumed)) for expected in steps[done + 1 :])
    caplog.clear()
    again = ranks((1, 1, 2), read(path))
    again[0].load_state_dict(merged(resumed))
    assert not caplog.records, "the next checkpoint is one of the corpus as it is now"


def test_a_line_that_is_taken_out_needs_to_be_accepted(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = write(tmp_path / "rows.jsonl", {52: "{"})
    state, _ = run_until_it_stops(ranks((1, 1, 2), local(path)))
    path.write_text(path.read_text().replace("\n{\n", "\n"))
    message = refusal(ranks((1, 1, 2), local(path))[0].load_state_dict, state)
    assert "(documents 80, now 79, bytes" in message and "its records have other numbers now" in message
    assert "restore it, go on all the same with --data.on-change accept, or start a new run with --init-from" in message
    ranks((1, 1, 2), local(path), accept_change=True)[0].load_state_dict(state)


def test_skipping_can_begin_at_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "rows.jsonl", {52: "{"})
    state, _ = run_until_it_stops(ranks((1, 1, 2), local(path)))
    skipping = ranks((1, 1, 2), local_files([str(path)], skip=True), skip_bad_records=True)
    skipping[0].load_state_dict(state)
    step(skipping)
    assert f"{path}:53" in caplog.text and "passed over (1 so far)" in caplog.text


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 12), st.sampled_from(SPLITS), st.sampled_from(SPLITS), st.integers(0, 79))
def test_a_change_is_told_exactly_when_the_record_was_read(tmp_path, before, first, second, row) -> None:
    path = write(tmp_path / "rows.jsonl", {})
    saving = ranks(first, local(path))
    rows: dict[int, bytes] = {}
    for _ in range(before):
        for index, tokens in enumerate(step(saving)[0]):
            rows[index] = rows.get(index, b"") + bytes(int(token) % 256 for token in tokens)
    state, seen = merged(saving), b"|".join(rows.values())
    write(path, {row: json.dumps({"text": "another"})})
    loading = ranks(second, local(path))
    try:
        for loader in loading:
            loader.load_state_dict(state)
        noticed = False
    except UserError:
        noticed = True
    # A token of the document is enough; its first three letters are those of every row.
    whole = b"row %02d " % row in seen
    assert noticed or not whole
    if noticed:
        cut = any(text.endswith((b"row %02d" % row)[:length]) for text in rows.values() for length in range(1, 7))
        assert whole or cut


def test_a_document_that_was_left_out_counts_as_read(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = write(tmp_path / "rows.jsonl", {})
    options = {"min_tokens": 9, "shuffle": False}
    (saving,) = ranks((1, 1, 1), local(path), **options)
    for _ in range(10):
        step([saving])
    state = merged([saving])
    write(path, {1: json.dumps({"text": "short"})})
    refusal(ranks((1, 1, 1), local(path), **options)[0].load_state_dict, state)


# --- accepted


@pytest.mark.parametrize("read", [local, stream])
def test_an_accepted_change_gives_up_the_document_that_is_another_now(
    tmp_path: Path, read: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", {row: json.dumps({"text": f"<{row:02}>" + "y" * 40}) for row in range(80)})
    saving = ranks((1, 1, 2), read(path), shuffle=False)
    for _ in range(5):
        step(saving)
    state = merged(saving)
    cursors = state["streams"]
    assert all(cursor["offset"] > 0 and cursor["document"] for cursor in cursors.values())
    # One of the two documents that are being read stays, the other becomes another; one more is added.
    standing = {key: saving[0]._documents.read(0, cursor["position"]).text for key, cursor in cursors.items()}
    text = path.read_text().replace(standing["1"], standing["1"].replace("y", "z"))
    path.write_text(text + json.dumps({"text": "one more"}) + "\n")
    resumed = ranks((1, 1, 2), read(path), shuffle=False, accept_change=True)
    resumed[0].load_state_dict(state)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "--data.on-change accept goes on with it" in said and "read twice or not at all" in said
    found = merged(resumed)["streams"]
    assert {key: cursor["position"] for key, cursor in found.items()} == {
        key: cursor["position"] for key, cursor in cursors.items()
    }
    assert {**found["0"], "reader": None} == {**cursors["0"], "read": None, "reader": None}
    assert (found["1"]["offset"], found["1"]["segment"]) == (0, cursors["1"]["segment"] + 1)
    batch = step(resumed)
    assert int(batch[3][1][0]) == 0 and int(batch[2][1][0]) == cursors["1"]["segment"] + 1
    # What was read before cannot be accounted for any more: the next change is not gone on with by itself.
    state = merged(resumed)
    path.write_text(path.read_text().replace("one more", "one less"))
    with pytest.raises(UserError, match=r"--data\.on-change accept"):
        ranks((1, 1, 2), read(path), shuffle=False)[0].load_state_dict(state)


def test_a_corpus_that_shrank_below_the_place_begins_its_next_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {})
    saving = ranks((1, 1, 2), local(path))
    while merged(saving)["streams"]["0"]["position"] < 60:
        step(saving)
    state = merged(saving)
    write(path, {}, count=20)
    resumed = ranks((1, 1, 2), local(path), accept_change=True)
    resumed[0].load_state_dict(state)
    for _ in range(3):
        step(resumed)
    assert all(cursor["epoch"] >= 1 for cursor in merged(resumed)["streams"].values())


def test_what_else_decides_the_data_is_not_accepted(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = write(tmp_path / "rows.jsonl", {})
    state = merged(ranks((1, 1, 2), local(path)))
    other = {"seed": 6, "shuffle": False, "holdout": 0.3, "min_tokens": 3}
    for name, value in other.items():
        message = refusal(ranks((1, 1, 2), local(path), accept_change=True, **{name: value})[0].load_state_dict, state)
        assert message.startswith(f"--{'' if name == 'seed' else 'data.'}{name.replace('_', '-')} does not give")


# --- checkpoints of before


OLD = ("skipped", "undecodable", "read", "document")


def as_before(state: dict[str, Any]) -> dict[str, Any]:
    """The state as it was saved before records were accounted for."""
    source = {key: value for key, value in state["fingerprint"]["source"].items() if key != "layout"}
    streams = {
        stream: {key: value for key, value in cursor.items() if key not in OLD}
        for stream, cursor in state["streams"].items()
    }
    return {"streams": streams, "fingerprint": {**state["fingerprint"], "source": source}}


@pytest.mark.parametrize("read", [local, stream])
def test_an_older_checkpoint_resumes_on_the_same_data_and_on_no_other(
    tmp_path: Path, read: Callable[[Path], Any], refusal: Callable[..., str]
) -> None:
    path = write(tmp_path / "rows.jsonl", {})
    saving = ranks((1, 1, 2), read(path))
    for _ in range(7):
        step(saving)
    state = as_before(merged(saving))
    resumed = ranks((1, 1, 2), read(path))
    resumed[0].load_state_dict(state)
    assert all(torch.equal(step(saving), step(resumed)) for _ in range(9))
    write(path, {70: json.dumps({"text": "another"})})
    assert "--data.on-change accept" in refusal(ranks((1, 1, 2), read(path))[0].load_state_dict, state)
    accepting = ranks((1, 1, 2), read(path), accept_change=True)
    accepting[0].load_state_dict(state)
    step(accepting)


def test_an_older_checkpoint_in_another_order_of_groups_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    """How many parquet groups are read together was decided by the text column, and is by all columns."""
    monkeypatch.setattr("pipeline.data.sources.local.GROUP_CACHE", 4000)
    for wide, refused in ((1, False), (200, True)):
        path = tmp_path / f"{wide}.parquet"
        columns = {"text": [f"row {row:02}" for row in range(80)], "other": [f"{row}" * wide for row in range(80)]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=10, use_dictionary=False)
        state = merged(ranks((1, 1, 2), local(path)))
        ranks((1, 1, 2), local(path))[0].load_state_dict(state)
        resumed = ranks((1, 1, 2), local(path))[0]
        if refused:
            assert "its records have other numbers now" in refusal(resumed.load_state_dict, as_before(state))
        else:
            resumed.load_state_dict(as_before(state))


def test_ranks_that_find_other_data_are_named() -> None:
    same = {"streams": 2, "source": {"files": 3, "digest": "a"}, "tokenizer": "bytes/1"}
    assert different_rank([same, same]) is None
    other = {**same, "source": {"files": 2, "digest": "b"}}
    assert different_rank([same, same, other]) == (
        "--data.path or --data.dataset: rank 2 does not find what rank 0 does (files 3, now 2): the data must be the"
        " same on every node"
    )
