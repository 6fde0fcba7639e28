"""What is no token file, or not this run's, is refused in one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.tokens.files import Layout, LocalTokenFile, OpenFiles, other_dtype
from pipeline.data.tokens.listing import list_tokens, names_of
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


@pytest.mark.parametrize(
    "version, text",
    [
        (b"\x01\x00", b"nonsense"),
        (b"\x01\x00", b"{'descr': '<u2', 'fortran_order': False, 'shape': (200,"),
        (b"\x02\x00", b"{'descr': '''<u2"),
        (b"\x02\x00", b"{'descr': {'a': []}, 'fortran_order': False, 'shape': (200,)}"),
        (b"\x03\x00", b"-" * 9000 + b"1"),
        (b"\x01\x00", b"{'descr': (), 'fortran_order': False, 'shape': (200,)}"),
        (b"\x01\x00", b"{'descr': ('<u2',), 'fortran_order': False, 'shape': (200,)}"),
        (b"\x01\x00", b"{'descr': '<u2'" + b" " * 20_000),
        (b"\x04\x00", b"{'descr': '<u2', 'fortran_order': False, 'shape': (200,)}"),
    ],
)
def test_a_damaged_numpy_header_ends_in_a_line(tmp_path: Path, refusal, version: bytes, text: bytes) -> None:
    path = tmp_path / "a.npy"
    size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    path.write_bytes(b"\x93NUMPY" + version + size + text + bytes(400))
    line = refusal(open_loader, [str(path)], token_header=True)
    assert "a.npy has a damaged NumPy header" in line and "\n" not in line


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_numpys_header_is_read(tmp_path: Path, refusal, version: tuple[int, int]) -> None:
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, IDS.astype("<u2"), version=version)
    assert open_loader([str(path)], token_header=True, shuffle=False).next_step()[0].input_ids[0, 5] == 5
    path.write_bytes(path.read_bytes()[:-20])
    line = refusal(open_loader, [str(path)], token_header=True)
    assert "holds 190 ids, and 200 by its NumPy header: it is cut short or changed" in line


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


def test_uint32_of_a_large_vocabulary_is_not_read_as_uint16_nor_the_reverse(tmp_path: Path, refusal) -> None:
    """Of whose ids the high halves are 0 and 1."""
    ids = np.random.default_rng(0).integers(0, 100_278, 4000)
    wide = write(tmp_path / "wide.npy", ids, "uint32")
    line = refusal(open_loader, [wide], vocab=100_352, token_dtype="uint16")
    assert "is read as uint16 and looks like uint32 (every second id is tiny): give --data.token-dtype uint32" in line
    assert open_loader([wide], vocab=100_352, shuffle=False).next_step()[0].input_ids[0].tolist() == ids[:16].tolist()
    narrow = write(tmp_path / "narrow.npy", ids % 50_000)
    assert "is read as uint32 and looks like uint16" in refusal(open_loader, [narrow], vocab=100_352)
    assert len(open_loader([narrow], vocab=100_352, token_dtype="uint16").sources[0]) > 1
    for vocabulary in (None, 100_352, 260):
        for few in (np.zeros(200), np.full(200, 3), np.arange(200) % 7):
            assert other_dtype(few.astype("<u2"), vocabulary) is None, (vocabulary, few[:7])
            assert other_dtype(few.astype("<u4"), vocabulary) is None, (vocabulary, few[:7])
    assert other_dtype(ids.astype("<u4").view("<u2"), None) and other_dtype(
        (ids % 50_000).astype("<u2").view("<u4"), None
    )


def test_int64_is_not_taken_for_a_dtype_that_can_be_given(tmp_path: Path, refusal) -> None:
    for vocabulary, most in ((260, 256), (100_352, 100_278)):
        ids = np.random.default_rng(0).integers(0, most, 4001)
        path = write(tmp_path / "a.npy", ids, "int64")
        for dtype in ("uint16", "uint32"):
            line = refusal(open_loader, [path], vocab=vocabulary, token_dtype=dtype)
            assert f"a.npy is read as {dtype} and looks like int64 (" in line and line.endswith("): write uint32")
            found = other_dtype(np.fromfile(path, f"<u{4 if dtype == 'uint32' else 2}"), None)
            assert found is not None and found[1] == "int64"
        assert other_dtype(ids.astype("<u4"), vocabulary) is None


@pytest.mark.parametrize("held", [150, 250])
def test_another_number_of_ids_than_the_sidecar_says_is_refused(tmp_path: Path, refusal, held: int) -> None:
    path = write(tmp_path / "a.npy", np.resize(IDS, held))
    sidecar(path)
    line = refusal(open_loader, [path])
    assert f"a.npy holds {held} ids, and 200 by its sidecar: it is cut short or changed: copy it again, or" in line


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


@pytest.mark.parametrize(
    "url",
    [
        "https://host/a.npy?sign=b2",
        "https://host/a.npy?part=3",
        "http://host/a.npy?x=a=b&part=0.5",
        "HTTP://h/a",
        "https://h/a.npy?a=1;b=2",
        f"https://h/{'a' * 5000}.npy",
        "https://h/part=3",
        "https://user:p=3@h/a.npy",
    ],
)
def test_a_number_at_the_end_of_a_query_is_no_ratio(url: str) -> None:
    (source,) = list_tokens([url])
    assert (source.given, source.ratio, source.files[0].name) == (url, 1, url)
    one, other = list_tokens([f"{url}=0.25", "https://host/b.npy=0.75"])
    assert (one.given, float(one.ratio)) == (url, 0.25) and other.given == "https://host/b.npy"
    assert names_of([f"{url}=0.25", url]) == [url, url]


@pytest.mark.parametrize("url", ["http://[::1/a.npy", "https://", "https:///a.npy", "http://h:port/a.npy"])
def test_what_cannot_be_asked_for_is_refused_by_its_own_name(url: str, refusal) -> None:
    line = refusal(list_tokens, [url])
    assert "is no URL that can be asked for: check the address" in line and ".json" not in line


def test_shares_of_urls_are_summed_as_those_of_files(refusal) -> None:
    urls = ["https://h/a.npy=6", "https://h/b.bin?key=c=4"]
    assert "the ratios sum to 10" in refusal(list_tokens, urls)


def test_a_home_of_nobody_is_a_path_that_does_not_exist(tmp_path: Path, refusal) -> None:
    path = write(tmp_path / "a.npy", IDS)
    assert "~nosuchuser/a.npy does not exist: check the path" in refusal(list_tokens, ["~nosuchuser/a.npy"])
    assert "does not exist" in refusal(list_tokens, ["~nosuchuser/a.npy=0.5", f"{path}=0.5"])
    assert len(open_loader([path], token_cache="~nosuchuser/cache").sources) == 1


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
    sidecar_path(Path(two)).unlink()
    line = refusal(open_loader, [two, one], document_mask=True)
    assert "one.npy ends documents with id 256 by its sidecar, and " in line and "two.npy has none: give" in line
    assert open_loader([one], document_mask=True)._eos_id == 256


def test_an_end_that_the_model_does_not_have_is_refused(tmp_path: Path, refusal) -> None:
    path = write(tmp_path / "a.npy", IDS)
    line = refusal(open_loader, [path], document_mask=True, eos_id=260)
    assert "--data.eos-id ends documents with id 260, beyond the model's vocabulary of 260" in line
    sidecar(path, eos_id=300)
    assert "the sidecar of" in refusal(open_loader, [path]) and "id 300" in refusal(open_loader, [path])
    sidecar(path, eos_id=-1)
    assert "id -1" in refusal(open_loader, [path])


def test_documents_of_unknown_files_do_not_end_where_bytes_do(tmp_path: Path, refusal) -> None:
    """The default tokenizer is that of bytes, and its end is an ordinary id of any other."""
    path = write(tmp_path / "a.npy", IDS)
    line = refusal(open_loader, [path], vocab=50_304, document_mask=True)
    assert "nothing says which tokenizer made the token files" in line and "give --data.eos-id, or --data.tok" in line
    assert open_loader([path], vocab=50_304, document_mask=True, eos_id=0)._eos_id == 0
    assert open_loader([path], vocab=260, document_mask=True)._eos_id == 256
    assert open_loader([path], vocab=50_304)._eos_id is None


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
