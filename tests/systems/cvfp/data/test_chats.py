"""Conversations of a data set of Hugging Face, by the library's local streaming."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pipeline.errors import UserError
from pipeline.systems.cvfp.data import build
from pipeline.systems.cvfp.data.build import list_documents
from pipeline.systems.cvfp.data.chats import Conversations
from tests.systems.cvfp.data.harness import run, texts_of

TALKS = [[f"question {index}", f"answer {index}", "thanks"][: 2 + index % 2] for index in range(30)]


def rows() -> list[dict[str, Any]]:
    roles = ("user", "assistant", "user")
    return [
        {
            "prompt": talk[0],
            "messages": [{"content": said, "role": role} for said, role in zip(talk, roles, strict=False)],
        }
        for talk in TALKS
    ]


def write(folder: Path, kind: str, content: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), folder / "train.parquet", row_group_size=7)
    else:
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_contents_are_joined_by_newlines_in_the_order_of_the_data(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path / "ultrachat", kind, rows())
    config = run(tmp_path, path=(), dataset=str(folder), text_field="messages", length=40, model={"num_samples": 20})
    found = list_documents(config)
    assert found.name == "ultrachat_20samples_40len"
    whole = ["\n".join(talk)[:40] for talk in TALKS]
    # The first ones are trained on, and as many of the next ones held out as make a share of 0.3.
    assert texts_of(found, held_out=False) == whole[:20] and texts_of(found, held_out=True) == whole[20:29]


def test_a_row_that_is_no_conversation(tmp_path: Path) -> None:
    content = rows()
    content[2]["messages"][1]["content"] = None
    folder = write(tmp_path / "chats", "parquet", content)
    options: dict[str, Any] = {"path": (), "dataset": str(folder), "text_field": "messages", "length": 40}
    with pytest.raises(UserError, match=r"row 3.*'messages' is no list of messages with a `content` each"):
        list_documents(run(tmp_path, **options))
    found = list_documents(run(tmp_path, **options, on_bad_record="skip"))
    assert len(found.ends) == 29 and "1 records passed over" in found.notes


def test_a_structure_of_lists() -> None:
    """As the library makes it of a Sequence of structures."""
    source = Conversations.__new__(Conversations)
    source.name, source.text_field = "chats", "messages"
    assert source.document({"messages": {"content": ["a", "b"], "role": ["user", "assistant"]}}, 1).text == "a\nb"
    wrongs: list[Any] = [None, "text", ["text"], [{"role": "user"}], {"role": []}]
    for wrong in wrongs:
        assert source.document({"messages": wrong}, 1).problem is not None


def test_what_cannot_be_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "chats", "parquet", [{"text": "a"}])
    options: dict[str, Any] = {"path": (), "dataset": str(folder), "text_field": "messages"}
    with pytest.raises(UserError, match=r"has no column 'messages' \(it has 'text'\)"):
        list_documents(run(tmp_path, **options))
    with pytest.raises(UserError, match=r"split 'test'.*cannot be read"):
        list_documents(run(tmp_path, **options, split="test"))


def test_without_a_network_the_cache_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a data set of the hub, whose folder here is away."""
    folder = write(tmp_path / "chats", "jsonl", rows())
    builder = datasets.load_dataset_builder

    def offline(path: str, *args: Any, **options: Any) -> Any:
        if path == "someone/chats":
            raise ConnectionError("Couldn't reach the Hub")
        return builder(path, *args, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    config = run(tmp_path, path=(), dataset="someone/chats", text_field="messages", length=40)
    with pytest.raises(UserError, match=r"--data.dataset someone/chats .* cannot be read"):
        list_documents(config)
    with monkeypatch.context() as online:
        online.setattr(build, "_source", lambda _: Conversations(str(folder), text_field="messages"))
        found = list_documents(config)
    with caplog.at_level(logging.WARNING):
        again = list_documents(config)
    assert again.fingerprint == found.fingerprint and "of an earlier run, are read" in caplog.records[-1].getMessage()


def test_without_a_network_a_cache_of_another_validation_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    folder, validation = write(tmp_path / "chats", "jsonl", rows()), tmp_path / "val.txt"
    validation.write_text("what is read for validation")
    options: dict[str, Any] = {"path": (), "dataset": "someone/chats", "text_field": "messages", "length": 40}
    config = run(tmp_path, validation=(str(validation),), **options)
    with monkeypatch.context() as online:
        online.setattr(build, "_source", lambda _: Conversations(str(folder), text_field="messages"))
        found = list_documents(config)
    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    assert list_documents(config).fingerprint == found.fingerprint
    validation.write_text("what has been put in its place")
    with pytest.raises(UserError, match=r"--evaluation\.path has changed since .*: restore the file, or") as caught:
        list_documents(config)
    assert "\n" not in str(caught.value)
