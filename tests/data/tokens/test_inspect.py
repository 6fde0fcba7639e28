"""What is in a token file, what a step has read, and what is wrong with a file: `data inspect` and `data verify`."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.checkpoint.manifest import read_manifest, write_manifest
from pipeline.cli import main
from pipeline.data.tokens import documents, verify
from pipeline.data.tokens.documents import documents_from
from pipeline.data.tokens.files import Layout, LocalTokenFile
from pipeline.data.tokens.seen import windows_seen
from pipeline.data.tokens.sidecar import Sidecar, Span, read_sidecar, sidecar_path
from pipeline.data.tokens.urls import shown_url
from pipeline.data_config import DataConfig
from pipeline.recipes.olmo import olmo_tiny
from tests.checkpoint.token_runs import save_run, tokenised
from tests.data.tokens.conftest import config, open_loader, write
from tests.data.tokens.serving import Server
from tests.data.tokens.test_prepare import run, write_lines

TEXTS = [f"document {i} " + "word " * (i % 7) for i in range(40)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 5), st.data())
def test_documents_are_found_from_any_position(tmp_path_factory, lengths, block, data) -> None:
    ids = [i for number, length in enumerate(lengths) for i in [*[number + 1] * (length - 1), 0]]
    path = write(tmp_path_factory.mktemp("inspect") / "a.npy", ids)
    file = LocalTokenFile(Path(path), "a.npy", Layout("uint16"))
    half = len(lengths) // 2
    spans = tuple(
        Span(name, len(part), sum(part)) for name, part in (("x", lengths[:half]), ("y", lengths[half:])) if part
    )
    sidecar = Sidecar("uint16", len(ids), len(lengths), 100, 0, "", "", "", spans)
    position = data.draw(st.integers(0, len(ids) - 1))
    ends = np.cumsum(lengths)
    first = int(np.searchsorted(ends, position, side="right"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", block)
        found = list(documents_from(file, sidecar, 0, position))
    assert [(d.start, d.stop) for d in found] == [
        (int(end - length), int(end)) for end, length in list(zip(ends, lengths, strict=True))[first:]
    ]
    assert [(d.source, d.number) for d in found] == [
        ("x", i) if i < half else ("y", i - half) for i in range(first, len(lengths))
    ]


def test_a_position_beyond_the_end_is_refused(tmp_path: Path, refusal) -> None:
    file = LocalTokenFile(Path(write(tmp_path / "a.npy", [1, 0])), "a.npy", Layout("uint16"))
    assert "has no token 2: it has 2, from 0 on" in refusal(list, documents_from(file, None, 0, 2))
    assert [d.stop for d in documents_from(file, None, 9, 0)] == [2], "without an end, the file's"


def test_what_a_step_has_read(tmp_path: Path, refusal) -> None:
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    other = write_lines(tmp_path / "b.jsonl", TEXTS[::-1])
    names = []
    for path in (source, other):
        (file,) = run([path], tmp_path / path.stem)
        names.append(str(file.path))
    options = {"sequence_length": 24, "batch_size": 6, "seed": 5}
    tokens = [f"{names[0]}=0.6", f"{names[1]}=0.4"]
    loader = open_loader(tokens, **options)
    steps = [loader.next_step()[0] for _ in range(9)]
    state = json.loads(json.dumps(loader.state_dict()))
    # As if the checkpoint were of a run on two ranks, in its second phase.
    saved = config(tokens, **{**options, "batch_size": 3})
    for number in (1, 4, 9):
        seen = list(windows_seen(saved, state, rows=6, step=100 + number, saved_at=109, eos_id=None))
        assert [window.row for window in seen] == list(range(6))
        for window, row in zip(seen, steps[number - 1].input_ids.tolist(), strict=True):
            assert window.file.read(window.start, 24).tolist() == row
            texts = TEXTS if window.file.name == names[0] else TEXTS[::-1]
            for found in window.documents:
                ids = window.file.read(found.start, found.tokens)
                assert found.number is not None and found.source in ("a.jsonl", "b.jsonl")
                assert bytes(ids[:-1].tolist()).decode() == texts[found.number]
            assert window.documents[0].start <= window.start < window.documents[0].stop
            assert window.documents[-1].start < window.start + 24 <= window.documents[-1].stop
    assert "--step 100 is of an earlier phase" in refusal(
        list, windows_seen(saved, state, rows=6, step=100, saved_at=109, eos_id=None)
    )
    write(Path(names[0]), np.fromfile(names[0], "<u2")[::-1])
    assert "--data.tokens does not give the data of the checkpoint" in refusal(
        list, windows_seen(saved, state, rows=6, step=101, saved_at=109, eos_id=None)
    )


def verified(capsys, *words: str) -> tuple[int, dict[str, str], str]:
    """Exit code, the state of each check, and the line on standard error."""
    code = main(["data", "verify", *words])
    out, err = capsys.readouterr()
    return code, dict(line.split("  ")[1:3] for line in map(_squeezed, out.splitlines())), err


def _squeezed(line: str) -> str:
    while "   " in line:
        line = line.replace("   ", "  ")
    return line


ALL = ["header", "dtype", "size", "vocabulary", "documents", "hash"]


def test_verify_names_each_check_and_ends_with_2_when_one_fails(tmp_path: Path, capsys) -> None:
    (file,) = run([write_lines(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out")
    path = str(file.path)
    assert verified(capsys, path) == (0, dict.fromkeys(ALL, "ok"), "")
    ids = np.fromfile(path, "<u2")

    def failing(*words: str) -> list[str]:
        code, checks, error = verified(capsys, *(words or (path,)))
        failed = [name for name, state in checks.items() if state == "FAILED"]
        assert code == 2 and "check" in error and error.count("\n") == 1 and (not failed or failed[0] in error)
        return failed

    write(file.path, ids[:-1])
    assert failing() == ["size", "documents", "hash"]
    file.path.write_bytes(ids.astype("<u2").tobytes()[:-1])
    assert failing() == ["size", "documents", "hash"]
    changed = ids.copy()
    changed[3] = 300
    write(file.path, changed)
    assert failing() == ["vocabulary", "hash"]
    changed[3] = ids[3] ^ 1
    write(file.path, changed)
    assert failing() == ["hash"]
    write(file.path, ids, "uint32")
    assert "dtype" in failing()
    np.save(file.path, ids)
    assert failing() == ["header"]
    write(file.path, ids)
    assert failing(path, "--dtype", "uint32") == ["dtype"]
    sidecar_path(file.path).write_text("{}")
    assert failing() == ["sidecar"]


def test_verify_without_a_sidecar_says_what_it_cannot_check(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "a.npy", [5, 6, 256] * 100)
    unknown = dict.fromkeys(["vocabulary", "documents", "hash"], "not checked")
    assert verified(capsys, path) == (0, {**dict.fromkeys(ALL, "ok"), **unknown}, "")
    assert verified(capsys, path, "--tokenizer", "bytes")[1] == {**dict.fromkeys(ALL, "ok"), "hash": "not checked"}
    # OLMo's trap: another id ends documents.
    assert verified(capsys, write(tmp_path / "b.npy", np.full(10**6, 5)), "--eos-id", "0")[1]["documents"] == "FAILED"
    assert verified(capsys, path, "--vocab-size", "256")[1]["vocabulary"] == "FAILED"
    assert verified(capsys, write(tmp_path / "c.npy", []))[1] == {"header": "ok", "dtype": "ok", "size": "FAILED"}


def test_inspect_shows_documents_and_their_source(tmp_path: Path, capsys) -> None:
    (file,) = run([write_lines(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out")
    start = sum(len(text) + 1 for text in TEXTS[:7])
    assert main(["data", "inspect", str(file.path), "--at", str(start + 2), "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(", document 7 of a.jsonl") and lines[0].startswith(f"tokens {start} to ")
    assert lines[1] == repr(TEXTS[7]) and lines[3] == repr(TEXTS[8])[:200]
    sidecar = read_sidecar(file.path)
    assert sidecar is not None
    other = dataclasses.replace(sidecar, tokenizer_fingerprint="bytes/0")
    sidecar_path(file.path).write_text(json.dumps(other.to_json()))
    assert main(["data", "inspect", str(file.path)]) == 2
    assert "was made with another tokenizer than bytes is now" in capsys.readouterr().err
    sidecar_path(file.path).unlink()
    assert main(["data", "inspect", str(file.path)]) == 2
    assert "has no sidecar that names its tokenizer: give --tokenizer" in capsys.readouterr().err
    assert main(["data", "inspect", str(tmp_path)]) == 2
    assert "is a folder: name a file in it, or give the --step of a run" in capsys.readouterr().err


def inspected(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["data", "inspect", *words])
    out, err = capsys.readouterr()
    return code, out, err


def a_run(folder: Path, tokens: list[str], vocab_size: int = 640, **options: object) -> Path:
    config = dataclasses.replace(
        olmo_tiny(), batch_size=4, grad_accum=1, global_batch_size=None, sequence_length=24,
        data=DataConfig(tokens=tuple(tokens), **options),  # type: ignore[arg-type]
    )  # fmt: skip
    return save_run(folder, config, 3, vocab_size)


def test_a_step_is_shown_by_the_tokenizer_that_made_its_files(
    tmp_path: Path,
    capsys,
    server: Server,
    bpe_folder: Path,
) -> None:
    """Also of files behind a URL, whatever --data.tokenizer of the run is."""
    tokenised(server.folder / "a.npy", TEXTS, str(bpe_folder))
    url, cache = f"{server.url}/a.npy?part=3", str(tmp_path / "cache")
    run_folder = a_run(tmp_path / "run", [url], token_cache=cache, document_mask=True)
    code, out, err = inspected(capsys, str(run_folder), "--step", "2", "--count", "0")
    assert (code, err) == (0, "") and out.count("\nrow ") == 4 and f"row 0: {shown_url(url)} tokens " in out
    assert out.count("document ") > 3 and "word word" in out and "�" not in out, "text, not ids of bytes"
    (server.folder / "a.npy.json").unlink()
    code, out, err = inspected(capsys, str(run_folder), "--step", "2")
    assert code == 2 and err.count("\n") == 1
    assert "of 260 ids, and the model has 640: give --tokenizer" in err
    code, out, _ = inspected(capsys, str(run_folder), "--step", "2", "--tokenizer", str(bpe_folder))
    assert code == 0 and "document " in out


def test_a_converted_checkpoint_has_read_nothing_here(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "a.npy", np.arange(200) % 256)
    folder = a_run(tmp_path / "run", [path], 260)
    manifest = read_manifest(folder)
    assert manifest is not None
    files = {name: entry for name, entry in manifest.pop("files").items() if name != "loader.json"}
    (folder / "loader.json").unlink()
    write_manifest(folder, manifest, files)
    code, _, err = inspected(capsys, str(folder), "--step", "1")
    assert code == 2 and "run was converted from another trainer's folder, which does not say what its" in err


def test_a_folder_of_runs_is_no_checkpoint(tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    code, _, err = inspected(capsys, str(tmp_path), "--step", "1")
    assert code == 2 and f"{tmp_path} is no checkpoint: give the folder of a run" in err


def test_verify_says_of_int64_to_write_uint32(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "a.npy", np.arange(4000) % 256, "int64")
    for dtype in ("uint16", "uint32"):
        code, checks, err = verified(capsys, path, "--dtype", dtype, "--vocab-size", "260")
        assert code == 2 and checks["dtype"] == "FAILED" and "looks like int64" in err and "write uint32" in err


def test_messages_name_the_flags_of_the_command_and_the_fix_of_the_check(tmp_path: Path, capsys) -> None:
    with_header, wide = tmp_path / "h.npy", write(tmp_path / "w.npy", [5, 6, 256] * 100, "uint32")
    np.save(with_header, np.array([5, 6, 256] * 100, "<u2"))
    lines = [
        (verified(capsys, str(with_header))[2], "give --header, or write the ids"),
        (
            verified(capsys, str(with_header), "--header", "--dtype", "uint32")[2],
            "uint16, not uint32): leave out --dty",
        ),
        (verified(capsys, wide, "--vocab-size", "260")[2], "): give --dtype uint32"),
        (inspected(capsys, str(with_header), "--tokenizer", "bytes")[2], "give --header, or write the ids"),
        (inspected(capsys, wide, "--tokenizer", "bytes")[2], "): give --dtype uint32"),
    ]
    for line, said in lines:
        assert said in line and "--data." not in line and "again" not in line


def test_a_pattern_of_several_files_is_no_file(tmp_path: Path, capsys) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.npy", [1, 2, 256])
    code, _, err = inspected(capsys, f"{tmp_path}/*.npy", "--tokenizer", "bytes")
    assert code == 2 and "names 2 files: name one" in err


def test_verify_takes_what_data_tokens_takes(tmp_path: Path, capsys) -> None:
    one, two = (write(tmp_path / f"{name}.npy", [5, 6, 256] * 100) for name in "ab")
    code = main(["data", "verify", f"{one}=0.5", f"{two}=0.5"])
    out = capsys.readouterr().out
    assert code == 0 and out.count(one) == out.count(two) == len(ALL)


def test_verify_tells_the_dtypes_apart_for_large_vocabularies(tmp_path: Path, capsys) -> None:
    ids = np.random.default_rng(0).integers(0, 100_278, 4000)
    wide, narrow = write(tmp_path / "w.npy", ids, "uint32"), write(tmp_path / "n.npy", ids % 50_000)
    for words in (("--vocab-size", "100278"), ()):
        dtypes = {dtype: [verified(capsys, path, "--dtype", dtype, *words)[1]["dtype"] for path in (wide, narrow)]
                  for dtype in ("uint16", "uint32")}  # fmt: skip
        assert dtypes == {"uint16": ["FAILED", "ok"], "uint32": ["ok", "FAILED"]}, words


def test_verify_finds_a_cut_without_a_sidecar(tmp_path: Path, capsys) -> None:
    path = Path(write(tmp_path / "a.npy", [5, 6, 256] * 100))
    whole = path.read_bytes()
    for cut, failed in ((1, {"size", "documents"}), (2, {"documents"}), (4, {"documents"}), (6, set())):
        path.write_bytes(whole[:-cut])
        code, checks, err = verified(capsys, str(path), "--tokenizer", "bytes")
        assert {name for name, state in checks.items() if state == "FAILED"} == failed and code == (2 if failed else 0)
        assert cut != 2 or "the last document has no end: the file is cut short, or a part of one" in err
    path.write_bytes(np.frombuffer(whole, "<u2").astype("<u4").tobytes()[:-2])
    code, checks, _ = verified(capsys, str(path), "--tokenizer", "bytes", "--dtype", "uint32")
    assert code == 2 and checks["size"] == "FAILED"


def test_verify_says_where_a_disk_fails(tmp_path: Path, capsys, monkeypatch) -> None:
    path = write(tmp_path / "a.npy", [5, 6, 256] * 100)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(verify, "_read", fails)
    code, checks, err = verified(capsys, path)
    assert code == 2 and checks["readable"] == "FAILED" and "a.npy: Input/output error" in err
