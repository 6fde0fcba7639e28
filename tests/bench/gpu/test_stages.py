"""`make gpu` from its first line to its table: without a GPU, with the emulator in its place, and what it would run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from pipeline.bench.gpu import __main__ as gpu
from pipeline.bench.gpu.checks import all_passed, flex_passed, kernels_checked
from pipeline.bench.gpu.packages import install_missing
from pipeline.bench.gpu.step import STAGE_SECONDS, Step
from pipeline.bench.gpu.steps import STAGES, all_steps, steps_of
from pipeline.bench.gpu.target import EMULATED, Target, device_environment, find_target
from pipeline.bench.kernels import KernelOptions
from pipeline.bench.throughput import ThroughputOptions, _split
from pipeline.commands.flags import parse_flags, parse_run
from pipeline.errors import UserError

ROOT = Path(__file__).parents[3]
H200 = Target("NVIDIA H200", "9.0", 141 * 2**30, 132, "580.1")
EMULATOR = Target("emulator", None, None, None, None)


def make_gpu(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.bench.gpu", *words]
    given = {key: value for key, value in os.environ.items() if key not in ("OUT", "WHEELS", EMULATED)}
    return subprocess.run(
        command, cwd=ROOT, env={**given, **environment}, capture_output=True, text=True, timeout=1200, check=False
    )


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = make_gpu(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "sees no GPU here" in done.stderr


def test_a_stage_or_folder_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["sped"]) == 2
    assert "'sped'" in capsys.readouterr().err
    with pytest.raises(UserError, match="no folder"):
        install_missing(tmp_path / "none", tmp_path / "site")
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    with pytest.raises(UserError, match="cannot be installed"):
        install_missing(tmp_path, tmp_path / "site")


def test_packages_that_are_there_are_not_installed_again(tmp_path: Path) -> None:
    (tmp_path / "pytest-1.0-py3-none-any.whl").write_text("no wheel, and never opened")
    assert install_missing(tmp_path, tmp_path / "site") == []
    assert not (tmp_path / "site").exists()


def test_stages_run_skip_and_go_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(stage: str, target: Target) -> list[Step]:
        assert target == EMULATOR
        code = "import sys, os; print(os.environ['DS_ACCELERATOR']); raise SystemExit(sys.argv[1])"
        return [
            Step("wrong", "nothing", ("{python}", "-c", code, "7 is wrong"), 30),
            Step("right", "nothing", ("{python}", "-c", "pass"), 30),
            Step("lacking", "nothing", ("{python}", "-c", "pass"), 30, needs=("no_such_module",)),
        ]

    monkeypatch.setattr(gpu, "steps_of", short)
    monkeypatch.setenv(EMULATED, "1")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["correct", "train"]) == 1
    said = capsys.readouterr().out
    assert said.count("failed") == 4 and said.count("skipped") == 4 and "no_such_module not installed" in said
    assert gpu.main(["correct"]) == 1
    assert capsys.readouterr().out.count("passed (earlier)") == 1
    assert len(list(tmp_path.glob("*-*.json"))) == 6 and (tmp_path / "results.json").exists()
    assert len(list(tmp_path.glob("*.log"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_with_the_emulator_in_a_gpus_place(stage: str, tmp_path: Path) -> None:
    done = make_gpu(stage, OUT=str(tmp_path), **{EMULATED: "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    steps = steps_of(stage, EMULATOR)
    assert len(list(tmp_path.glob(f"{stage}-*.json"))) == len(steps)
    table = done.stdout.rpartition("\n\n")[2].splitlines()[1:]
    assert len(table) == len(steps)
    assert [line.split("  ")[0].strip() for line in table] == [stage] * len(steps)
    again = make_gpu(stage, OUT=str(tmp_path), **{EMULATED: "1"})
    assert again.stdout.count("(earlier)") == done.stdout.count(" passed (") - 1, "all but the build"


def test_every_command_for_a_gpu_is_one_that_its_program_takes() -> None:
    commands = [step.command for _, step in all_steps(H200)]
    benches = [words[3:] for words in commands if words[1:4] == ("-m", "pipeline", "bench")]
    for _, name, *words in benches:
        flags = [word.replace("{result}", "/tmp/result") for word in words]
        if name == "kernels":
            parse_flags(KernelOptions(), flags, "kernels")
        else:
            assert name == "throughput"
            own, rest = _split(flags)
            parse_flags(ThroughputOptions(), own, "throughput")
            parse_run([*rest, "--steps", "4"], "train")
    assert sum(words[0] == "bench" for words in benches) == len(benches) == 22
    for words in commands:
        if words[2] == "pipeline.bench.gpu.recall":
            parse_run(["miras_recall", *words[5:]], "train")
        if words[2] == "pipeline.bench.gpu.precision":
            parse_run([*words[4:], "--steps", "1", "--precision", "bf16"], "train")


def test_steps_that_run_an_op_are_skipped_without_einops() -> None:
    assert {step.name for _, step in all_steps(H200) if "einops" not in step.needs} == {"build", "versions"}


def test_the_marks_that_select_tests_on_a_gpu_select_some_of_every_op() -> None:
    marked = {
        "test_miras_scan_cuda": {"full_size", "small"},
        "test_affine_scan_cuda": {"small"},
        "test_memory_step_cuda": {"small"},
    }
    for name, wanted in marked.items():
        tests = [test for name, test in vars(import_module(f"tests.gpu.{name}")).items() if name.startswith("test_")]
        marks = {mark.name for test in tests for mark in marks_of(test)}
        assert wanted <= marks, name


def marks_of(test: Callable[..., None]) -> Iterator[pytest.Mark]:
    """Those of a test, and those of its single cases."""
    for mark in getattr(test, "pytestmark", ()):
        yield mark
        for case in mark.args[1] if mark.name == "parametrize" else ():
            yield from getattr(case, "marks", ())


def test_steps_have_names_of_their_own_and_stages_their_time() -> None:
    for target in (H200, EMULATOR):
        names = [(stage, step.name) for stage, step in all_steps(target)]
        assert len(names) == len(set(names))
    assert STAGE_SECONDS <= 540
    cases = [step for step in steps_of("speed", H200) if not step.always and "compiles" not in step.name]
    assert all(step.limit <= 60 for step in cases), "a case that hangs must not cost the others"


def test_the_kernels_are_built_for_the_device_and_for_it_alone() -> None:
    first = {stage: steps_of(stage, H200)[0] for stage in STAGES}
    assert all(step == first["correct"] for step in first.values()), "each stage may be the first on its machine"
    build = first["correct"]
    assert build.name == "build" and build.always
    assert build.environment == {"MNEMOS_BUILD": "require", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    assert Target("NVIDIA B200", "10.0", 1, 1, None).architecture == "10.0"


def test_the_emulator_takes_no_gpu_and_a_gpu_no_ranks_of_others() -> None:
    assert find_target({EMULATED: "1"}) == EMULATOR
    assert device_environment({"RANK": "3", "A": "b"}, EMULATOR) == {"A": "b", "DS_ACCELERATOR": "cpu"}
    given = device_environment({"WORLD_SIZE": "2"}, H200)
    assert given == {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}


def test_a_test_run_passes_where_it_ran_and_left_out_nothing_but_missing_packages() -> None:
    counts = {"passed": 3, "skipped": 1}
    assert all_passed(counts | {"reasons": ["fla-core is not installed"]}) is None
    assert all_passed(counts | {"reasons": ["fla-core is not installed", "no GPU"]}) == "tests were skipped: no GPU"
    assert all_passed({"passed": 0, "reasons": []}) == "no test ran"
    assert flex_passed({"names": ["test_full[flex-1]"]}) is None
    assert flex_passed({"names": ["test_full[flash2-1]"]}) == "no case of FlexAttention passed"


@pytest.mark.parametrize(("loaded", "failure", "said"), [(True, None, None), (False, None, "x"), (True, "off", "off")])
def test_the_doctor_passes_where_every_kernel_is_used(loaded: bool, failure: str | None, said: str | None) -> None:
    check = {"op": "miras_scan", "case": "float32", "failure": failure}
    kernels = {"libraries": {"cuda": {"loaded": loaded, "state": "x"}}, "checks": [check]}
    found = kernels_checked({"kernels": kernels})
    assert found is None if said is None else found is not None and said in found
