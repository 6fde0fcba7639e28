"""setup.py builds what it can, says in one line what it could not, and fails an install only when asked to."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SCHEMA = """
#include <torch/csrc/stable/library.h>
STABLE_TORCH_LIBRARY_FRAGMENT(mnemos, m) { m.def("twice(Tensor x) -> Tensor"); }
"""
HEADER = """
#pragma once
constexpr float kFactor = 2;
"""
CPU = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "twice/factor.h"
using torch::stable::Tensor;
Tensor twice(Tensor x) {
  Tensor y = torch::stable::empty_like(x);
  for (int64_t i = 0; i < x.numel(); ++i) y.mutable_data_ptr<float>()[i] = kFactor * x.const_data_ptr<float>()[i];
  return y;
}
STABLE_TORCH_LIBRARY_IMPL(mnemos, CPU, m) { m.impl("twice", TORCH_BOX(&twice)); }
"""

# Both note how they were called, make the files that they were asked for, and fail when told to.
FAKE_COMPILER = """#!/bin/sh
echo "$0 $*" >>"$TOOL_LOG"
case "$*" in
  *--version*) echo "fake compiler 1.0"; exit ;;
esac
[ -z "$COMPILER_FAILS" ] || { echo "kernels/twice/cpu/twice.cpp:7:3: error: no such thing"; exit 1; }
while [ $# -gt 0 ]; do
  [ "$1" != -o ] || echo library >"$2"
  [ "$1" != -MF ] || echo "out:" >"$2"
  shift
done
"""
FAKE_NVCC = """#!/bin/sh
echo "$0 $*" >>"$TOOL_LOG"
case "$*" in
  *--version*) echo "Cuda compilation tools, release $NVCC_RELEASE, V$NVCC_RELEASE.1"; exit ;;
  *--list-gpu-code*)
    printf 'sm_75\\nsm_80\\nsm_89\\nsm_90\\n'
    [ "$NVCC_RELEASE" = 12.4 ] || printf 'sm_100\\nsm_103\\nsm_120\\n'
    exit ;;
esac
[ -z "$NVCC_FAILS" ] || { echo "kernels/twice/cuda/twice.cu(4): error: no such thing"; exit 1; }
while [ $# -gt 0 ]; do
  [ "$1" != -o ] || echo library >"$2"
  [ "$1" != -MF ] || echo "out:" >"$2"
  shift
done
"""


class Tree:
    """A small copy of the project with one op, and the tools that it may find."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pipeline/__init__.py"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        for name, text in (("schema.cpp", SCHEMA), ("factor.h", HEADER), ("cpu/twice.cpp", CPU), ("cuda/twice.cu", "")):
            self.write(f"kernels/twice/{name}", text)
        self.tools = root / "tools"
        self.tools.mkdir()
        self.environment = {
            **{name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ},
            "PATH": f"{self.tools}:/usr/bin:/bin",
            "TOOL_LOG": str(root / "tools.log"),
        }

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def tool(self, name: str, script: str) -> None:
        self.write(f"tools/{name}", script).chmod(0o755)

    def fake_torch(self, version: str = "2.13.0", cuda: str | None = None) -> None:
        self.write("fake/torch/__init__.py", "raise ImportError('torch is looked at, never imported')")
        self.write("fake/torch/version.py", f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        self.environment["PYTHONPATH"] = str(self.root / "fake")

    def setup(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "setup.py", "-q", *command],
            cwd=self.root,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.setup("build_ext", "--inplace", **environment)

    @property
    def report(self) -> dict:
        return json.loads((self.root / "pipeline" / "_native_build.json").read_text())

    @property
    def libraries(self) -> list[str]:
        return sorted(path.name.split(".")[0] for path in (self.root / "pipeline").glob("*.so"))

    def calls(self, tool: str) -> list[str]:
        log = self.root / "tools.log"
        return [line for line in log.read_text().splitlines() if line.split()[0].endswith(f"/{tool}")]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.fixture
def faked(tree: Tree) -> Tree:
    """Compilers and a torch that are not real, so that a build takes no time."""
    tree.tool("c++", FAKE_COMPILER)
    tree.tool("nvcc", FAKE_NVCC)
    tree.fake_torch()
    tree.environment["NVCC_RELEASE"] = "13.0"
    return tree


def find_ninja() -> str:
    path = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert path
    return path


def without_compilers(tree: Tree) -> None:
    """Nothing but what the build itself needs is on the PATH."""
    tree.environment["PATH"] = str(tree.tools)


def one_line(text: str, *words: str) -> None:
    assert len(text.strip().splitlines()) == 1, text
    for word in words:
        assert word in text


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The small project, built with the real compiler, for the CPU alone."""
    tree = Tree(tmp_path_factory.mktemp("built"))
    (tree.root / "kernels/twice/cuda/twice.cu").unlink()
    done = tree.build(MNEMOS_BUILD="require")
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


def twice(tree: Tree) -> float:
    script = (
        "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.mnemos.twice(torch.ones(1)).item())"
    )
    library = str(next((tree.root / "pipeline").glob("_native_cpu*.so")))
    done = subprocess.run([sys.executable, "-c", script, library], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_a_build_makes_a_library_that_torch_loads(built: Tree) -> None:
    assert built.libraries == ["_native_cpu"]
    assert built.report["warning"] is None
    assert built.report["libraries"]["cpu"]["built"]
    assert twice(built) == 2


def test_what_did_not_change_is_not_compiled_again_and_a_changed_header_is(built: Tree) -> None:
    assert "no work to do" in built.build().stdout
    built.write("kernels/twice/factor.h", HEADER.replace("2", "3"))
    again = built.build()
    assert "twice.cpp.o" in again.stdout and "schema.cpp.o" not in again.stdout
    assert twice(built) == 3


def test_a_wheel_is_for_every_python_and_holds_the_library(built: Tree) -> None:
    done = built.setup("bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = (built.root / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"pipeline/_native_build.json", "pipeline/__init__.py"} <= set(names)
    assert any(re.fullmatch(r"pipeline/_native_cpu.*\.so", name) for name in names)


def test_off_builds_nothing_and_says_so(faked: Tree) -> None:
    assert faked.build().returncode == 0
    assert faked.libraries == ["_native_cpu", "_native_cuda"]
    done = faked.build(MNEMOS_BUILD="off")
    assert done.returncode == 0
    one_line(done.stderr, "warning: native kernels are off (MNEMOS_BUILD=off): twice will be slow")
    assert faked.libraries == []
    assert f"warning: {faked.report['warning']}" == done.stderr.strip()


@pytest.mark.parametrize("command", [("build_ext", "--inplace"), ("egg_info",)])
def test_another_value_is_refused_in_one_line(tree: Tree, command: tuple[str, ...]) -> None:
    done = tree.setup(*command, MNEMOS_BUILD="maybe")
    assert done.returncode != 0
    one_line(done.stderr, "MNEMOS_BUILD is 'maybe': give auto, require or off")


def test_without_a_compiler_an_install_succeeds_with_one_warning(tree: Tree) -> None:
    without_compilers(tree)
    (tree.root / "pipeline" / "_native_cpu.abi3.so").write_text("of an older build")
    done = tree.build()
    assert done.returncode == 0
    one_line(done.stderr, "no C++ compiler: install g++ or clang++", "twice will be slow", "for the CPU and the GPU")
    assert tree.libraries == [], "what is there is what was built"
    assert not tree.report["libraries"]["cpu"]["built"]


def test_without_a_compiler_a_required_build_fails_with_the_reason(tree: Tree) -> None:
    without_compilers(tree)
    done = tree.build(MNEMOS_BUILD="require")
    assert done.returncode != 0
    one_line(done.stderr, "MNEMOS_BUILD=require: native kernels are not built", "no C++ compiler")


def test_a_required_build_that_fails_takes_nothing_away(faked: Tree) -> None:
    assert faked.build().returncode == 0
    before = faked.report
    faked.write("kernels/twice/cuda/twice.cu", "changed")
    failed = faked.build(MNEMOS_BUILD="require", NVCC_FAILS="1")
    assert failed.returncode != 0
    assert faked.libraries == ["_native_cpu", "_native_cuda"]
    assert faked.report["libraries"] == before["libraries"]
    assert faked.report["sources"] == before["sources"], "those of what is installed"
    assert f"MNEMOS_BUILD=require: {faked.report['warning']}" == failed.stderr.strip()


def test_what_was_built_from_these_sources_outlives_its_compiler(faked: Tree) -> None:
    """A set-up from a shell with a shorter PATH takes nothing away; changed sources do."""
    assert faked.build().returncode == 0
    before = faked.report["libraries"]
    faked.environment["PATH"] = "/nowhere"
    done = faked.build()
    assert (done.returncode, done.stderr) == (0, "")
    assert faked.libraries == ["_native_cpu", "_native_cuda"]
    assert faked.report["libraries"] == before
    assert faked.build(MNEMOS_BUILD="require").returncode != 0
    faked.write("kernels/twice/factor.h", "changed")
    one_line(faked.build().stderr, "no C++ compiler")
    assert faked.libraries == []


def test_a_compiler_that_is_named_and_not_there(tree: Tree) -> None:
    one_line(tree.build(CXX="no-such-compiler -m64").stderr, "CXX is 'no-such-compiler -m64', which is not found")


@pytest.mark.parametrize(
    ("compiler", "message"), [("g++ 'a b", "close its quotes"), ("ccache", "which names no compiler")]
)
def test_a_compiler_that_is_named_wrongly(faked: Tree, compiler: str, message: str) -> None:
    faked.tool("ccache", FAKE_COMPILER)
    done = faked.build(CXX=compiler)
    assert done.returncode == 0
    one_line(done.stderr, f"CXX is {compiler!r}", message)


def test_a_build_folder_that_is_none(faked: Tree) -> None:
    faked.write("build", "a file")
    done = faked.build()
    assert done.returncode == 0
    one_line(done.stderr, "build/native is no folder to write to (Not a directory): move away what is there")
    required = faked.build(MNEMOS_BUILD="require")
    assert required.returncode != 0
    one_line(required.stderr, "MNEMOS_BUILD=require: ", "build/native is no folder")


def test_a_compiler_that_fails_leaves_its_library_out(faked: Tree) -> None:
    assert faked.build().returncode == 0
    faked.write("kernels/twice/factor.h", "changed")
    faked.write("kernels/twice/schema.cpp", "changed")
    done = faked.build(COMPILER_FAILS="1")
    assert done.returncode == 0
    one_line(done.stderr, "twice.cpp:7:3: error: no such thing (see build/native/build.log)", "will be slow")
    assert faked.libraries == ["_native_cuda"]
    assert "no such thing" in (faked.root / "build/native/build.log").read_text()
    required = faked.build(COMPILER_FAILS="1", MNEMOS_BUILD="require")
    assert required.returncode != 0
    one_line(required.stderr, "MNEMOS_BUILD=require: ", "error: no such thing")


def test_an_nvcc_that_fails_leaves_the_cpu_its_library(faked: Tree) -> None:
    done = faked.build(NVCC_FAILS="1")
    assert done.returncode == 0
    one_line(done.stderr, "not built for the GPU (kernels/twice/cuda/twice.cu(4): error: no such thing")
    assert faked.libraries == ["_native_cpu"]


def test_without_torch_metadata_works_and_a_build_says_what_is_missing(tree: Tree, tmp_path: Path) -> None:
    import setuptools

    site = tmp_path / "site"
    site.mkdir()
    packages = Path(setuptools.__file__).parents[1]
    for package in [*packages.glob("setuptools*"), *packages.glob("wheel*"), packages / "_distutils_hack"]:
        (site / package.name).symlink_to(package)

    def setup(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            # -S: without the environment's packages.
            [sys.executable, "-S", "setup.py", "-q", *command],
            cwd=tree.root,
            env={**tree.environment, "PYTHONPATH": str(site), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    metadata = setup("egg_info")
    assert metadata.returncode == 0, metadata.stderr
    done = setup("build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    one_line(done.stderr, "torch is not there at build time", "--no-build-isolation")
    assert setup("build_ext", "--inplace", MNEMOS_BUILD="require").returncode != 0

    # What was built from these sources outlives its torch, as it does its compiler.
    tree.tool("c++", FAKE_COMPILER)
    tree.tool("nvcc", FAKE_NVCC)
    tree.tool("ninja", f'#!/bin/sh\nexec {find_ninja()} "$@"\n')
    tree.fake_torch()
    both = f"{site}:{tree.environment.pop('PYTHONPATH')}"
    assert setup("build_ext", "--inplace", PYTHONPATH=both, NVCC_RELEASE="13.0").stderr == ""
    kept = setup("build_ext", "--inplace")
    assert (kept.returncode, kept.stderr) == (0, "")
    assert tree.libraries == ["_native_cpu", "_native_cuda"]


def test_an_old_torch_is_named(faked: Tree) -> None:
    faked.fake_torch("2.9.1")
    one_line(faked.build().stderr, "torch 2.9.1 has no stable ABI: install 2.10 or newer")
    assert faked.libraries == []


def compiled_for(tree: Tree) -> list[str]:
    compile_lines = [line for line in tree.calls("nvcc") if " -c " in line]
    return re.findall(r"-gencode=(\S+)", compile_lines[-1])


def test_cuda_is_compiled_for_the_default_architectures(faked: Tree) -> None:
    assert faked.build().stderr == ""
    assert compiled_for(faked) == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_100,code=sm_100",
        "arch=compute_120,code=sm_120",
    ]
    assert faked.report["libraries"]["cuda"]["architectures"] == ["8.0", "9.0a", "10.0", "12.0"]
    (line,) = (line for line in faked.calls("nvcc") if " -c " in line)
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in line and "-DUSE_CUDA" in line
    (link,) = (line for line in faked.calls("nvcc") if " -shared " in line)
    assert "-cudart=static" in link
    for library in ("torch_python", "c10_cuda", "cudart "):
        assert f"-l{library}" not in link


def test_an_older_nvcc_leaves_out_the_architectures_that_it_does_not_know(faked: Tree) -> None:
    assert faked.build(NVCC_RELEASE="12.4").returncode == 0
    assert compiled_for(faked) == ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]


@pytest.mark.parametrize("text", ["7.5;8.9+PTX", "7.5 8.9+PTX", " 7.5, 8.9+PTX "])
def test_architectures_are_those_of_the_list(faked: Tree, text: str) -> None:
    """As a vendor's container sets it: the kernels have nothing for 7.5."""
    assert faked.build(TORCH_CUDA_ARCH_LIST=text).stderr == ""
    assert compiled_for(faked) == ["arch=compute_89,code=[sm_89,compute_89]"]
    again = faked.build(TORCH_CUDA_ARCH_LIST="9.0a")
    assert "twice.cu.o" in again.stdout, "another list is another build"
    assert compiled_for(faked) == ["arch=compute_90a,code=sm_90a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hopper", "'Hopper' is no architecture such as 9.0a or 8.0+PTX"),
        ("8.0;12.9", "TORCH_CUDA_ARCH_LIST names 12.9, which nvcc 13.0 does not know: leave it out"),
        ("7.5", "TORCH_CUDA_ARCH_LIST is '7.5': the kernels need 8.0 or newer"),
    ],
)
def test_architectures_that_cannot_be_are_named(faked: Tree, text: str, message: str) -> None:
    done = faked.build(TORCH_CUDA_ARCH_LIST=text)
    assert done.returncode == 0
    one_line(done.stderr, message, "not built for the GPU")
    assert faked.libraries == ["_native_cpu"]
    assert faked.build(TORCH_CUDA_ARCH_LIST=text, MNEMOS_BUILD="require").returncode != 0


def test_an_nvcc_of_another_major_version_than_torch(faked: Tree) -> None:
    faked.fake_torch(cuda="12.8")
    done = faked.build()
    assert done.returncode == 0
    one_line(done.stderr, "nvcc is 13.0 but torch was built for CUDA 12.8: name a toolkit of 12.x in CUDA_HOME")
    assert faked.libraries == ["_native_cpu"]
    required = faked.build(MNEMOS_BUILD="require")
    assert required.returncode != 0
    one_line(required.stderr, "nvcc is 13.0 but torch was built for CUDA 12.8")
    faked.fake_torch(cuda="13.1")
    assert faked.build(MNEMOS_BUILD="require").returncode == 0
    assert faked.libraries == ["_native_cpu", "_native_cuda"]


def test_cuda_home_comes_first_and_must_hold_what_it_promises(faked: Tree) -> None:
    faked.write("toolkit/bin/nvcc", FAKE_NVCC).chmod(0o755)
    assert faked.build(CUDA_HOME=str(faked.root / "toolkit")).returncode == 0
    assert all(f"{faked.root}/toolkit/bin/nvcc" in line for line in faked.calls("nvcc"))
    done = faked.build(CUDA_HOME=str(faked.root / "elsewhere"))
    one_line(done.stderr, "elsewhere, which has no bin/nvcc")
    assert faked.libraries == ["_native_cpu"]


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_jobs_are_limited_on_request(faked: Tree, jobs: str) -> None:
    assert faked.build(MAX_JOBS=jobs).returncode == 0
    (line,) = (line for line in faked.calls("nvcc") if " -c " in line)
    assert f"--threads={jobs}" in line


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_the_threads_of_nvcc_count_as_jobs(faked: Tree, most: int) -> None:
    for name in ("cpu/a.cpp", "cpu/b.cpp", "cpu/c.cpp", "cuda/other.cu"):
        faked.write(f"kernels/twice/{name}", "")
    threads = 'n=$(echo "$*" | sed -n "s/.*--threads=\\([0-9]*\\).*/\\1/p")\nn=${n:-1}'
    noted = f'{threads}\necho "$n" >>"$TOOL_LOG.jobs"\nsleep 0.1\necho "-$n" >>"$TOOL_LOG.jobs"\nwhile'
    for name, script in (("c++", FAKE_COMPILER), ("nvcc", FAKE_NVCC)):
        faked.tool(name, script.replace("while", noted, 1))
    assert faked.build(MAX_JOBS=str(most)).stderr == ""
    changes = [int(line) for line in (faked.root / "tools.log.jobs").read_text().splitlines()]
    running = [sum(changes[: index + 1]) for index in range(len(changes))]
    assert running[-1] == 0
    assert 1 <= max(running) <= most


def test_forced_builds_compile_everything_again(faked: Tree) -> None:
    faked.build()
    before = len(faked.calls("nvcc"))
    done = faked.setup("build_ext", "--inplace", "--force")
    assert "twice.cpp.o" in done.stdout and "schema.cpp.o" in done.stdout
    assert sum(" -c " in line for line in faked.calls("nvcc")[before:]) == 1


def test_two_builds_at_once_take_turns(faked: Tree) -> None:
    """Each with one job, so that two compilers at work are two builds at work."""
    alone = 'mkdir "$TOOL_LOG.busy" || { echo "error: not alone"; exit 1; }\nsleep 0.2\nrmdir "$TOOL_LOG.busy"\nwhile'
    for name, script in (("c++", FAKE_COMPILER), ("nvcc", FAKE_NVCC)):
        faked.tool(name, script.replace("while", alone))
    environment = {**faked.environment, "MAX_JOBS": "1", "MNEMOS_BUILD": "require"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    builds = [subprocess.Popen(command, cwd=faked.root, env=environment) for _ in range(2)]
    assert [build.wait(120) for build in builds] == [0, 0]


def test_a_compiler_cache_is_not_named_to_nvcc(faked: Tree) -> None:
    faked.tool("ccache", FAKE_COMPILER)
    compiler = str(faked.tools / "c++")
    assert faked.build(CXX=f"ccache {compiler}").returncode == 0
    (line,) = (line for line in faked.calls("nvcc") if " -c " in line)
    assert f"-ccbin {compiler} " in line


def test_paths_with_spaces(tmp_path: Path) -> None:
    root = tmp_path / "a folder"
    root.mkdir()
    tree = Tree(root)
    tree.tool("c++", FAKE_COMPILER)
    tree.tool("nvcc", FAKE_NVCC)
    tree.fake_torch()
    done = tree.build(NVCC_RELEASE="13.0", MNEMOS_BUILD="require")
    assert done.returncode == 0, done.stderr
    assert tree.libraries == ["_native_cpu", "_native_cuda"]


def test_launch_refuses_another_value_in_one_line(tmp_path: Path) -> None:
    shutil.copy(ROOT / "launch.sh", tmp_path)
    done = subprocess.run(
        ["./launch.sh", "--setup-only"],
        cwd=tmp_path,
        env={**os.environ, "MNEMOS_BUILD": "maybe"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    one_line(done.stderr, "launch.sh: MNEMOS_BUILD is 'maybe': give auto, require or off")
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    ("build_says", "message"),
    [("a new reason", "MNEMOS_BUILD=require: a new reason"), ("", "pip failed: its error is above")],
    ids=["the build fails", "pip fails before it"],
)
def test_launch_says_why_a_required_build_failed_and_nothing_older(
    tmp_path: Path, build_says: str, message: str
) -> None:
    shutil.copy(ROOT / "launch.sh", tmp_path)
    pip = f"""#!/bin/sh
    case "$*" in
      *"--no-build-isolation"*)
        sleep 0.1
        [ -z "{build_says}" ] || echo '{{"warning": "{build_says}"}}' >"{tmp_path}/pipeline/_native_build.json"
        exit 1 ;;
      "-m pip "*) exit ;;
    esac
    exec "{sys.executable}" "$@"
    """
    for name, text in {
        "pipeline/_native_build.json": '{"warning": "an old reason"}',
        "constraints.txt": "torch==2.13.0",
        ".venv/bin/pip": f"{tmp_path}/.venv/bin/python",
        ".venv/bin/python": pip,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".venv/bin/python").chmod(0o755)
    environment = {**os.environ, "MNEMOS_BUILD": "require"}
    command = ["./launch.sh", "--setup-only"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"launch.sh: {message}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's own kernels, compiled for every architecture; what set-up compiled is taken over."""
    root = tmp_path_factory.mktemp("whole")
    for name in ("kernels", "build/native"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, root / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "pipeline/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"} | {"MNEMOS_BUILD": "require"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if re.search(r"nvcc is \S+ but torch was built for CUDA", done.stderr):
        # Such a toolkit builds nothing for this torch, as none would.
        environment["MNEMOS_BUILD"] = "auto"
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "pipeline"


def undefined(library: Path) -> list[str]:
    """Symbols that a library leaves to others, those of the C and C++ runtimes and weak ones left out."""
    text = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in text.stdout.splitlines() if line.split()[-2] == "U"]
    return [symbol for symbol in symbols if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC|LIBC)", symbol)]


def test_the_libraries_ask_nothing_of_torch_but_its_stable_abi(whole: Path) -> None:
    libraries = sorted(whole.glob("_native_*.so"))
    assert libraries
    for library in libraries:
        names = undefined(library)
        assert names
        assert [name for name in names if not re.match(r"(aoti_)?torch_", name)] == []


def test_the_cuda_library_holds_every_architecture(whole: Path) -> None:
    """Read from the fat binaries: a header, then entries that say their kind (2: machine code) and architecture."""
    report = json.loads((whole / "_native_build.json").read_text())
    facts = report["libraries"].get("cuda")
    libraries = list(whole.glob("_native_cuda*.so"))
    assert bool(libraries) == bool(facts and facts["built"])
    for library in libraries:
        data = library.read_bytes()
        binaries: list[set[int]] = []
        for match in re.finditer(re.escape(struct.pack("<I", 0xBA55ED50)), data):
            _, header, size = struct.unpack_from("<HHQ", data, match.start() + 4)
            at, end, found = match.start() + header, match.start() + header + size, set()
            while at < end:
                kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, at)
                if kind == 2:
                    found.add(struct.unpack_from("<I", data, at + 28)[0])
                at += entry_header + entry_size
            binaries.append(found)
        assert binaries
        expected = {int(re.sub(r"\D", "", name)) for name in facts["architectures"]}
        assert {80, 90} <= expected
        assert all(found == expected for found in binaries), binaries
