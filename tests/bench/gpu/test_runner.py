"""A step ends within its limit, says what it found, and is not run again once it has passed."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.bench.gpu import runner
from pipeline.bench.gpu.checks import has_both_passes
from pipeline.bench.gpu.runner import Facts, finished, result_file, run_step
from pipeline.bench.gpu.step import Step

FACTS = Facts("NVIDIA H200", "580.1", {"torch": "2.11"}, "abc", "digest", 2**37)
WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"


def step(code: str, *words: str, **more: object) -> Step:
    given = {"name": "a step", "shows": "something", "limit": 60.0, **more}
    return Step(command=("{python}", "-c", code, *words), **given)  # type: ignore[arg-type]


def run(step: Step, folder: Path, left: float = 100.0) -> dict:
    return run_step("correct", step, folder, FACTS, dict(os.environ), left)


def test_a_step_that_passes_leaves_a_log_and_a_result(tmp_path: Path) -> None:
    writes = step(f"print('said'); {WRITE}", "{result}", '{"copy": 3}', writes="json")
    result = run(writes, tmp_path)
    assert (result["status"], result["figures"], result["reason"]) == ("passed", {"copy": 3}, None)
    assert "said" in (tmp_path / "correct-a-step.log").read_text()
    assert json.loads(result_file(tmp_path, "correct", "a step").read_text()) == result
    assert (result["device"], result["driver"], result["commit"], result["sources"]) == (
        "NVIDIA H200", "580.1", "abc", "digest",
    )  # fmt: skip
    assert result["command"][0] == "{python}" and result["versions"] == {"torch": "2.11"}


def test_what_has_passed_is_not_asked_for_again_with_the_same_code_on_the_same_device(tmp_path: Path) -> None:
    passes = step("pass")
    result = run(passes, tmp_path)
    assert finished(tmp_path, "correct", passes, FACTS) == result
    for change in (
        {"sources": "other"}, {"target": "NVIDIA H100"}, {"driver": "590"}, {"versions": {"torch": "2.12"}},
    ):  # fmt: skip
        assert finished(tmp_path, "correct", passes, dataclasses.replace(FACTS, **change)) is None
    assert finished(tmp_path, "speed", passes, FACTS) is None
    assert finished(tmp_path, "correct", step("1 + 1"), FACTS) is None, "another command"
    run(step("raise SystemExit(3)"), tmp_path)
    assert finished(tmp_path, "correct", step("raise SystemExit(3)"), FACTS) is None
    result_file(tmp_path, "correct", "a step").write_text("{")
    assert finished(tmp_path, "correct", passes, FACTS) is None


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("raise ValueError('this is wrong')", "failed", "ValueError: this is wrong"),
        ("import os; os.abort()", "failed", "ended by signal 6"),
    ],
)
def test_a_step_that_fails_says_why(tmp_path: Path, code: str, status: str, reason: str) -> None:
    result = run(step(code), tmp_path)
    assert result["status"] == status and reason in result["reason"]


def test_out_of_memory_answers_a_measurement_and_fails_a_test(tmp_path: Path) -> None:
    code = "print('OutOfMemoryError: 8 GiB'); print('and more'); raise SystemExit(1)"
    measured = run(step(code, measures=True), tmp_path)
    assert (measured["status"], measured["reason"]) == ("out of memory", "OutOfMemoryError: 8 GiB")
    assert run(step(code), tmp_path)["status"] == "failed"
    report = '<testsuite><testcase name="a"><failure message="grad k is off"/></testcase></testsuite>'
    code = f"{WRITE}; print('out of memory'); raise SystemExit(1)"
    tests = run(step(code, "{result}", report, writes="junit", measures=True), tmp_path)
    assert (tests["status"], tests["reason"]) == ("failed", "a: grad k is off")


@pytest.mark.parametrize(
    ("figures", "status", "reason"),
    [
        ('{"rows": [{"pass": "forward"}, {"pass": "forward+backward"}], "notes": []}', "passed", None),
        ('{"rows": [{"pass": "forward"}], "notes": ["no more: bad_alloc"]}', "out of memory", "no more: bad_alloc"),
        ('{"rows": 3}', "failed", "its figures are not as expected (TypeError: 'int' object is not iterable)"),
        ('{"rows": [], "notes": ["cuda at 1x1: no"]}', "failed", "cuda at 1x1: no"),
        (
            '{"rows": [], "notes": ["torch at 1x1: OutOfMemoryError"]}',
            "out of memory",
            "torch at 1x1: OutOfMemoryError",
        ),
    ],
)
def test_figures_are_judged(tmp_path: Path, figures: str, status: str, reason: str | None) -> None:
    result = run(step(WRITE, "{result}", figures, writes="json", check=has_both_passes, measures=True), tmp_path)
    assert (result["status"], result["reason"]) == (status, reason)


def test_figures_that_are_missing_or_broken_are_a_failure(tmp_path: Path) -> None:
    assert run(step("pass", writes="json"), tmp_path)["reason"] == "it wrote no figures"
    broken = run(step(WRITE, "{result}", "{", writes="json"), tmp_path)
    assert broken["status"] == "failed" and "cannot be read" in broken["reason"]


def test_a_step_over_its_limit_is_ended_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LEAST", 0.5)
    monkeypatch.setattr(runner, "KILL_TIMEOUT", 0.5)
    marker = tmp_path / "child"
    code = (
        "import pathlib, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"pathlib.Path({str(marker)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    begun = time.perf_counter()
    result = run_step("correct", step(code, limit=2.0), tmp_path, FACTS, dict(os.environ), 100.0)
    assert result["status"] == "timed out" and result["reason"] == "not done in 2 s"
    assert time.perf_counter() - begun < 20
    child = int(marker.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_step_without_its_package_tool_or_time_is_not_run(tmp_path: Path) -> None:
    asked = step("raise SystemExit(1)", needs=("json", "no_such_module"), tools=("no-such-tool",))
    assert run(asked, tmp_path)["reason"] == "no_such_module, no-such-tool not installed"
    assert run(asked, tmp_path)["status"] == "skipped"
    imports = "raise ModuleNotFoundError(\"No module named 'msgpack'\")"
    assert run(step(imports), tmp_path)["reason"] == "msgpack not installed"
    assert run(step(imports.replace("msgpack", "pipeline.absent")), tmp_path)["status"] == "failed"
    late = run(step("raise SystemExit(1)"), tmp_path, left=2.0)
    assert (late["status"], late["reason"]) == ("not run", "the time of the stage is used up")


def test_a_step_that_the_end_of_the_stage_cuts_off_is_not_one_that_took_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LEAST", 0.2)
    cut = run(step("import time; time.sleep(60)"), tmp_path, left=0.5)
    assert cut["status"] == "not run" and "had 0 s left" in cut["reason"]


def test_what_has_to_run_again_does(tmp_path: Path) -> None:
    builds = step("pass", always=True)
    assert run(builds, tmp_path)["status"] == "passed" and finished(tmp_path, "correct", builds, FACTS) is None


def test_test_runs_are_counted_and_their_figures_kept(tmp_path: Path) -> None:
    report = """<testsuites><testsuite>
      <testcase name="a"><properties><property name="ms" value="7"/></properties></testcase>
      <testcase name="b"><failure message="assert 1 == 2&#10;more">text</failure></testcase>
      <testcase name="c"><skipped message="no GPU"/></testcase></testsuite></testsuites>"""
    code = f"{WRITE}; raise SystemExit(1)"
    result = run(step(code, "{result}", report, writes="junit"), tmp_path)
    assert result["figures"] == {
        "passed": 1, "failed": 1, "skipped": 1, "names": ["a"], "failures": ["b: assert 1 == 2"], "reasons": ["no GPU"],
        "properties": {"ms": "7"},
    }  # fmt: skip
    assert (result["status"], result["reason"]) == ("failed", "b: assert 1 == 2")


def test_python_and_the_scratch_folder_are_filled_in(tmp_path: Path) -> None:
    code = "import sys, pathlib; assert pathlib.Path(sys.argv[1]).is_dir(); print(sys.executable, sys.argv[1])"
    assert run(step(code, "{scratch}"), tmp_path)["status"] == "passed"
    said = (tmp_path / "correct-a-step.log").read_text().splitlines()[-1].split()
    assert said[0] == sys.executable and not Path(said[1]).exists()
