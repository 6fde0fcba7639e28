"""What each stage of `make gpu` does: one process a step, each with its time limit and what it needs."""

from __future__ import annotations

from pipeline.bench.gpu.checks import all_passed, flex_passed, has_both_passes, kernels_checked
from pipeline.bench.gpu.step import PYTHON, RESULT, SCRATCH, Step
from pipeline.bench.gpu.target import Target

STAGES = ("correct", "speed", "train")
OPS = ("torch", "einops")
TESTS = ("pytest", "pytest_timeout", "einops")
BENCH = ("tyro", "numpy", "einops")
ENGINE = (
    *BENCH,
    *("deepspeed", "transformers", "datasets", "safetensors", "pydantic", "psutil", "xxhash", "yaml"),
)

PEERLESS: tuple[str, ...] = ("torch",)
"""What is timed beside the native kernel, but for peers."""
PEER_MODULES = {
    "fla-gated-delta": ("fla", "triton"),
    "fla-momentum": ("fla", "triton"),
    "titans-pytorch": ("titans_pytorch",),
}


def pytest(*words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", f"--junitxml={RESULT}", "-p", "no:cacheprovider", *words)


def module(name: str, *words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", name, *words)


def steps_of(stage: str, target: Target) -> list[Step]:
    """The steps of a stage on a GPU, or their small forms where the emulator stands in for one.

    Every stage begins with the build, since each may be the first on its machine; it is short when up to date.
    """
    return [_build(target), *{"correct": _correct, "speed": _speed, "train": _train}[stage](target)]


def all_steps(target: Target) -> list[tuple[str, Step]]:
    """Every step with its stage."""
    return [(stage, step) for stage in STAGES for step in steps_of(stage, target)]


def _correct(target: Target) -> list[Step]:
    """The cheapest and most informative steps come first."""
    versions = Step(
        "versions", "which driver, compiler and packages it was", module("pipeline.bench.gpu.device", RESULT), 60,
        needs=("torch",), writes="json",
    )  # fmt: skip
    doctor = Step(
        "doctor", "every kernel agrees with PyTorch on the device at its first use",
        module("pipeline", "doctor", "--json", RESULT), 120, needs=OPS, writes="json",
        check=None if target.emulated else kernels_checked,
    )  # fmt: skip
    training = Step(
        "training step", "loss and gradient norm of one step in bfloat16 beside float32",
        module("pipeline.bench.gpu.precision", RESULT, *_small_model(target)), 150, needs=ENGINE, writes="json",
    )  # fmt: skip
    if target.emulated:
        return [versions, doctor, *_emulated_tests(), training]
    return [versions, doctor, *_scan_tests(), training, *_other_tests()]


def _build(target: Target) -> Step:
    if target.emulated:
        # Up to date after set-up; what is installed stays as it is.
        where: tuple[str, ...] = ("--build-lib", SCRATCH)
        environment: dict[str, str] = {}
    else:
        where = ("--inplace",)
        environment = {"MNEMOS_BUILD": "require", "TORCH_CUDA_ARCH_LIST": target.architecture}
    return Step(
        "build", "the kernels compile for the device", (PYTHON, "setup.py", "--quiet", "build_ext", *where), 300,
        needs=("setuptools",), environment=environment, always=True,
    )  # fmt: skip


SCAN_TESTS = ("tests/gpu/test_miras_scan_cuda.py", "tests/gpu/test_affine_scan_cuda.py")
STEP_TESTS = "tests/gpu/test_memory_step_cuda.py"
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no", "--tool")
"""Errors that the CUDA API returns are left out: PyTorch asks for functions that a driver may not have."""


def _scan_tests() -> list[Step]:
    return [
        Step(
            "scans", "values and gradients of both scans against the float64 token loop",
            pytest("-m", "gpu and not full_size", *SCAN_TESTS), 200, needs=TESTS, writes="junit", check=all_passed,
        ),
        Step(
            "memory step", "one token of the memory against the float64 token loop",
            pytest("-m", "gpu", STEP_TESTS), 60, needs=TESTS, writes="junit", check=all_passed,
        ),
        Step(
            "slots", "what is stored and attended in slots against float64 on the CPU",
            pytest("-m", "gpu", "tests/gpu/test_slots_cuda.py"), 60, needs=TESTS, writes="junit", check=all_passed,
        ),
        Step(
            "scans at full size", "64K tokens, 16 heads of 128: the time, and the PyTorch path at 20K tokens",
            pytest("-m", "gpu and full_size", *SCAN_TESTS), 120, needs=TESTS, writes="junit", check=all_passed,
        ),
    ]  # fmt: skip


def _other_tests() -> list[Step]:
    attention = [
        Step(
            f"{kind} attention", f"FlexAttention and flash-attention, {kind}, against attention in float64",
            pytest("-m", "gpu", "-k", words, "tests/gpu/test_attention_backends.py"), 120, needs=TESTS, writes="junit",
            check=flex_passed,
        )
        for kind, words in (("full", "full_attention"), ("window", "window"))
    ]  # fmt: skip
    lost = Step(
        "lost device", "a kernel that breaks its GPU ends the run with one line",
        pytest("-m", "gpu", "tests/gpu/test_lost_device.py"), 90, needs=TESTS, writes="junit", check=all_passed,
    )  # fmt: skip
    sanitizers = [
        Step(
            tool, f"no error that compute-sanitizer's {tool} sees in small cases of both scans and of the memory step",
            (*SANITIZER, tool, *pytest("-m", "gpu and small", *SCAN_TESTS, STEP_TESTS)), 90, needs=TESTS,
            tools=("compute-sanitizer",), writes="junit", check=all_passed,
            # In PyTorch's cache, a write past the end of a block may stay within the cache, which is no error to it.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in ("memcheck", "racecheck", "initcheck")
    ]  # fmt: skip
    return [*attention, lost, *sanitizers]


def _emulated_tests() -> list[Step]:
    return [
        Step(
            "scans", "values and gradients in the emulator against the float64 token loop",
            pytest("tests/kernels/test_affine_scan_emulated.py", "-k", "saved_on_demand"), 200, needs=TESTS,
            writes="junit", check=all_passed,
        ),
        Step(
            "memcheck", "no error that compute-sanitizer's memcheck sees", ("compute-sanitizer", "--version"), 90,
            tools=("compute-sanitizer",),
        ),
        Step(
            "attention", "attention on the CPU against attention in float64",
            pytest("tests/ops/test_attention.py", "-k", "empty_carry"), 150, needs=TESTS, writes="junit",
            check=all_passed,
        ),
    ]  # fmt: skip


def _small_model(target: Target) -> tuple[str, ...]:
    """One rank."""
    flags = ("miras_tiny", "--parallel.sequence", "1")
    return (*flags, "--batch-size", "1", "--sequence-length", "128") if target.emulated else flags


def _speed(target: Target) -> list[Step]:
    """Our own figures first: peers compile for minutes."""
    if target.emulated:
        shapes: tuple[str, ...] = ("1x256x2x32",)
        native, dtype, rest = "cpu", "float32", PEERLESS
    else:
        shapes = ("1x8Kx16x128", "1x64Kx16x128")
        native, dtype, rest = "cuda", "bfloat16", (*PEERLESS, *PEER_MODULES)
    ceilings = Step(
        "ceilings", "the device's own limits: copies, and matrix products",
        module("pipeline.bench.gpu.ceilings", RESULT), 60, needs=OPS, writes="json",
    )  # fmt: skip
    times = [
        Step(
            f"kernel times {shape}", "every kernel of the memory op by the profiler, beside its prediction",
            module("pipeline.bench.gpu.kernel_times", RESULT, shape, dtype), 60, needs=BENCH, writes="json",
        )
        for shape in shapes
    ]  # fmt: skip
    affine = Step(
        f"affine_scan {shapes[-1]}", "the elementwise scan, bytes/s",
        bench_kernels("--ops", "affine_scan", "--shapes", shapes[-1], "--dtype", dtype, "--backends", native), 60,
        needs=BENCH, writes="json", check=has_both_passes, measures=True,
    )  # fmt: skip
    warm_up = [
        Step(
            f"{name} compiles", f"{name} runs at all; its kernels are compiled and kept",
            bench_kernels("--shapes", shapes[0], "--dtype", dtype, "--repeats", "1", *_only(name)), 150,
            needs=(*BENCH, *PEER_MODULES[name]), writes="json", check=has_both_passes, measures=True, peer=True,
        )
        for name in rest if name in PEER_MODULES and name.startswith("fla")
    ]  # fmt: skip
    return [
        ceilings, *(_contender(native, shape, dtype) for shape in shapes), *times, affine, *warm_up,
        *(_contender(name, shape, dtype) for shape in shapes for name in rest),
    ]  # fmt: skip


def _contender(name: str, shape: str, dtype: str) -> Step:
    return Step(
        f"{name} {shape}", f"the memory op by {name}, forward and backward, {dtype}",
        bench_kernels("--shapes", shape, "--dtype", dtype, *_only(name)), 60,
        needs=(*BENCH, *PEER_MODULES.get(name, ())), writes="json", check=has_both_passes, measures=True,
        peer=name in PEER_MODULES,
    )  # fmt: skip


def bench_kernels(*words: str) -> tuple[str, ...]:
    return module("pipeline", "bench", "kernels", "--json", RESULT, *words)


def _only(name: str) -> tuple[str, ...]:
    """The flags that time one contender alone."""
    return ("--backends", "none", "--peers", name) if name in PEER_MODULES else ("--backends", name, "--peers", "none")


ATTENTION = {
    "window": "window attention", "full": "full attention", "slots": "window attention and slots",
    "distillation": "window attention and slots, with full attention as the teacher",
    "compiled": "window attention, with --compile",
}  # fmt: skip
"""What a step of training attends with, in words."""


def _train(target: Target) -> list[Step]:
    """The recipes' own sizes, and a short training."""
    if target.emulated:
        runs: list[tuple[str, int, tuple[str, ...]]] = [
            ("window", 256, ("miras_tiny", "--parallel.sequence", "1", "--batch-size", "1"))
        ]
        dense: list[tuple[str, tuple[str, ...]]] = [("dense", ("olmo_tiny", "--batch-size", "1"))]
        tokens = 128
        recall: tuple[str, ...] = ("--sequence-length", "128", "--batch-size", "2", "--data.recall.max-gap", "100")
    else:
        # Random weights, and the longest texts that are on every machine. A document fills the sequence, or attention
        # would reach less far than the FLOPs that are counted.
        common = (
            "miras_64k", "--batch-size", "1", "--model.backbone.pretrained", "None", "--data.dataset", "stdlib",
            "--data.tokenizer", "bytes",
        )  # fmt: skip
        runs = [
            (kind, length, (*common, "--data.min-tokens", str(length), "--model.attention.kind", kind))
            for length in (65_536, 131_072) for kind in ("window", "full")
        ]  # fmt: skip
        # Memory on every layer, as for a pretrained backbone whose window is a part of what it was trained at.
        slots = ("--model.attention.window", "1024", "--model.memory.attachment", "slots", "--model.memory.layers",
                 "every1", "--model.memory.slots.count", "512", "--model.memory.slots.chunk", "256")  # fmt: skip
        runs.append(("slots", 65_536, (*common, "--data.min-tokens", "65536", *slots)))
        runs.append(("distillation", 65_536, (*common, "--data.min-tokens", "65536", *slots, "--model.distil", "full")))
        runs.append(("compiled", 65_536, (*common, "--data.min-tokens", "65536", "--compile")))
        recall = ()
        # The rows of one micro-batch of the recipe. Texts are joined up, so that every sequence is full.
        texts = ("--data.dataset", "stdlib", "--data.tokenizer", "bytes", "--grad-accum", "1", "--zero", "zero0")
        dense = [("dense", ("olmo_1b", *texts)), ("dense, compiled", ("olmo_1b", *texts, "--compile"))]
        tokens = 2048
    pretraining = [
        Step(
            f"throughput {name}", f"tokens/s, MFU and peak memory of pretraining at {tokens} tokens, {name}",
            module(
                "pipeline", "bench", "throughput", "--lengths", str(tokens), "--bench-steps", "10", "--json", RESULT,
                *flags,
            ),
            150, needs=ENGINE, writes="json", measures=True,
        )
        for name, flags in dense
    ]  # fmt: skip
    throughput = [
        Step(
            f"throughput {length // 1024 or length}{'K' if length >= 1024 else ''} {kind}",
            f"tokens/s, MFU and peak memory of training steps, {ATTENTION[kind]}",
            module(
                "pipeline", "bench", "throughput", "--lengths", str(length), "--bench-steps", "3", "--json", RESULT,
                *flags,
            ),
            150, needs=ENGINE, writes="json", measures=True,
        )
        for kind, length, flags in runs
    ]  # fmt: skip
    steps = 200 if not target.emulated else 2
    remembering = Step(
        "recall", f"recall beyond the window after {steps} steps on the device",
        module("pipeline.bench.gpu.recall", RESULT, SCRATCH, "--steps", str(steps), *recall), 120, needs=ENGINE,
        writes="json",
    )  # fmt: skip
    return [*throughput[:2], remembering, *pretraining, *throughput[2:]]
