"""What is no token file, or not this run's, is refused in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.tokens.files import Layout, LocalTokenFile, OpenFiles
from pipeline.data.tokens.listing import list_tokens
from pipeline.data.tokens.sidecar import Sidecar, read_sidecar, sidecar_path
from pipeline.data_config import DataConfig
from tests.data.tokens.conftest import open_loader, write

IDS = np.arange(200) % 256


def sidecar(path: str, **changes: object) -> None:
    facts = Sidecar("uint16", 200, 1, 260, 256, "bytes", "bytes/1", "0" * 64).to_json()
    sidecar_path(Path(path)).write_text(json.dumps({**facts, **changes}))


def test_a_numpy_header_is_not_read_as_ids_and_is_skipped_when_it_is_expected(tmp_path: Path, refusal) -> None:
    path = tmp_path / "a.npy"
    np.save(path, IDS.astype("<u2"))
    line = refusal(open_loader, [str(path)])
    assert "a.npy has a NumPy header, which would be read as ids: give --data.token-header" in line and "tofile" in line
    loader = open_loader([str(path)], token_header=True, shuffle=False)
    assert loader.next_step()[0].input_ids[0].tolist() == IDS[:16].tolist()
    raw = write(tmp_path / "raw.npy", IDS)
    assert "raw.npy has no NumPy header, but --data.token-header says so: leave" in refusal(
        open_loader, [raw], token_header=True
    )
    np.save(path, IDS.astype("<i8").reshape(2, 100))
    assert "holds an array of <i8 of shape (2, 100): write one dimension" in refusal(
        open_loader, [str(path)], token_header=True
    )
    path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00" + b"nonsense" * 20)
    assert "has a damaged NumPy header" in refusal(open_loader, [str(path)], token_header=True)


@pytest.mark.parametrize(
    "head, said",
    [
        (b"PAR1", "is a parquet file: tokenise it"),
        (b"\x28\xb5\x2f\xfd", "is zstd data: decompress it"),
        ((20240520).to_bytes(4, "little"), "has a header of llm.c"),
        (b"MMIDIDX\x00\x00", "is an index of Megatron"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_other_files_are_named(tmp_path: Path, refusal, head: bytes, said: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(head + bytes(300))
    assert said in refusal(open_loader, [str(path)])


def test_ids_beyond_the_vocabulary_are_refused_where_they_are_read(tmp_path: Path, refusal) -> None:
    ids = np.resize(IDS, 100_000)
    ids[99_000] = 300
    path = write(tmp_path / "a.npy", ids)
    loader = open_loader([path], batch_size=6000, held_out_tokens=(path,))
    assert refusal(loader.next_step).startswith(
        f"{path}: token 99000 is id 300, beyond the model's vocabulary of 260: give files of the tokenizer"
    )
    ids[5] = 301
    assert "token 5 is id 301" in refusal(open_loader, [write(tmp_path / "a.npy", ids)]), "at the start already"


def test_a_dtype_that_does_not_fit_is_refused(tmp_path: Path, refusal) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(bytes(201))
    assert "201 bytes of ids are no whole number of uint16: the file is cut short, or" in refusal(
        open_loader, [str(path)]
    )
    wide = write(tmp_path / "wide.npy", IDS, "uint32")
    assert "is read as uint16 and looks like uint32" in refusal(open_loader, [wide])
    assert len(open_loader([wide], token_dtype="uint32").sources[0]) == 11
    narrow = write(tmp_path / "narrow.npy", IDS + 1)
    assert "is read as uint32 and looks like uint16" in refusal(open_loader, [narrow], token_dtype="uint32")
    assert len(open_loader([narrow], vocab=70_000, token_dtype="uint16").sources[0]) == 11
    sidecar(narrow)
    assert "holds uint16 by its sidecar, not uint32" in refusal(open_loader, [narrow], token_dtype="uint32")
    assert len(open_loader([narrow], vocab=70_000).sources[0]) == 11, "the sidecar says it"


def test_a_file_without_a_window_is_refused(tmp_path: Path, refusal) -> None:
    short = write(tmp_path / "a.npy", IDS[:15])
    assert "a.npy has no window of --sequence-length 16: its longest file has 15 tokens" in refusal(
        open_loader, [short]
    )
    assert "no window" in refusal(open_loader, [write(tmp_path / "empty.npy", [])])
    one = write(tmp_path / "one.npy", IDS[:31])
    line = refusal(open_loader, [one], held_out=True)
    assert "has too few windows of --sequence-length 16 to hold some out" in line and "--data.held-out-tokens" in line


def test_ratios_and_names(tmp_path: Path, refusal, monkeypatch) -> None:
    one, two = (write(tmp_path / name, IDS) for name in ("one.npy", "two.npy"))
    assert "the ratios sum to 0.9, not to 1" in refusal(list_tokens, [f"{one}=0.6", f"{two}=0.3"])
    assert "the ratios sum to 10" in refusal(list_tokens, [f"{one}=6", f"{two}=4"])
    assert "two.npy has no ratio" in refusal(list_tokens, [f"{one}=0.6", two])
    assert "0 is no share" in refusal(list_tokens, [f"{one}=0", f"{two}=1"])
    assert "twice" in refusal(list_tokens, [one, str(tmp_path)])
    assert "does not exist" in refusal(list_tokens, [str(tmp_path / "none.npy")])
    assert "matches no .npy or .bin file" in refusal(list_tokens, [str(tmp_path / "x*.npy")])
    (tmp_path / "folder").mkdir()
    assert "holds no .npy or .bin file" in refusal(list_tokens, [str(tmp_path / "folder")])
    thirds = list_tokens([f"{one}=0.333333", f"{two}=0.666667"])
    assert sum(source.ratio for source in thirds) == 1
    monkeypatch.chdir(tmp_path)
    odd = write(Path("a=0.5"), IDS)
    assert [file.name for file in list_tokens([odd])[0].files] == ["a=0.5"], "a file of that very name"
    assert [file.identity for file in list_tokens([str(tmp_path)])[0].files] == ["one.npy", "two.npy"]
    url = "https://host/a.npy?sign=b2"
    assert list_tokens([url])[0].files[0].identity == "a.npy" and list_tokens([url + "=1"])[0].given == url


def test_only_one_kind_of_data_is_named(refusal) -> None:
    assert "--data.path and --data.tokens are both given" in refusal(DataConfig, tokens=("a",), path=("b",))
    assert "--data.mix and --data.tokens are both given" in refusal(DataConfig, tokens=("a",), mix=("b=1",))
    assert "--data.eos-id is -1" in refusal(DataConfig, eos_id=-1)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"format": None}, "is no sidecar of a token file"),
        ({"tokens": "many"}, "tokens is 'many', not int"),
        ({"dtype": "int8"}, "dtype is 'int8', not uint16 or uint32"),
        ({"spans": [{"source": "a"}]}, "spans has"),
    ],
)
def test_a_damaged_sidecar_is_named(tmp_path: Path, refusal, changes: dict[str, object], said: str) -> None:
    path = write(tmp_path / "a.npy", IDS)
    sidecar(path, **changes)
    assert said in refusal(read_sidecar, Path(path))
    sidecar_path(Path(path)).write_text("{")
    assert "not JSON" in refusal(read_sidecar, Path(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, refusal) -> None:
    assert "cannot be read" in refusal(LocalTokenFile, tmp_path / "none.npy", "none.npy", Layout("uint16"))


def test_sidecars_of_two_tokenizers_have_no_common_end(tmp_path: Path, refusal) -> None:
    one, two = (write(tmp_path / name, IDS) for name in ("one.npy", "two.npy"))
    sidecar(one)
    sidecar(two, eos_id=0)
    line = refusal(open_loader, [one, two], document_mask=True)
    assert "one.npy ends documents with id 256" in line and "two.npy with 0" in line
    assert open_loader([one, two], document_mask=True, eos_id=3)._eos_id == 3


@pytest.mark.parametrize("change", ["content", "size", "name"])
def test_another_file_in_its_place_is_noticed_at_a_resume(tmp_path: Path, refusal, change: str) -> None:
    path = Path(write(tmp_path / "a.npy", IDS))
    state = open_loader([str(path)]).state_dict()
    ids = IDS.copy()
    ids[150] += change == "content"
    write(path, ids[: 200 - (change == "size")])
    if change == "name":
        path = path.rename(tmp_path / "b.npy")
    loader = open_loader([str(path)])
    assert "--data.tokens does not give the data of the checkpoint (source 1" in refusal(loader.load_state_dict, state)
    accepting = open_loader([str(path)], on_change="accept")
    accepting.load_state_dict(state)
    same = open_loader([write(path, IDS)], sequence_length=8)
    assert "--sequence-length does not give the data" in refusal(same.load_state_dict, state)


def test_a_file_that_is_cut_while_it_is_read_ends_in_a_line(tmp_path: Path, refusal) -> None:
    path = Path(write(tmp_path / "a.npy", np.resize(IDS, 6400)))
    loader = open_loader([str(path)], shuffle=False)
    loader.next_step()
    path.write_bytes(b"")
    line = refusal(lambda: [loader.next_step() for _ in range(2)])
    assert "a.npy has been cut short while it was read: restore it" in line


def test_no_more_files_are_open_than_may_be(tmp_path: Path) -> None:
    files = OpenFiles(most=3)
    paths = [Path(write(tmp_path / f"{i}.npy", [i, i, i])) for i in range(10)]
    for _ in range(2):
        for i, path in enumerate(paths):
            assert np.frombuffer(files.read(path, 2, 2), "<u2").tolist() == [i]
            assert len(files._open) <= 3
