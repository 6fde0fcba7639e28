"""Every CUDA source compiles for every default architecture without a warning, and without spilled registers.

tests/test_build.py shows, in every run of the tests, that the library as set-up builds it holds code for them all. This
compiles anew, minutes of it, to see what the compiler says.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "kernels").glob("*/cuda/*.cu"))
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

# As setup.py has them.
FLAGS = (
    *("-O3", "-std=c++20", "-DNDEBUG", "-DUSE_CUDA", "-DPy_LIMITED_API=0x030a0000"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "--expt-relaxed-constexpr"),
    *(f"-I{ROOT / 'kernels'}", "-isystem", str(Path(torch.__file__).parent / "include"), "-Xcompiler=-fPIC"),
)


def architectures() -> list[str]:
    """Those that set-up compiles for by default, as far as this nvcc knows them."""
    (text,) = re.findall(r'^ARCHITECTURES = "(.+)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    known = subprocess.run([str(NVCC), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [name for word in text.split(";") if f"sm_{(name := word.replace('.', '')).rstrip('a')}" in known]


def test_every_op_with_kernels_has_sources() -> None:
    assert {path.parts[-3] for path in SOURCES} >= {"affine_scan", "memory_step", "miras_scan"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH or in /usr/local/cuda")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT / "kernels").as_posix())
def test_compiles_without_warnings_or_spills(source: Path, tmp_path: Path) -> None:
    names = architectures()
    assert {"80", "90a"} <= set(names)
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    command = [str(NVCC), *FLAGS, *codes, "--threads=2", "--ptxas-options=-v", "-c", str(source), "-o", "out.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    assert not re.search(r"\bwarning\b", text), text[-4000:]
    entries = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores", text, re.DOTALL)
    assert {target for _, target, _ in entries} == {f"sm_{name}" for name in names}
    assert [(name, target) for name, target, spilled in entries if int(spilled)] == []
