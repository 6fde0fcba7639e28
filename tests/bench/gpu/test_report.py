"""What `make gpu` measured becomes a section of docs/results.md, and leaves the table of what has never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.gpu import report
from pipeline.bench.gpu.report import BEGIN, END, NO_STEP_YET, every_result, run_report, section
from pipeline.errors import UserError

DOCS = Path(__file__).parents[3] / "docs"


def result(step: str, status: str = "passed", **more: Any) -> dict[str, Any]:
    return {
        "stage": "speed", "step": step, "shows": "x", "status": status, "reason": None, "seconds": 3.0, "limit": 60,
        "command": ["{python}", "-m", "pipeline", "bench", "kernels", "--json", "{result}"], "environment": {},
        "device": "NVIDIA H200", "memory": 2**37, "driver": "580.1", "versions": {"torch": "2.11.0"},
        "commit": "a" * 40, "peer": False, "sources": "digest", "figures": {},
        "written": "2026-12-01T10:00:00+0000", **more,
    }  # fmt: skip


def write(folder: Path, *results: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for content in results:
        (folder / f"speed-{content['step']}.json").write_text(json.dumps(content))
    return folder


def page(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "results.md"
    path.write_text(f"# Results\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    return path


def test_results_become_a_table_and_are_never_run_no_more(tmp_path: Path) -> None:
    text = page(tmp_path / "docs")
    figures = {"copy": 4.3e12, "cached_copy": 7e12, "bf16": 7.9e14, "tf32": 4e14}
    out = write(tmp_path / "out", result("ceilings", figures=figures), result("other", "timed out", reason="60 s"))
    run_report([str(out), "--docs", str(tmp_path / "docs")])
    written = text.read_text()
    assert written.startswith("# Results\n\nbefore\n") and written.endswith("\n\nafter\n") and "old" not in written
    assert "### NVIDIA H200" in written and "Driver 580.1; torch 2.11.0" in written
    row = "| ceilings | passed | copy 4.30 TB/s; cached 7.00 TB/s; bf16 790 TFLOP/s; TF32 400 TFLOP/s |"
    assert f"{row} `python -m pipeline bench kernels` | aaaaaaaa, 2026-12-01 |" in written
    assert "timed out: 60 s" in written
    never = written.partition("### Never run on a GPU yet")[2]
    assert "| ceilings |" not in never and "| build | correct |" in never


def test_the_page_names_what_no_step_shows() -> None:
    never = (DOCS / "results.md").read_text().partition("### Never run on a GPU yet")[2]
    assert all(f"| {what} | none yet | |" in never for what in NO_STEP_YET)


def test_newer_results_of_a_step_replace_older_ones_and_devices_stay_apart(tmp_path: Path) -> None:
    page(tmp_path / "docs")
    where = ["--docs", str(tmp_path / "docs")]
    run_report([str(write(tmp_path / "1", result("a"), result("b"))), *where])
    run_report([str(write(tmp_path / "2", result("b", seconds=5.0))), *where])
    run_report([str(write(tmp_path / "3", result("b", device="NVIDIA H100"))), *where])
    found = every_result(tmp_path / "docs" / "gpu")
    assert [(r["device"], r["step"], r["seconds"]) for r in found] == [
        ("NVIDIA H100", "b", 3.0), ("NVIDIA H200", "a", 3.0), ("NVIDIA H200", "b", 5.0),
    ]  # fmt: skip


def test_what_the_same_code_has_shown_is_not_taken_back(tmp_path: Path) -> None:
    page(tmp_path / "docs")
    where = ["--docs", str(tmp_path / "docs")]
    run_report([str(write(tmp_path / "1", result("a"), result("b"))), *where])
    again = (result("a", "not run"), result("b", "failed", sources="other"))
    run_report([str(write(tmp_path / "2", *again)), *where])
    found = {r["step"]: r["status"] for r in every_result(tmp_path / "docs" / "gpu")}
    assert found == {"a": "passed", "b": "failed"}


def test_the_file_of_all_results_is_enough(tmp_path: Path) -> None:
    page(tmp_path / "docs")
    out = write(tmp_path / "out", result("a", written="2026-12-02T10:00:00+0000"))
    (out / "results.json").write_text(json.dumps([result("a", "failed"), result("b")]))
    run_report([str(out), "--docs", str(tmp_path / "docs")])
    found = {r["step"]: r["status"] for r in every_result(tmp_path / "docs" / "gpu")}
    assert found == {"a": "passed", "b": "passed"}


def test_the_commit_of_a_copy_without_history_is_that_of_the_same_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "sources_digest", lambda: "digest")
    monkeypatch.setattr(report, "commit", lambda: "b" * 40)
    text = page(tmp_path / "docs")
    copies = (result("a", commit=None), result("b", commit=None, sources="0123456789"))
    run_report([str(write(tmp_path / "out", *copies)), "--docs", str(tmp_path / "docs")])
    assert "| bbbbbbbb, 2026-12-01 |" in text.read_text() and "| sources 01234567, 2026" in text.read_text()


def test_a_command_can_be_typed_again(tmp_path: Path) -> None:
    text = page(tmp_path / "docs")
    words = ["{python}", "-m", "pytest", "--junitxml={result}", "-p", "no:cacheprovider", "-m", "gpu and small"]
    tests = result("memcheck", command=words, environment={"CACHING": "1"})
    run_report([str(write(tmp_path / "out", tests)), "--docs", str(tmp_path / "docs")])
    assert "`CACHING=1 python -m pytest -m 'gpu and small'`" in text.read_text()


@pytest.mark.parametrize("wrong", ["empty", "no JSON", "emulator", "no place"])
def test_what_is_no_result_of_a_gpu_is_refused(tmp_path: Path, wrong: str) -> None:
    text = page(tmp_path / "docs")
    out = write(tmp_path / "out", *([] if wrong == "empty" else [result("a")]))
    if wrong == "no JSON":
        (out / "x.json").write_text("{")
    if wrong == "emulator":
        write(out, result("b", device="emulator", memory=None))
    if wrong == "no place":
        text.write_text("# Results\n")
    with pytest.raises(UserError):
        run_report([str(out), "--docs", str(tmp_path / "docs")])


def test_the_page_holds_what_the_files_beside_it_say() -> None:
    written = (DOCS / "results.md").read_text()
    assert f"{BEGIN}\n\n{section(every_result(DOCS / 'gpu'))}\n\n{END}" in written
