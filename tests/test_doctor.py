"""The doctor reports what is there, and survives what is not."""

from __future__ import annotations

import builtins
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import doctor


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No tools, no packages, no built operation, and imports that fail."""

    def no_package(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    real_import = builtins.__import__

    def no_import(name: str, *arguments, **options):
        if name.split(".")[0] in ("torch", "psutil") or name.startswith("pipeline.ops"):
            raise ImportError(f"no {name} here")
        return real_import(name, *arguments, **options)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", no_package)
    monkeypatch.setattr(importlib.metadata, "requires", no_package)
    monkeypatch.setattr("pipeline.machine._torch_version_file", lambda: None)
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
    warnings = list(doctor._unmet_requirements())
    assert len(warnings) == 2
    assert warnings[0].startswith("torch ") and "is not >=99" in warnings[0]
    assert warnings[1].startswith("no-such-package is missing")


def test_deepspeed_is_not_imported() -> None:
    script = "import sys; from pipeline import doctor; doctor.collect(); print('deepspeed' in sys.modules)"
    root = Path(doctor.__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
