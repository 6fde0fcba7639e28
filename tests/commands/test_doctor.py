"""The doctor reports what is there, and survives what is not."""

from __future__ import annotations

import builtins
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import cli
from pipeline.commands import doctor
from pipeline.commands.doctor import backends, command, problems
from pipeline.errors import UserError
from pipeline.ops import (
    affine_scan_native,
    attention_slots_native,
    memory_step_native,
    native,
    scan_native,
    store_slots_native,
)


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No tools, no packages, nothing built, and imports that fail."""

    def no_package(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    real_import = builtins.__import__

    def no_import(name: str, *arguments, **options):
        if name.split(".")[0] in ("torch", "psutil") or name.startswith("pipeline.ops"):
            raise ImportError(f"no {name} here")
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(backends, "PACKAGE", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", no_package)
    monkeypatch.setattr(importlib.metadata, "requires", no_package)
    monkeypatch.setattr("pipeline.host.local._torch_version_file", lambda: None)
    monkeypatch.setattr(builtins, "__import__", no_import)


def test_report_is_json_and_names_what_is_here() -> None:
    report = doctor.collect()
    assert json.loads(json.dumps(report)) == report
    assert report["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["packages"]["deepspeed"] == importlib.metadata.version("deepspeed")
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["memory"] > 0
    assert report["attention"]["backends"]["sdpa"] == "yes"
    assert "torch" in report["kernels"]["miras_scan"]
    text = doctor.render(report)
    for word in ("python", "cpu", "memory", "deepspeed", "miras_scan", report["packages"]["transformers"]):
        assert word in text


def test_a_bare_machine_is_reported_with_what_to_mend(bare_machine: None) -> None:
    report = doctor.collect()
    assert report["gpus"] == []
    assert report["tools"]["c++ compiler"] is None
    assert report["packages"]["torch"] is None
    assert report["kernels"]["miras_scan"] == []
    assert report["deepspeed"] == {"accelerator": "cpu", "backend": "gloo"}
    warnings = "\n".join(report["warnings"])
    for words in ("torch does not load", "no C++ compiler", "no ninja", "not installed in this environment"):
        assert words in warnings
    assert all("\n" not in warning and ": " in warning for warning in report["warnings"])
    assert "warning: no C++ compiler" in doctor.render(report)


def test_an_impossible_accelerator_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "abacus")
    assert any("DS_ACCELERATOR is 'abacus'" in warning for warning in doctor.collect()["warnings"])


def test_requirements_that_are_not_met_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = ["torch>=99", "no-such-package", "einops", 'hypothesis>=999; extra == "dev"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: stated)
    warnings = list(problems.unmet_requirements())
    assert len(warnings) == 2
    assert warnings[0].startswith("torch ") and "is not >=99" in warnings[0]
    assert warnings[1].startswith("no-such-package is missing")


def test_deepspeed_is_not_imported() -> None:
    script = "import sys; from pipeline.commands import doctor; doctor.collect(); print('deepspeed' in sys.modules)"
    root = Path(doctor.__file__).parents[3]
    answer = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A package without libraries, in a process that has loaded and checked none."""
    monkeypatch.setattr(backends, "PACKAGE", tmp_path)
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setattr(native, "_checked", {})
    native.why_not.cache_clear()
    yield tmp_path
    native.why_not.cache_clear()


def rows(report: dict) -> dict[str, str]:
    lines = (line.split("  ", 1) for line in doctor.render(report).splitlines() if not line.startswith(" "))
    return {name: rest[0].strip() for name, *rest in lines if rest}


def test_built_kernels_are_checked() -> None:
    report = doctor.collect()
    cpu = report["kernels"]["libraries"]["cpu"]
    assert cpu["loaded"] == (native.why_not("cpu") is None)
    if cpu["loaded"]:
        assert report["kernels"]["miras_scan"][-2:] == ["cpu", "torch"]
        assert rows(report)["kernels: cpu"].startswith("built by ")
        assert "miras_scan, cpu" in doctor.render(report) and "checked, largest error" in doctor.render(report)
    checked = [check for check in report["kernels"]["checks"] if check["op"] == "miras_scan"]
    assert len(checked) == 6 * len([kind for kind in native.KINDS if native.load(kind)])


def test_what_the_build_had_to_say_is_said_again(package: Path) -> None:
    warning = "native kernels are not built for the CPU (no C++ compiler: install g++): miras_scan will be slow there"
    built = {"mode": "auto", "warning": warning, "libraries": {"cpu": {"built": False, "reason": "no C++ compiler"}}}
    (package / "_native_build.json").write_text(json.dumps(built))
    report = doctor.collect()
    assert report["warnings"].count(warning) == 1
    assert f"warning: {warning}" in doctor.render(report)
    assert rows(report)["kernels: cpu"] == "not built (no C++ compiler)"
    assert report["kernels"]["miras_scan"] == ["torch"]


def test_kernels_that_were_never_built_are_missed(package: Path) -> None:
    report = doctor.collect()
    assert any(warning.startswith("no native kernels are built") for warning in report["warnings"])
    assert report["kernels"]["checks"] == []


def test_a_kernel_for_gpus_is_called_not_yet_run_where_there_is_none(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (package / "_native_cuda.abi3.so").write_bytes(b"")
    facts = {"built": True, "compiler": "nvcc 13.0", "architectures": ["8.0", "9.0a", "10.0", "12.0"]}
    (package / "_native_build.json").write_text(json.dumps({"warning": None, "libraries": {"cuda": facts}}))
    report = doctor.collect()
    cuda = report["kernels"]["libraries"]["cuda"]
    assert cuda["architectures"] == ["8.0", "9.0a", "10.0", "12.0"]
    assert not cuda["loaded"]
    assert rows(report)["kernels: cuda"].startswith(
        "built for 8.0, 9.0a, 10.0, 12.0 by nvcc 13.0; not yet run on a device: "
    )
    assert not any("for the cuda do not run" in warning for warning in report["warnings"])


def test_a_kernel_that_fails_its_check_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_checked", {})
    native.verify("miras_scan", "cpu", "float32, key dim 64", lambda: 0.5, 1e-4)
    report = doctor.collect()
    assert "failed: float32, key dim 64: its results differ" in doctor.render(report)
    (warning,) = (text for text in report["warnings"] if "miras_scan is not native" in text)
    assert warning.startswith(
        "miras_scan is not native on cpu (float32, key dim 64): its results differ from PyTorch's"
    )


def test_a_device_that_a_check_breaks_is_reported_and_others_are_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    illegal = "CUDA error: an illegal memory access was encountered"
    small = SimpleNamespace(name="NVIDIA L4", major=8, minor=9, shared_memory_per_block_optin=101_376)

    def check(device: str, dtype: torch.dtype, key_dim: int) -> float:
        if device == "cuda:0" and key_dim == 64:
            raise torch.AcceleratorError(f"{illegal}\nadvice")
        return 1e-7

    monkeypatch.setattr(native, "_checked", {})
    monkeypatch.setattr(native, "why_not", lambda kind: None)
    monkeypatch.setattr(scan_native, "self_check", check)
    monkeypatch.setattr(affine_scan_native, "_largest_error", lambda *_: 1e-7)
    monkeypatch.setattr(memory_step_native, "self_check", lambda *_: 1e-7)
    monkeypatch.setattr(store_slots_native, "self_check", lambda *_: 1e-7)
    monkeypatch.setattr(attention_slots_native, "self_check", lambda *_: 1e-7)
    h100 = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, shared_memory_per_block_optin=232_448)
    for name, stand_in in {
        "device_count": lambda: 2,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: [h100, small][device.index],
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    report = doctor.collect()
    assert json.loads(json.dumps(report)) == report
    (message,) = report["kernels"]["lost"].values()
    assert message.startswith(
        "cuda:0 is lost: the check of the native kernel of miras_scan (float32, key dim 64) ended in"
    )
    assert message in report["warnings"]
    where = [(check["op"], check["device"], check["case"]) for check in report["kernels"]["checks"]]
    assert [case for _, device, case in where if device == "cuda:0"] == ["float32, key dim 32", "float32, key dim 64"]
    assert len([op for op, device, _ in where if (op, device) == ("miras_scan", "cuda:1")]) == 6
    text = doctor.render(report)
    assert "failed: float32, key dim 64: it ends in 'CUDA error: an illegal memory access was encountered'" in text
    assert "checked, largest error 1.0e-07 in 1 cases (float32, key dim 32)" in text
    assert (
        "failed: bfloat16, key dim 32: it needs 105,472 bytes of shared memory per block, and NVIDIA L4 (compute"
        " capability 8.9) has 101,376"
    ) in text

    left: list[int] = []
    monkeypatch.setattr(command, "collect", lambda: report)
    monkeypatch.setattr(cli, "exit_process", left.append)
    assert cli.main(["doctor"]) == 0
    assert left == [0], "the interpreter's own end may abort on a device that is lost"
    assert "cuda:0 is lost" in capsys.readouterr().out


def test_a_library_from_before_there_was_an_op_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load("cpu")
    monkeypatch.setattr(native, "_checked", {})
    monkeypatch.setattr(torch.ops, "mnemos", SimpleNamespace())
    report = doctor.collect()
    for op in ("miras_scan", "affine_scan", "memory_step", "store_slots", "slot_attention"):
        assert any(text.startswith(f"{op} is not native on cpu") for text in report["warnings"])
    assert "failed: float32: the library is older than affine_scan: run" in doctor.render(report)


def test_a_library_that_does_not_load_is_named(package: Path) -> None:
    (package / "_native_cpu.abi3.so").write_bytes(b"not a library")
    report = doctor.collect()
    assert any("the native kernels for the cpu do not run: built; not loaded: " in text for text in report["warnings"])


def test_the_report_goes_to_a_file_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.run_doctor(["--json", str(tmp_path / "doctor.json")])
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert written["kernels"]["libraries"].keys() == {"cpu", "cuda"} and "torch build" in capsys.readouterr().out
    with pytest.raises(UserError, match="no/where"):
        doctor.run_doctor(["--json", str(tmp_path / "no" / "where")])
