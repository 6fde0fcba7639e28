"""Listing documents: from files and from the cache, validation documents, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.data import build
from pipeline.systems.cvfp.data.build import build_loader, list_documents
from pipeline.systems.cvfp.documents import DocumentSet
from tests.systems.cvfp.data.harness import json_lines, run, texts_of

TEXTS = [f"{index:02} words of text" for index in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return json_lines(tmp_path / "corpus.jsonl", TEXTS)


def same(one: DocumentSet, other: DocumentSet) -> bool:
    facts = ("training", "vocab", "name", "fingerprint", "tokenizer", "notes")
    equal = all(getattr(one, name) == getattr(other, name) for name in facts)
    return equal and np.array_equal(one.tokens, other.tokens) and np.array_equal(one.ends, other.ends)


def only_cached(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> DocumentSet:
    """What is listed where nothing may be tokenised."""
    with monkeypatch.context() as patched:
        patched.setattr(build, "_tokenised", lambda *_: pytest.fail("tokenised again"))
        return list_documents(config)


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def test_documents_are_divided_cut_and_named(tmp_path: Path, corpus: Path) -> None:
    found = list_documents(run(tmp_path, corpus))
    training, held_out = (texts_of(found, held_out=side) for side in (False, True))
    assert sorted(training + held_out) == [text[:8] for text in TEXTS]
    assert training == sorted(training) and held_out == sorted(held_out) and 4 <= len(held_out) <= 20
    assert (found.name, found.vocab) == ("corpus.jsonl_allsamples_8len", 260)
    assert found.notes == ("40 documents cut to their first 8 tokens",)


@pytest.mark.parametrize(("wanted", "holdout", "held"), [(10, 0.3, 4), (20, 0.5, 20), (1, 0.01, 1)])
def test_a_number_of_documents_is_that_of_training(
    tmp_path: Path, corpus: Path, wanted: int, holdout: float, held: int
) -> None:
    found = list_documents(run(tmp_path, corpus, model={"num_samples": wanted}, holdout=holdout))
    training, held_out = (texts_of(found, held_out=side) for side in (False, True))
    assert (len(training), len(held_out)) == (wanted, held)
    every = training + held_out
    assert len(set(every)) == len(every) and set(every) <= {text[:8] for text in TEXTS}
    # Of files not the first by name, and the same ones whatever the seed.
    assert every[:5] != [text[:8] for text in TEXTS[:5]]
    config = run(tmp_path / "other", corpus, model={"num_samples": wanted}, holdout=holdout)
    assert same(list_documents(dataclasses.replace(config, seed=5)), found)


def test_of_too_few_documents_there_are_pieces_on_both_sides(tmp_path: Path) -> None:
    texts = json_lines(tmp_path / "long.jsonl", [f"{index:02} text {index:02} end" for index in range(40)])
    found = list_documents(run(tmp_path, texts, model={"num_samples": 50}, holdout=0.3))
    # 50 and 21 are wanted: each of 40 documents gives one row or two.
    assert len(found.ends) == 71 and 40 < found.training < 62
    sides = [{text.split()[0] for text in texts_of(found, held_out=side)} for side in (False, True)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40


def test_held_out_rows_that_are_trained_on_are_left_out(tmp_path: Path) -> None:
    texts = ["the same text", "another text!", "and a third one"] * 4
    found = list_documents(run(tmp_path, json_lines(tmp_path / "a.jsonl", texts), model={"num_samples": 2}, length=13))
    assert found.training == 2 and not set(texts_of(found, held_out=True)) & set(texts_of(found, held_out=False))
    equal = json_lines(tmp_path / "b.jsonl", ["the same text"] * 4)
    with pytest.raises(UserError, match="no row is left to hold out that is not trained on too"):
        list_documents(run(tmp_path, equal, model={"num_samples": 2}))


def test_files_have_a_text_where_a_data_set_has_messages(tmp_path: Path, corpus: Path) -> None:
    """As the recipes of UltraChat are given files in its place."""
    found = list_documents(run(tmp_path, corpus, text_field="messages"))
    assert found.fingerprint == list_documents(run(tmp_path, corpus)).fingerprint
    body = json_lines(tmp_path / "body.jsonl", TEXTS, "body")
    assert len(list_documents(run(tmp_path, body, text_field="body")).ends) == 40


def test_the_cache_is_read_and_knows_its_settings(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list_documents(run(tmp_path, corpus))
    assert same(only_cached(run(tmp_path, corpus), monkeypatch), found)
    others: tuple[dict[str, Any], ...] = (
        {"length": 9}, {"holdout": 0.4}, {"model": {"num_samples": 12}}, {"min_tokens": 3},
    )  # fmt: skip
    for count, changed in enumerate(others, start=2):
        # Of these texts none is shorter than three tokens.
        assert same(list_documents(run(tmp_path, corpus, **changed)), found) == ("min_tokens" in changed)
        assert len(cache_files(tmp_path)) == count
        assert same(only_cached(run(tmp_path, corpus), monkeypatch), found)


def test_a_cache_of_changed_data_is_renewed(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = list_documents(run(tmp_path, corpus))
    json_lines(corpus, [text.replace("words", "other") for text in TEXTS])
    with caplog.at_level(logging.WARNING):
        after = list_documents(run(tmp_path, corpus))
    (record,) = caplog.records
    assert "the data has changed since" in record.getMessage() and "\n" not in record.getMessage()
    assert after.fingerprint != before.fingerprint and texts_of(after, held_out=False)[0].endswith("other"[:5])
    assert len(cache_files(tmp_path)) == 1 and same(only_cached(run(tmp_path, corpus), monkeypatch), after)


@pytest.mark.parametrize("damage", ["cut", "changed", "text"])
def test_a_damaged_cache_is_renewed(
    tmp_path: Path, corpus: Path, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = list_documents(run(tmp_path, corpus))
    (file,) = cache_files(tmp_path)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes({"cut": bytes(content[:-20]), "changed": bytes(content), "text": b"no tensors"}[damage])
    with caplog.at_level(logging.WARNING):
        assert same(list_documents(run(tmp_path, corpus)), before)
    (record,) = caplog.records
    assert str(file) in record.getMessage() and "\n" not in record.getMessage()
    assert same(only_cached(run(tmp_path, corpus), monkeypatch), before)


def test_a_cache_under_the_name_of_another_is_refused(tmp_path: Path, corpus: Path) -> None:
    list_documents(run(tmp_path, corpus))
    (first,) = cache_files(tmp_path)
    list_documents(run(tmp_path, corpus, length=9))
    (other,) = set(cache_files(tmp_path)) - {first}
    first.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"documents of other data than its name says \(length\): remove it") as caught:
        list_documents(run(tmp_path, corpus))
    assert "\n" not in str(caught.value)


def test_the_cache_folder_may_be_a_link(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive, link = tmp_path / "drive", tmp_path / "linked"
    link.symlink_to(drive)
    config = run(tmp_path, corpus, model={"data_cache": str(link)})
    with pytest.raises(UserError, match=f"a link to {drive}, which is not there: create it"):
        list_documents(config)
    drive.mkdir()
    found = list_documents(config)
    assert len(list(drive.iterdir())) == 1 and same(only_cached(config, monkeypatch), found)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=f"--model.data-cache {file}: cannot be written"):
        list_documents(run(tmp_path, corpus, model={"data_cache": str(file)}))


def test_validation_documents_of_their_own(tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of one text is read in pieces; what it has in common with the training documents is not trained on."""
    (tmp_path / "val.txt").write_text("validation text!" + TEXTS[3][:8] + "x")
    config = run(tmp_path, corpus, validation=(f"books={tmp_path / 'val.txt'}",))
    found = list_documents(config)
    assert texts_of(found, held_out=True) == ["validati", "on text!", TEXTS[3][:8]]
    assert texts_of(found, held_out=False) == [text[:8] for text in TEXTS if text != TEXTS[3]]
    assert "1 rows left out, as the same tokens are held out" in found.notes
    (tmp_path / "val.txt").write_text("another text")
    with caplog.at_level(logging.WARNING):
        changed = list_documents(config)
    assert texts_of(changed, held_out=True) == ["another ", "text"] and "has changed" in caplog.text
    several = json_lines(tmp_path / "several.jsonl", ["of several", "the starts"])
    plain = list_documents(run(tmp_path, corpus, validation=(str(several),)))
    assert texts_of(plain, held_out=True) == ["of sever", "the star"]


def test_a_single_text_is_divided_at_its_end(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(f"{index:07} " for index in range(20)))
    found = list_documents(run(tmp_path, book))
    assert texts_of(found, held_out=True) == [f"{index:07} " for index in range(14, 20)]
    assert found.training == 14


def refusals(tmp_path: Path, corpus: Path) -> list[tuple[RunConfig, str]]:
    """Runs that are refused, and what their line says."""
    missing, blank = tmp_path / "missing.txt", tmp_path / "blank.txt"
    blank.write_text("\n")
    short, few = json_lines(tmp_path / "short.jsonl", ["abc", "d"]), json_lines(tmp_path / "few.jsonl", ["abc", ""])
    equal = json_lines(tmp_path / "equal.jsonl", ["the same text", "the same texts"])
    body = json_lines(tmp_path / "body.jsonl", TEXTS, "body")
    return [
        (run(tmp_path, corpus, validation=(str(missing),)), "missing.txt"),
        (run(tmp_path, corpus, validation=(f"val={missing}",)), "missing.txt"),
        (run(tmp_path, corpus, validation=(str(blank),)), "--evaluation.path holds no document of 2 tokens"),
        (run(tmp_path, missing), "missing.txt"),
        (run(tmp_path, corpus, length=1), "--sequence-length 1: a row needs 2 tokens"),
        (run(tmp_path, short), r"short.jsonl \(byte 16\) has 1 token.*--data.min-tokens 2"),
        (run(tmp_path, few), "1 rows of two tokens or more"),
        (run(tmp_path, equal), "--data.holdout 0.3 leaves no document to train on"),
        (run(tmp_path, corpus, validation=(str(corpus),)), "no row is left to train on"),
        (run(tmp_path, path=(), mix=("stdlib=1",)), "--data.mix"),
        (run(tmp_path, path=(), tokens=("x.npy",)), "--data.tokens"),
        (run(tmp_path, corpus, tokenizer=str(missing)), "--data.tokenizer"),
        (run(tmp_path, corpus, text_field="body"), "no field 'body'"),
        (run(tmp_path, corpus, text_field="messages", validation=(str(body),)), "no field 'text'"),
    ]


def test_what_is_refused_is_one_line_and_leaves_nothing(tmp_path: Path, corpus: Path) -> None:
    for config, line in refusals(tmp_path, corpus):
        with pytest.raises(UserError, match=line) as caught:
            list_documents(config)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_the_loader_of_each_side(tmp_path: Path, corpus: Path) -> None:
    config = run(tmp_path, corpus, shuffle=False)
    found = list_documents(config)
    for held_out in (False, True):
        loader = build_loader(config, Topology(), found, held_out=held_out)
        read = [
            bytes(ids[:length].tolist()).decode()
            for _ in range(loader.slots)
            for batch in loader.next_step()
            for ids, length in zip(batch.ids, batch.lengths.tolist(), strict=True)
            if length
        ]
        assert read == texts_of(found, held_out=held_out)
    stream = build_loader(run(tmp_path, corpus, model={"carry": "stream"}), Topology(), found)
    assert stream.stream and not build_loader(config, Topology(), found).stream
