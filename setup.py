"""Package metadata, version ranges (constraints.txt pins what is tested), and the build of kernels/ into pipeline/.

Two libraries are built: ``pipeline/_native_cpu`` from every kernels/OP/schema.cpp and kernels/OP/cpu/*.cpp, and
``pipeline/_native_cuda`` from kernels/OP/cuda/*.cu where an nvcc is found. Neither needs a GPU, nor a torch that was
built for one: they use PyTorch's stable ABI, at the version of 2.10. torch is looked at, never imported: installing
without build isolation lets it be found. docs/kernels.md describes the switches:

    MNEMOS_BUILD           auto (build what can be built, warn of the rest), require (or fail), off
    TORCH_CUDA_ARCH_LIST   architectures, "8.0;9.0a;10.0;12.0" by default
    CXX, CUDA_HOME         the compilers
    MAX_JOBS               compilers at once
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = Path("build") / "native"  # kept between installs, so that only what changed is compiled
REPORT = "_native_build.json"
CONFIGS = "ds_configs"
COMMIT = "_commit"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
CACHES = ("ccache", "sccache")
OLDEST_ARCHITECTURE = (8, 0)  # bfloat16 in the tensor cores
# A device of 10.3 runs the binary of 10.0; nvcc 13.2 made wrong code for 10.3 itself. docs/kernels.md has the table of
# devices.
ARCHITECTURES = "8.0;9.0a;10.0;12.0"
TORCH_TARGET = (2, 10)

VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "pipeline" / "__init__.py").read_text(), re.M)
assert VERSION, "pipeline/__init__.py does not say __version__"

MODE = os.environ.get("MNEMOS_BUILD") or "auto"
if MODE not in ("auto", "require", "off"):
    raise SystemExit(f"MNEMOS_BUILD is {MODE!r}: give auto, require or off")


class NotBuilt(Exception):
    """Why a library is not built, and what to do about it."""


class NoTool(NotBuilt):
    """Nothing is wrong but that a tool is not there."""


def sources(kind: str) -> list[str]:
    patterns = ("*/schema.cpp", "*/cpu/*.cpp") if kind == "cpu" else ("*/cuda/*.cu",)
    return sorted(p.relative_to(ROOT).as_posix() for pattern in patterns for p in (ROOT / "kernels").glob(pattern))


def headers() -> list[str]:
    endings = (".h", ".hpp", ".cuh", ".inc")
    return sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*") if p.suffix in endings)


def digest() -> str:
    """Of everything that a library is made from."""
    text = hashlib.sha256()
    for name in sorted({*headers(), *sources("cpu"), *sources("cuda")}):
        text.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return text.hexdigest()


def find_torch() -> tuple[Path, str, str | None]:
    """Its folder, its version, and the version of CUDA that it was built for."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NoTool("torch is not there at build time: install it first, and give pip --no-build-isolation")
    folder = Path(spec.origin).parent
    facts = runpy.run_path(str(folder / "version.py"))
    version = str(facts["__version__"])
    if tuple(map(int, version.split(".")[:2])) < TORCH_TARGET:
        raise NotBuilt(f"torch {version} has no stable ABI: install 2.10 or newer")
    return folder, version, facts.get("cuda")


def find_compiler() -> list[str]:
    text = os.environ.get("CXX", "")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise NotBuilt(f"CXX is {text!r}, which cannot be split into words ({error}): close its quotes") from None
    if words:
        if all(Path(word).name in CACHES for word in words):
            raise NotBuilt(f"CXX is {text!r}, which names no compiler: add one, such as 'ccache g++'")
        if shutil.which(words[0]) is None:
            raise NotBuilt(f"CXX is {' '.join(words)!r}, which is not found: name a C++ compiler, or unset it")
        return words
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise NoTool("no C++ compiler: install g++ or clang++")


def find_ninja() -> str:
    # pip puts it next to a Python, maybe that of an outer environment, and neither need be on the PATH.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("ninja") or []:
            if file.name == "ninja" and (path := shutil.which(str(file.locate()))):
                return path
    if path := shutil.which("ninja"):
        return path
    raise NoTool("no ninja: pip install ninja")


def find_nvcc(torch_cuda: str | None) -> str | None:
    """None where a CUDA library is not expected: no nvcc, no CUDA_HOME that promises one, and no GPU to miss it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        if path := shutil.which("nvcc", path=str(Path(home) / "bin")):
            return path
        raise NotBuilt(f"CUDA_HOME is {home}, which has no bin/nvcc: name a CUDA toolkit, or unset it")
    if path := shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"):
        return path
    if torch_cuda and Path("/proc/driver/nvidia/version").exists():
        raise NoTool(f"no nvcc: install the CUDA toolkit {torch_cuda}, or name one in CUDA_HOME")
    return None


def ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotBuilt(f"{' '.join(command)} fails ({error})") from None


def check_nvcc(nvcc: str, torch_cuda: str | None) -> str:
    """Its version; a torch for the CPU alone takes any."""
    release = re.search(r"release (\d+)\.(\d+)", ask(nvcc, "--version"))
    if release is None:
        raise NotBuilt(f"{nvcc} --version does not say its release")
    version = f"{release[1]}.{release[2]}"
    if torch_cuda and torch_cuda.split(".")[0] != release[1]:
        raise NotBuilt(
            f"nvcc is {version} but torch was built for CUDA {torch_cuda}:"
            f" name a toolkit of {torch_cuda.split('.')[0]}.x in CUDA_HOME"
        )
    return version


def architectures(nvcc: str, version: str) -> list[str]:
    """What to compile for, as TORCH_CUDA_ARCH_LIST names it; the default is cut to what this nvcc knows."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    known = set(re.findall(r"sm_(\d+)", ask(nvcc, "--list-gpu-code")))
    chosen = []
    for word in re.split(r"[;,\s]+", text or ARCHITECTURES):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise NotBuilt(f"TORCH_CUDA_ARCH_LIST is {text!r}: {word!r} is no architecture such as 9.0a or 8.0+PTX")
        if match[1] + match[2] not in known:
            if text:
                raise NotBuilt(f"TORCH_CUDA_ARCH_LIST names {word}, which nvcc {version} does not know: leave it out")
            continue
        if (int(match[1]), int(match[2])) >= OLDEST_ARCHITECTURE:
            chosen.append(word)
    if not chosen:
        raise NotBuilt(f"TORCH_CUDA_ARCH_LIST is {text!r}: the kernels need 8.0 or newer")
    return chosen


def gencode(architecture: str) -> str:
    name, ptx = architecture.removesuffix("+PTX").replace(".", ""), architecture.endswith("+PTX")
    code = f"[sm_{name},compute_{name}]" if ptx else f"sm_{name}"
    return f"-gencode=arch=compute_{name},code={code}"


def jobs() -> int:
    text = os.environ.get("MAX_JOBS", "")
    if text.isdecimal() and int(text):
        return int(text)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Ninja:
    """A build file: one library per kind of device, and the objects that it is linked from."""

    def __init__(self, torch: Path, compiler: list[str]) -> None:
        self.compiler = self.quote(*compiler)
        # nvcc wants the compiler itself, without a cache in front of it.
        self.host = self.quote(next(word for word in compiler if Path(word).name not in CACHES))
        self.torch = torch
        target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}{0:012x}"
        self.flags = [
            *("-O3", "-std=c++20", "-DNDEBUG", "-DPy_LIMITED_API=0x030a0000", f"-DTORCH_TARGET_VERSION={target}"),
            *("-Ikernels", "-isystem", str(torch / "include")),
        ]
        self.lines = [f"builddir = {self.escape(BUILD.as_posix())}"]
        self.jobs = jobs()

    @staticmethod
    def escape(path: str) -> str:
        return re.sub(r"([$: ])", r"$\1", path)

    @staticmethod
    def quote(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def library(self, kind: str, rule: str, link: str) -> str:
        objects = []
        for source in sources(kind):
            objects.append(self.escape((BUILD / f"{source}.o").as_posix()))
            self.lines.append(f"build {objects[-1]}: {rule} {self.escape(source)}")
        output = (BUILD / f"_native_{kind}.so").as_posix()
        self.lines.append(f"build {self.escape(output)}: {link} {' '.join(objects)}")
        return output

    def cpu(self) -> str:
        # ISO mode forbids the contraction of a product and a sum to one FMA, which the GNU mode allows.
        own = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
        self.rule("cxx", f"{self.compiler} {self.quote(*self.flags, *own)} -MD -MF $out.d -c $in -o $out")
        libraries = self.quote(f"-L{self.torch / 'lib'}", "-ltorch_cpu")
        self.rule("link_cpu", f"{self.compiler} -shared $in -o $out {libraries}", depfile=False)
        return self.library("cpu", "cxx", "link_cpu")

    def cuda(self, nvcc: str, archs: list[str]) -> str:
        own = ["-DUSE_CUDA", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        # What nvcc may run beside itself is taken from what ninja may, so that all of them are MAX_JOBS at most.
        files = len(sources("cuda"))
        threads = max(1, min(len(archs), jobs() // files))
        self.jobs -= files * (threads - 1)
        own += [f"--threads={threads}"]
        start = f"{self.quote(nvcc)} -ccbin {self.host} {self.quote(*map(gencode, archs))}"
        self.rule("nvcc", f"{start} {self.quote(*self.flags, *own)} -MD -MF $out.d -c $in -o $out")
        # What only a torch built for CUDA has (its streams) is in libtorch_cuda, which need not be here: an empty
        # library of that name makes the loader look there.
        stub = BUILD / "stub" / "libtorch_cuda.so"
        make_stub = f"{self.compiler} -shared -nostdlib -x c++ /dev/null -o $out -Wl,-soname,libtorch_cuda.so"
        self.rule("stub", make_stub, depfile=False)
        self.lines.append(f"build {self.escape(stub.as_posix())}: stub")
        folders = [f"-L{stub.parent}", f"-L{self.torch / 'lib'}"]
        needed = [*folders, "-Xlinker=--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"]
        self.rule("link_cuda", f"{start} -shared -cudart=static $in -o $out {self.quote(*needed)}", depfile=False)
        output = self.library("cuda", "nvcc", "link_cuda")
        self.lines[-1] += f" | {self.escape(stub.as_posix())}"
        return output

    def run(self, ninja: str, outputs: dict[str, str], again: bool) -> dict[str, str]:
        """Build the outputs, by kind, also what is up to date if ``again``; returns what went wrong, by kind."""
        command = [ninja, "-f", (BUILD / "build.ninja").as_posix(), "-j", str(self.jobs)]
        (ROOT / BUILD / "build.ninja").write_text("\n".join(self.lines) + "\n")
        if again:
            subprocess.run([*command, "-t", "clean"], cwd=ROOT, capture_output=True, check=True)
        with (ROOT / BUILD / "build.log").open("w") as log:

            def failure(*targets: str) -> str | None:
                done = subprocess.run([*command, "-k", "0", *targets], cwd=ROOT, capture_output=True, text=True)
                text = done.stdout + done.stderr
                log.write(text)
                if done.returncode == 0:
                    print(text, end="", flush=True)
                    return None
                wrong = re.search(r"^.*\b(error|undefined reference|cannot find)\b.*$", text, re.MULTILINE)
                return (wrong[0] if wrong else text.strip().rpartition("\n")[2]).strip()

            if failure(*outputs.values()) is None:
                return {}
            # Each again by itself: one may be whole although the other is not.
            return {kind: f"{wrong} (see {BUILD}/build.log)" for kind, o in outputs.items() if (wrong := failure(o))}


def build(again: bool, problem: NotBuilt | None) -> dict[str, dict]:
    """Build what can be built: per kind its file, or the reason why there is none, and what it was built with.

    ``problem`` is one that was found before, and leaves nothing to build.
    """
    libraries: dict[str, dict] = {kind: {"built": False, "reason": None} for kind in DEVICES if sources(kind)}
    if MODE == "off":
        for library in libraries.values():
            library["reason"] = "MNEMOS_BUILD=off"
        return libraries
    outputs: dict[str, str] = {}
    try:
        if problem is not None:
            raise problem
        compiler, ninja, (torch, torch_version, torch_cuda) = find_compiler(), find_ninja(), find_torch()
        file = Ninja(torch, compiler)
        if "cpu" in libraries:
            libraries["cpu"] |= {"compiler": ask(*compiler, "--version").partition("\n")[0], "torch": torch_version}
            outputs["cpu"] = file.cpu()
    except NotBuilt as error:
        for library in libraries.values():
            library |= {"reason": str(error), "no_tool": isinstance(error, NoTool)}
        return libraries
    if "cuda" in libraries:
        try:
            nvcc = find_nvcc(torch_cuda)
            if nvcc is None:
                libraries["cuda"]["no_tool"] = True
            else:
                version = check_nvcc(nvcc, torch_cuda)
                archs = architectures(nvcc, version)
                libraries["cuda"] |= {"compiler": f"nvcc {version}", "torch": torch_version, "architectures": archs}
                outputs["cuda"] = file.cuda(nvcc, archs)
        except NotBuilt as error:
            libraries["cuda"] |= {"reason": str(error), "no_tool": isinstance(error, NoTool)}
    try:
        wrong = file.run(ninja, outputs, again) if outputs else {}
    except (OSError, subprocess.CalledProcessError) as error:
        wrong = dict.fromkeys(outputs, f"the build does not run: {error}")
    for kind, output in outputs.items():
        libraries[kind]["reason"] = wrong.get(kind)
        if kind not in wrong:
            libraries[kind] |= {"built": True, "file": output}
    return libraries


def summary(libraries: dict[str, dict]) -> str | None:
    """One line on what is missing, why, and what it costs; None when nothing is."""
    missing: dict[str, list[str]] = {}
    for kind, library in libraries.items():
        if library["reason"]:
            missing.setdefault(library["reason"], []).append(DEVICES[kind])
    if not missing:
        return None
    ops = " and ".join(sorted(path.parent.name for path in (ROOT / "kernels").glob("*/schema.cpp")))
    if MODE == "off":
        return f"native kernels are off (MNEMOS_BUILD=off): {ops} will be slow, on PyTorch"
    what = "; ".join(f"for the {' and the '.join(devices)} ({reason})" for reason, devices in missing.items())
    again = "mnemos installed again (in a checkout: ./launch.sh --setup-only)"
    slow = f"{ops} will be slow there, on PyTorch, until that is fixed and {again}"
    return f"native kernels are not built {what}: {slow}"


class BuildNative(build_ext):
    def run(self) -> None:
        problem = None
        with contextlib.ExitStack() as held:
            # Two builds at once take turns until what is installed and what the report says are of the same one.
            try:
                (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
                fcntl.flock(held.enter_context((ROOT / BUILD / "lock").open("w")), fcntl.LOCK_EX)
            except OSError as error:
                problem = NotBuilt(f"{BUILD} is no folder to write to ({error.strerror}): move away what is there")
            self.update(problem)

    def update(self, problem: NotBuilt | None) -> None:
        """Build, install and report."""
        targets = {e.name.rpartition("_")[2]: Path(self.get_ext_fullpath(e.name)) for e in self.extensions}
        report = targets["cpu"].parent / REPORT
        report.parent.mkdir(parents=True, exist_ok=True)
        libraries = build(bool(self.force), problem)
        if MODE == "auto":
            self.keep(libraries, targets, report)
        message = summary(libraries)
        facts = {"mode": MODE, "sources": digest(), "libraries": libraries, "warning": message}
        if message and MODE == "require":
            # What is installed stays, and so does what the report says of it.
            before = self.read(report)
            for kind, library in tuple(libraries.items()):
                kept = before.get("libraries", {}).get(kind) if targets[kind].exists() else None
                libraries[kind] = kept or library | {"built": False}
            facts["sources"] = before.get("sources")
            report.write_text(json.dumps(facts, indent=2) + "\n")
            raise SystemExit(f"MNEMOS_BUILD=require: {message}")
        for kind, target in targets.items():
            for old in target.parent.glob(f"_native_{kind}*.so"):
                if old != target or not libraries.get(kind, {}).get("built"):
                    old.unlink(missing_ok=True)
            if "file" in libraries.get(kind, {}):
                self.install(ROOT / libraries[kind].pop("file"), target)
        report.write_text(json.dumps(facts, indent=2) + "\n")
        if message:
            print(f"warning: {message}", file=sys.stderr)

    @staticmethod
    def read(report: Path) -> dict:
        """What an earlier build wrote; empty where none did."""
        with contextlib.suppress(OSError, ValueError):
            facts = json.loads(report.read_text())
            if isinstance(facts, dict):
                return facts
        return {}

    @staticmethod
    def keep(libraries: dict[str, dict], targets: dict[str, Path], report: Path) -> None:
        """Leave a library alone that cannot be built again, but was built from these very sources."""
        before = BuildNative.read(report)
        with contextlib.suppress(KeyError, TypeError):
            if before["sources"] == digest():
                for kind, library in libraries.items():
                    if library.get("no_tool") and before["libraries"][kind]["built"] and targets[kind].exists():
                        libraries[kind] = before["libraries"][kind]

    @staticmethod
    def install(built: Path, target: Path) -> None:
        # A new file under the old name: one that a running process has mapped must not change.
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as copy:
            copy.write(built.read_bytes())
        os.chmod(copy.name, 0o755)
        os.replace(copy.name, target)

    def get_outputs(self) -> list[str]:
        targets = [Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions]
        return [str(path) for path in (*targets, targets[0].parent / REPORT) if path.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        # Built where they belong, never moved there.
        return {}


class BuildPackage(build_py):
    """The package as it is installed: with what lies beside it in a checkout (pipeline/host/package.py finds both)."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in self.beside().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        self.commit_file().parent.mkdir(parents=True, exist_ok=True)
        self.commit_file().write_text(f"{commit()}\n")

    def beside(self) -> dict[Path, Path]:
        """Files of the checkout, and where they are in the package."""
        package = Path(self.build_lib) / "pipeline"
        return {path: package / CONFIGS / path.name for path in sorted((ROOT / CONFIGS).glob("*.json"))}

    def commit_file(self) -> Path:
        return Path(self.build_lib) / "pipeline" / COMMIT

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        own = [] if self.editable_mode else [*self.beside().values(), self.commit_file()]
        return [*super().get_outputs(include_bytecode), *map(str, own)]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(path.relative_to(ROOT).as_posix() for path in self.beside())]


def commit() -> str:
    """That of the checkout, with `+` when files differ from it; empty outside a checkout."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        head, changes = (ask("git", "-C", str(ROOT), *words) for words in (["rev-parse", "HEAD"], ["status", "-s"]))
    except NotBuilt:
        return ""
    return head + ("+" if changes else "")


# `make lowest` runs the tests with the lower bounds, which have binaries for Python 3.10 to 3.12.
REQUIREMENTS = [
    "datasets>=5.0",
    # Frozen parameters under activation checkpointing, sequence-parallel checkpoints and the gradients of a compiled
    # all-to-all are right from 0.19.8 on.
    "deepspeed>=0.19.8",
    "einops>=0.8",
    # Older releases warn of pyparsing 3.3 at the first picture.
    "matplotlib>=3.10.7",
    "ninja>=1.11",
    "numpy>=2.0",
    "psutil>=6.0",
    "pydantic>=2.11",
    "pyyaml>=6.0.1",
    "requests>=2.32.2",
    "safetensors>=0.8",
    "xxhash>=3.4",
    "sentencepiece>=0.2",
    "tensorboard>=2.18",
    # Older releases have known ways around `weights_only`. A vendor's build of 2.10 calls itself 2.10.0a0+something.
    "torch>=2.10.0.dev0",
    "tqdm>=4.66.3",
    "transformers>=5.17",
    "tyro>=1.0",
]

EXTRAS = {
    "dev": [
        # The tests read a GGUF file.
        "accelerate>=1.10",
        "gguf>=0.17",
        # The tests' token loop that was not written here. It brings einops alone: Triton is an extra of its own.
        "fla-core>=0.6",
        "hypothesis>=6.100",
        # The tests execute notebooks.
        "ipykernel>=6.29",
        # The tests run tasks of the harness.
        "lm-eval>=0.4.13",
        "modlamp>=4.3.3",
        "mypy>=2.0",
        "nbclient>=0.10",
        "pytest>=9.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.8",
        "rapidfuzz>=3.9",
        "ruff>=0.17",
        "types-psutil>=6.0",
        "types-PyYAML>=6.0",
    ],
    # Older releases load tasks by other names.
    "eval": ["lm-eval>=0.4.13"],
    "flash": ["flash-attn>=2.8"],
    # transformers reads GGUF files with them.
    "gguf": ["accelerate>=1.10", "gguf>=0.17"],
    # Clusters of peptides, and a set of antimicrobial ones.
    "mimir": ["modlamp>=4.3.3", "rapidfuzz>=3.9"],
    "wandb": ["wandb>=0.20"],
}

setup(
    name="mnemos",
    version=VERSION.group(1),
    description="Language models that remember, trained on one DeepSpeed engine",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The Mnemos contributors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "deepspeed",
        "language model",
        "linear attention",
        "long context",
        "memory",
        "test-time training",
        "titans",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["pipeline", "pipeline.*"]),
    package_data={"pipeline.export": ["*.md"]},
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mnemos = pipeline.cli:main"]},
    ext_modules=[
        Extension(f"pipeline._native_{kind}", sources(kind), depends=headers(), py_limited_api=True, optional=True)
        for kind in DEVICES
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
