"""Which files `--data.path` names: links, run directories, what is passed over, and that it is listed once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import DataConfig, ModelConfig, RunConfig
from pipeline.data.build import build_source, list_data
from pipeline.data.sources.listing import Listing, list_files


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")


def found(*paths: object, output_dir: Path | None = None) -> list[str]:
    return [file.identity for file in list_files([str(path) for path in paths], output_dir).files]


def test_linked_folders_are_searched_and_loops_end(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write(root, "own/a.txt")
    write(elsewhere, "b.txt", "deep/c.jsonl")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "deep" / "back").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (elsewhere / "self").symlink_to(elsewhere)
    # Folders in the order of their links: `again` is the first that leads to deep.
    assert found(root) == ["again/c.jsonl", "linked/b.txt", "own/a.txt"]
    assert found(root / "**") == found(root)
    assert found(root / "**" / "*.txt") == ["linked/b.txt", "own/a.txt"]
    assert found(root / "*" / "*.txt") == ["linked/b.txt", "own/a.txt"]


def test_a_link_to_itself_is_passed_over_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "folder", "a.jsonl")
    (tmp_path / "folder" / "loop.jsonl").symlink_to("loop.jsonl")
    listing = list_files([str(tmp_path / "folder")])
    assert [file.identity for file in listing.files] == ["a.jsonl"] and "link" in listing.notes()
    for pattern in ("folder/**/*.jsonl", "*/*.jsonl", "folder/*"):
        assert [Path(name).name for name in found(tmp_path / pattern)] == ["a.jsonl"]


def test_a_link_changes_the_identity_of_no_file_that_is_there_by_itself(tmp_path: Path) -> None:
    write(tmp_path, "z/x.txt")
    assert found(tmp_path) == ["z/x.txt"]
    (tmp_path / "a").symlink_to(tmp_path / "z")
    assert found(tmp_path) == ["z/x.txt"]


def test_a_file_that_is_reached_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path, "z.txt", "folder/y.txt")
    (tmp_path / "a.txt").symlink_to(tmp_path / "z.txt")
    assert found(tmp_path) == ["a.txt", "folder/y.txt"]
    assert found(tmp_path / "folder", tmp_path) == ["y.txt", "a.txt"]


def test_two_stars_are_any_number_of_folders(tmp_path: Path) -> None:
    write(tmp_path, "x.txt", "a/x.txt", "a/b/x.txt", "a/b/y.md", "c/b/x.txt", ".hidden/x.txt", "a/__pycache__/x.txt")
    assert found(tmp_path / "**" / "x.txt") == ["a/b/x.txt", "a/x.txt", "c/b/x.txt", "x.txt"]
    assert found(tmp_path / "a" / "**" / "*.txt") == ["b/x.txt", "x.txt"]
    assert found(tmp_path / "**" / "b") == ["a/b/x.txt", "a/b/y.md", "c/b/x.txt"]
    assert found(tmp_path / "?" / "**" / "*.md") == ["a/b/y.md"]


def test_what_is_passed_over_is_listed_by_extension(tmp_path: Path, refusal: Callable[..., str]) -> None:
    write(tmp_path, "a.txt", "b.csv", "c.CSV", "d/e.bz2", "f.tar.gz", "README", "g.parquet.zst", ".hidden")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe.jsonl")
    listing = list_files([str(tmp_path)])
    assert [file.identity for file in listing.files] == ["a.txt"]
    assert listing.notes() == (
        "1 .bz2, 2 .csv, 1 .parquet.zst, 1 .tar.gz, 1 broken link, 1 special file, 1 without extension"
    )
    source = build_source(config(tmp_path))
    assert source.describe().endswith(f"; passed over: {listing.notes()}")
    (tmp_path / "a.txt").unlink()
    assert "file (passed over: 1 .bz2, 2 .csv" in refusal(list_files, [str(tmp_path)])
    assert "pipe.jsonl is neither a file nor a folder" in refusal(list_files, [str(tmp_path / "pipe.jsonl")])
    assert "f.tar.gz ends in '.tar.gz'" in refusal(list_files, [str(tmp_path / "f.tar.gz")])
    assert "README has no extension" in refusal(list_files, [str(tmp_path / "README")])
    assert "cannot be read (File name too long)" in refusal(list_files, ["x" * 5000])
    for name in ("nul\0", "nul\0*"):
        assert "--data.path nul" in refusal(list_files, [name])


def test_a_folder_that_may_not_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "closed/b.txt")
    scandir = os.scandir

    def denied(folder: Path) -> object:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    assert list_files([str(tmp_path)]).notes() == "1 folder that may not be listed"


def config(path: Path | str, output_dir: Path | str = "outputs") -> RunConfig:
    data = DataConfig(path=(str(path),))
    return RunConfig("test", ModelConfig(), 1, 1, 8, 1e-3, data=data, output_dir=Path(output_dir))


def make_run(folder: Path) -> None:
    write(folder, "run.json", "config.yaml", "ds_config.json", "metrics.jsonl", "notes.txt")
    write(folder / "checkpoints" / "checkpoint-1", "manifest.json", "trainer_state.json", "loader.json")


def test_runs_are_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--data.path .` in the folder in which runs lie: the run's own, there or not yet, and every other."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.txt", "b.jsonl")
    for given in (".", "**", "*", "**/*.json*"):
        (before,) = list_data(config(given, "outputs/mine"))
        assert before is not None and not before.passed_over
        make_run(tmp_path / "outputs" / "mine")
        make_run(tmp_path / "other")
        make_run(tmp_path / "copied" / "run")
        (after,) = list_data(config(given, "outputs/mine"))
        assert after is not None and after.files == before.files
        assert after.notes() == "3 run directories"
        for folder in ("outputs", "other", "copied"):
            shutil.rmtree(folder)


def test_a_run_directory_that_holds_something_else_yet_is_left_out_too(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "mine/old.txt")
    assert found(tmp_path, output_dir=tmp_path / "mine") == ["a.txt"]
    assert found(tmp_path) == ["a.txt", "mine/old.txt"]
    assert found(tmp_path / "mine" / "old.txt", output_dir=tmp_path / "mine") == ["old.txt"], "named, it is read"


def test_a_copied_checkpoint_is_no_data(tmp_path: Path) -> None:
    write(tmp_path, "a.txt")
    make_run(tmp_path / "run")
    os.rename(tmp_path / "run" / "checkpoints" / "checkpoint-1", tmp_path / "kept")
    assert list_files([str(tmp_path)]).notes() == "2 run directories"


def test_files_of_the_run_beside_the_data_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.json", "b.jsonl")
    make_run(tmp_path)
    assert found("*.json*", output_dir=Path()) == ["a.json", "b.jsonl"]
    assert "--data.path . is also --output-dir: name another --output-dir" in refusal(list_files, ["."], Path())
    assert "--data.path . is the folder of a run" in refusal(list_files, ["."], Path("elsewhere"))


def test_a_folder_of_save_to_disk_is_named(tmp_path: Path, refusal: Callable[..., str]) -> None:
    import datasets

    from pipeline.data.sources.huggingface import HuggingFaceStream

    data = datasets.Dataset.from_dict({"text": ["a", "b"]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "several")
    for folder in ("one", "several", "several/train"):
        path = str(tmp_path / folder)
        expected = f"{path} is a folder of datasets' save_to_disk, which only that library reads: write its splits with"
        assert f"--data.path {expected} load_from_disk(...).to_parquet(FILE)" in refusal(list_files, [path])
        assert f"--data.dataset {expected}" in refusal(HuggingFaceStream, path)
    write(tmp_path, "a.txt")
    assert list_files([str(tmp_path)]).notes() == "2 folders of save_to_disk"


def test_both_sides_of_the_hold_out_read_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is written between the first step and the first evaluation is in neither."""
    from pipeline.config import replace
    from pipeline.parallel.topology import Topology
    from pipeline.recipes.miras import miras_tiny
    from pipeline.system import Phase, create_system

    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 40)
    listed: list[Listing] = []

    def counted(paths: tuple[str, ...], output_dir: Path | None) -> Listing:
        listed.append(list_files(paths, output_dir))
        return listed[-1]

    monkeypatch.setattr("pipeline.data.build.list_files", counted)
    system = create_system(replace(miras_tiny(), data__path=(str(tmp_path),), data__holdout=0.3))
    loader = system.loader(Phase("train", 1, ()), Topology())
    loader.next_step()
    (tmp_path / "broken.jsonl").write_text("{")
    system.held_out(Phase("train", 1, ()), Topology()).next_step()
    assert len(listed) == 1 and "9 documents in 9 files" in loader.describe()
    # What rank 0 has listed stands for what another rank would find.
    other = create_system(replace(miras_tiny(), data__path=(str(tmp_path),), data__holdout=0.3))
    other.files = (listed[0],)
    assert other.loader(Phase("train", 1, ()), Topology()).describe() == loader.describe()
    assert len(listed) == 1
