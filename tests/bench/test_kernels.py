"""The bench of kernels counts what it says, takes turns, leaves nobody out in silence, and refuses in one line."""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.bench import contenders, kernel_memory, kernel_ops, kernel_timing, kernels, peers
from pipeline.bench.contenders import relative_error
from pipeline.bench.kernel_ops import CHUNK, Op, Shape, memory_inputs, ops, parse_shape
from pipeline.cli import main
from pipeline.errors import UserError
from tests.launch.harness import environment, single
from tests.ops.fla_oracle import needs_fla_core

CPU = torch.device("cpu")
CEILING = kernels.Roof(1e12, 1e12, "stated")
OPS = ("miras_scan", "affine_scan", "slot_attention")
SMALL = ("--shapes", "1x4Kx2x32", "2x70x1x32", "--repeats", "3", "--threads", "1", "--peers", "none")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    out = tmp_path_factory.mktemp("bench") / "kernels.json"
    done = single("pipeline", "bench", "kernels", *SMALL, "--ops", *OPS, "--json", str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_every_op_shape_backend_and_pass_is_measured(small: tuple[dict, str]) -> None:
    found, _ = small
    native = {row["backend"] for row in found["rows"]} & {"cpu"}
    expected = [
        (op, shape, backend, each)
        for op in OPS
        for shape in ("1x4096x2x32", "2x70x1x32")
        for backend in ("torch", *native)
        for each in ("forward", "forward+backward")
    ]
    rows = [(row["op"], row["shape"], row["backend"], row["pass"]) for row in found["rows"]]
    assert [row for row in rows if row[2] in ("torch", "cpu")] == expected
    if not native:
        assert any(note.startswith("cpu at 1x4096x2x32: ") for note in found["notes"])


def test_figures_agree_with_each_other(small: tuple[dict, str]) -> None:
    found, _ = small
    roof = found["roof"]
    assert roof["flops"] > 1e9 and roof["bandwidth"] > 1e8 and roof["source"].startswith("measured")
    for row in found["rows"]:
        shape = parse_shape(row["shape"])
        assert 0 < row["best"] <= row["low"] <= row["seconds"] <= row["high"]
        assert row["samples"] == 3
        assert row["us_per_token"] == pytest.approx(1e6 * row["seconds"] / (shape.batch * shape.tokens))
        if row["backend"] not in ("torch", "cpu"):
            continue
        assert row["flop_s"] == pytest.approx(row["flops"] / row["seconds"])
        assert row["byte_s"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["roof"] == pytest.approx(max(row["flop_s"] / roof["flops"], row["byte_s"] / roof["bandwidth"]))
        assert row["error"] < 1e-5
        if sys.platform == "linux" and row["pass"] == "forward+backward" and row["shape"] == "1x4096x2x32":
            # Inputs, output and all their gradients at least.
            assert 1.9 < row["memory"] < 100
        else:
            assert row["memory"] is None


def test_the_table_names_the_machine_and_fits_a_terminal(small: tuple[dict, str]) -> None:
    found, text = small
    assert found["versions"]["torch"] and found["machine"]["threads"] == 1 and found["machine"]["vectors"]
    assert f"torch {found['versions']['torch']}" in " ".join(text.split())
    assert "1 threads" in text and "miras_scan 2x70x1x32 float32" in text
    assert max(map(len, text.splitlines())) <= 100


@given(st.integers(1, 9), st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 256))
def test_a_shape_is_read_as_it_is_written(batch: int, tokens: int, heads: int, dim: int) -> None:
    shape = Shape(batch, tokens, heads, dim)
    assert parse_shape(str(shape)) == shape
    assert shape.vectors == batch * tokens * heads


def test_k_is_1024() -> None:
    assert parse_shape("1x64Kx16x128") == Shape(1, 65_536, 16, 128)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--shapes", "8192"), "--shapes has '8192': write batch x tokens x heads x head dimension, as in 1x8192x4x64"),
        (("--shapes", "1x0x4x64"), "--shapes has '1x0x4x64'"),
        (("--shapes", "1x64x4x64", "1x1x1"), "--shapes has '1x1x1'"),
        (("--ops", "softmax"), "--ops has 'softmax': one of miras_scan, "),
        (("--backends", "tpu"), "--backends has 'tpu': one of torch, cpu, cuda"),
        (("--backends", "torch", "cuda"), "--backends has 'cuda': this run computes on the CPU"),
        (("--ops", "yaad", "--backends", "cpu"), "--backends has 'cpu': yaad has torch"),
        (("--dtype", "float16"), "--dtype is 'float16': one of float32, bfloat16"),
        (("--repeats", "0"), "--repeats is 0: give a number above 0"),
        (("--threads", "-1"), "--threads is -1: "),
        (("--pieces", "4", "1"), "--pieces has 1: give numbers above 1"),
        (("--peers", "mamba"), "--peers has 'mamba': one of titans-pytorch, "),
        (("--json", "/nowhere/at/all.json"), "--json /nowhere/at/all.json: there is no folder /nowhere/at"),
        (("--colour", "blue"), "--colour"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["bench", "kernels", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1 and not captured.out


def test_a_backend_that_was_asked_for_and_does_not_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(x: list[Tensor], backend: str) -> Tensor:
        raise ValueError("backend 'cpu' cannot run: it is not built")

    broken = Op("miras_scan", ("torch", "cpu", "cuda"), memory_inputs, call, None)
    monkeypatch.setattr(kernels, "ops", lambda: {"miras_scan": broken})
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["bench", "kernels", "--backends", "cpu"]) == 2
    assert "--backends has 'cpu': miras_scan: backend 'cpu' cannot run: it is not built" in capsys.readouterr().err


def test_every_shape_is_checked_with_a_backend_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(x: list[Tensor], backend: str) -> Tensor:
        if x[0].shape[-1] != 32:
            raise ValueError("key dim is not 32")
        return x[0] * x[1]

    narrow = Op("miras_scan", ("torch", "cpu", "cuda"), memory_inputs, call, None)
    monkeypatch.setattr(kernels, "ops", lambda: {"miras_scan": narrow})
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["bench", "kernels", "--backends", "cpu", "--shapes", "1x8x1x32", "1x8x1x48"]) == 2
    assert "--backends has 'cpu': miras_scan: key dim is not 32" in capsys.readouterr().err


def test_a_bench_without_a_name_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert "one of throughput, dense, kernels, decode, resume, report (got 'none')" in capsys.readouterr().err


def test_the_count_of_the_exact_rule_is_that_of_its_products() -> None:
    """A chunk: C tokens, J states; a product of [a, b] with [b, c] is 2 a b c FLOPs."""
    c, d = CHUNK, 48

    def product(a: int, b: int, columns: int) -> int:
        return 2 * a * b * columns

    for states in (1, 2):
        residuals = states * product(c, d, d)  # K M, K S
        reads = states * product(c, d, d)
        updates = states * product(d, c, d)
        squares = 2 * product(c, d, c)  # K K^T, Q K^T
        forward = residuals + reads + updates + squares + 2 * product(c, c, d) + c**3  # solve, A R, inverse
        from_updates, to_updates = states * product(c, d, d), states * product(c, d, d)  # dR and dK of the updates
        grads = states * (product(c, d, d) + product(c, d, d) + 2 * product(d, c, d))  # dQ, dK by M; dM by y and R
        # dA, A^T dO, (I + T)^-T dR, dP K, dP^T Q, (X + X^T) K, dT
        backward = from_updates + to_updates + grads + squares + 7 * product(c, c, d) + c**3
        found = kernel_ops.exact_flops(Shape(1, c, 1, d), states)
        assert found == (forward, backward)


def test_bytes_are_those_of_the_tensors() -> None:
    op, shape = ops()["miras_scan"], Shape(2, 100, 3, 32)
    for dtype, element in ((torch.float32, 4), (torch.bfloat16, 2)):
        inputs = memory_inputs(shape, dtype, CPU)
        y = op.call(inputs, "torch")
        size = sum(x.nbytes for x in inputs)
        assert op.moved(shape, dtype) == (size + y.nbytes, 2 * size + y.nbytes)
        assert size + y.nbytes == shape.vectors * (4 * 32 * element + 12)


@pytest.mark.parametrize("name", ops())
def test_every_op_runs_on_pytorch_and_agrees_with_float64(name: str) -> None:
    op = ops()[name]
    assert relative_error(op, "torch", Shape(1, 64, 2, 16), torch.float32, CPU) < 1e-5
    for x in op.inputs(Shape(1, 64, 2, 16), torch.float32, CPU):
        assert x.is_leaf and x.requires_grad


def test_a_wrong_backend_shows_in_the_error() -> None:
    def call(x: list[Tensor], backend: str) -> Tensor:
        y = ops()["miras_scan"].call(x, "torch")
        return {"torch": y, "off": y * 1.01, "broken": y * math.nan}[backend]

    op = Op("miras_scan", ("torch",), memory_inputs, call, None)
    shape = Shape(1, 40, 1, 8)
    assert relative_error(op, "off", shape, torch.float32, CPU) == pytest.approx(0.01, rel=0.01)
    assert math.isnan(relative_error(op, "broken", shape, torch.float32, CPU))


def test_contenders_take_turns_and_a_slow_one_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def contender(name: str, seconds: float):
        def work() -> None:
            calls.append(name)
            clock[0] += seconds

        return work

    monkeypatch.setattr(kernel_timing.time, "perf_counter", lambda: clock[0])
    samples: list[list[float]] = [[], [], []]
    works = [contender("quick", 0.002), contender("even", 0.1), contender("slow", 9.0)]
    plans = dict(zip("qes", zip(works, samples, strict=True), strict=True))
    assert kernel_timing.sample(plans, 7, CPU, lambda name, error: False) == set()
    # Two calls each to warm up and to see how long one takes.
    turns = "".join(name[0] for name in calls[6:])
    assert calls[:6] == ["quick"] * 2 + ["even"] * 2 + ["slow"] * 2
    assert turns == "qqqes" * 3 + "qqqe" * 4
    assert [len(x) for x in samples] == [7, 7, 3]
    for x, seconds in zip(samples, (0.002, 0.1, 9.0), strict=True):
        assert x == pytest.approx([seconds] * len(x))


def test_the_spread_of_samples() -> None:
    found = kernel_timing.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert found == {"seconds": 3.5, "low": 2.0, "high": 5.0, "best": 1.0, "samples": 6}
    assert kernel_timing.spread([2.0]) == {"seconds": 2.0, "low": 2.0, "high": 2.0, "best": 2.0, "samples": 1}


def measured(monkeypatch: pytest.MonkeyPatch, device: str = "cpu", **options) -> tuple[list[dict], list[str]]:
    notes: list[str] = []
    given = kernels.KernelOptions(repeats=1, memory=False, **options)
    rows = kernels.measure(
        ops()["miras_scan"], Shape(1, 128, 2, 16), ["torch"], torch.float32, torch.device(device), given, notes
    )
    return rows, notes


def test_a_peer_that_is_not_installed_is_said_to_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    rows, notes = measured(monkeypatch)
    assert {row["backend"] for row in rows} == {"torch"}
    assert notes == ["titans-pytorch is not installed", "fla-core is not installed"]
    assert measured(monkeypatch, peers=("none",))[1] == []


@needs_fla_core
def test_an_installed_peer_is_in_the_table_with_its_version_and_what_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setattr(kernels, "roof", lambda dtype: CEILING)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = ["--shapes", "1x70x1x16", "--backends", "torch", "--peers", "fla-momentum", "--repeats", "1", "--no-memory"]
    assert main(["bench", "kernels", *words, "--json", str(tmp_path / "out.json")]) == 0
    found, text = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    ran = "chunk_momentum_delta_rule_ref, PyTorch"
    assert [row["implementation"] for row in found["rows"]] == [None, None, ran, ran]
    version = importlib.metadata.version("fla-core")
    assert found["versions"]["fla-core"] == version and f"fla-core {version}" in " ".join(text.split())
    assert f"fla-momentum: {ran}" in text and found["notes"] == []
    for own, other in zip(found["rows"][:2], found["rows"][2:], strict=True):
        assert other["flops"] == own["flops"] and other["error"] is not None and other["roof"] > 0


def install(monkeypatch: pytest.MonkeyPatch, prepare, **options) -> None:
    """A peer in the place of titans-pytorch, from a package that is there."""
    stand_in = peers.Peer("titans-pytorch", "torch", "torch", "miras_scan", ("cpu",), prepare, **options)
    for module in (kernels, contenders):
        monkeypatch.setattr(module, "PEERS", (stand_in,))


def test_a_peer_that_is_installed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, lambda x: peers.Run(lambda: x[0] * x[1], list(x[:2])))
    rows, notes = measured(monkeypatch)
    assert [row["backend"] for row in rows] == ["torch"] * 2 + ["titans-pytorch"] * 2 and notes == []
    assert rows[2]["error"] is None and rows[2]["implementation"] is None
    found = kernels._with_rates(rows[2], torch.float32, CEILING)
    assert found["flops"] is None and found["roof"] is None and found["us_per_token"] > 0


def test_a_peer_that_computes_the_op_is_counted_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(x: list[Tensor]) -> peers.Run:
        return peers.Run(lambda: 1.01 * ops()["miras_scan"].call(x, "torch"), list(x), "a loop")

    install(monkeypatch, prepare, exact=True)
    rows, _ = measured(monkeypatch)
    own, other = (kernels._with_rates(rows[i], torch.float32, CEILING) for i in (0, 2))
    assert other["error"] == pytest.approx(0.01, rel=0.01) and other["implementation"] == "a loop"
    assert (other["flops"], other["bytes"]) == (own["flops"], own["bytes"]) and other["roof"] > 0


def test_a_peer_that_fails_is_left_out_and_costs_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Tensor:
        raise AssertionError("float32 is not\nsupported")

    install(monkeypatch, lambda x: peers.Run(run, [x[0]]))
    rows, notes = measured(monkeypatch)
    assert [row["backend"] for row in rows] == ["torch"] * 2
    assert notes == ["titans-pytorch at 1x128x2x16: AssertionError: float32 is not supported"]


def test_a_peer_that_fails_late_keeps_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, backward = torch.ones(4, requires_grad=True), []

    def run() -> Tensor:
        backward.extend([1] * torch.is_grad_enabled())
        if len(backward) > 1:
            raise AssertionError
        return 2 * x

    install(monkeypatch, lambda x: peers.Run(run, [x[0]]))
    failing = peers.Run(run, [x])
    monkeypatch.setattr(kernels, "prepare", lambda op, name, *rest: failing if "titans" in name else PLAIN)
    rows, notes = measured(monkeypatch)
    assert [(row["backend"], row["pass"]) for row in rows] == [
        ("torch", "forward"), ("torch", "forward+backward"), ("titans-pytorch", "forward")
    ]  # fmt: skip
    assert notes == ["titans-pytorch at 1x128x2x16: AssertionError"]


LEAF = torch.ones(4, requires_grad=True)
PLAIN = peers.Run(lambda: 2 * LEAF, [LEAF])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_backend_that_runs_out_of_memory_is_left_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def call(x: list[Tensor], backend: str) -> Tensor:
        if backend == "cpu" and x[0].shape[1] > 64:
            raise error
        return x[0] * x[1]

    op = Op("miras_scan", ("torch", "cpu"), memory_inputs, call, None, check_tokens=64)
    monkeypatch.setattr(contenders, "ops", lambda: {"miras_scan": op})
    options, notes = kernels.KernelOptions(repeats=1, peers=("none",)), []
    rows = kernels.measure(op, Shape(1, 128, 2, 16), ["cpu", "torch"], torch.float32, CPU, options, notes)
    assert [row["backend"] for row in rows] == ["torch"] * 2
    assert notes == [f"cpu at 1x128x2x16: {type(error).__name__}: {error}"]


def test_another_error_of_a_backend_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(x: list[Tensor], backend: str) -> Tensor:
        raise RuntimeError("illegal memory access")

    op = Op("miras_scan", ("torch",), memory_inputs, call, None)
    monkeypatch.setattr(contenders, "ops", lambda: {"miras_scan": op})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        kernels.measure(
            op, Shape(1, 8, 1, 8), ["torch"], torch.float32, CPU, kernels.KernelOptions(peers=("none",)), []
        )


def test_a_split_scan_is_timed_against_the_whole_one() -> None:
    options, notes = kernels.KernelOptions(repeats=1, peers=("none",), pieces=(2, 3)), []
    rows = kernels.measure(
        ops()["miras_scan_split"], Shape(1, 130, 1, 16), ["torch"], torch.float32, CPU, options, notes
    )
    assert [row["backend"] for row in rows] == [name for name in ("torch", "torch/2", "torch/3") for _ in range(2)]
    assert all(row["error"] < 1e-5 for row in rows) and notes == []
    assert len({kernels._with_rates(row, torch.float32, CEILING)["flops"] for row in rows}) == 2
    inputs = memory_inputs(Shape(1, 130, 1, 16), torch.float32, CPU)
    whole, split = (ops()["miras_scan_split"].call(inputs, name) for name in ("torch", "torch/2"))
    assert torch.equal(whole, ops()["miras_scan"].call(inputs, "torch")) and not torch.equal(whole, split)


MEMORY = """
    import torch
    from pipeline.bench.kernel_memory import _resident, both_passes
    from pipeline.bench.peers import Run

    # As the command does: what is loaded once is loaded.
    short = torch.ones(8, requires_grad=True)
    both_passes(Run(lambda: 2 * short, [short]))
    x = torch.ones(2**23, requires_grad=True)
    print(_resident(Run(lambda: 2 * x, [x])))

    def with_scratch():
        torch.ones(5 * 2**23)
        return 2 * x

    print(_resident(Run(with_scratch, [x])), _resident(Run(lambda: 2 * x, [x])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of a process can be reset on Linux alone")
def test_peak_memory_is_what_is_held_at_once() -> None:
    """Input, output, its gradient and the input's: 4 of 2. With scratch, while the forward pass runs, 1 + 5 of 2."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)], env={**environment(), **kernel_memory.PAGES},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    plain, scratch, again = map(float, done.stdout.split())
    assert plain == pytest.approx(2.0, abs=0.1)
    assert scratch == pytest.approx(3.0, abs=0.1)
    assert again == pytest.approx(2.0, abs=0.1)


def test_a_case_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nRuntimeError: out of memory")
    monkeypatch.setattr(kernel_memory.subprocess, "run", lambda *args, **options: failed)
    monkeypatch.setattr(kernel_memory, "_can_reset", lambda: True)
    with pytest.raises(UserError, match="the memory of miras_scan failed: RuntimeError: out of memory"):
        kernel_memory.peak_ratios("miras_scan", ["torch"], [Shape(1, 8, 1, 8)], torch.float32, CPU, 1)


def test_times_outlive_a_failed_measurement_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    killed = types.SimpleNamespace(run=lambda *args, **options: subprocess.CompletedProcess([], -9, "", ""))
    monkeypatch.setattr(kernel_memory, "subprocess", killed)
    monkeypatch.setattr(kernel_memory, "_can_reset", lambda: True)
    monkeypatch.setattr(kernels, "roof", lambda dtype: CEILING)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    words = ["--shapes", "1x64x1x16", "--backends", "torch", "--peers", "none", "--repeats", "1"]
    assert main(["bench", "kernels", *words, "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["memory"] for row in found["rows"]] == [None, None]
    assert all(row["seconds"] > 0 for row in found["rows"])
    note = "measuring the memory of miras_scan failed: killed by signal 9"
    assert found["notes"] == [note] and f"left out: {note}" in capsys.readouterr().out


def test_where_the_mark_cannot_be_reset_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_memory, "_can_reset", lambda: False)
    shape = Shape(1, 8, 1, 8)
    assert kernel_memory.peak_ratios("miras_scan", ["torch"], [shape], torch.float32, CPU, 1) == {
        ("torch", shape): None
    }


def test_a_peer_can_be_timed_alone() -> None:
    options = kernels.KernelOptions(backends=("none",))
    shapes, chosen, backends = kernels.check(options, torch.device("cpu"))
    assert shapes and [op.contenders(backends) for op in chosen] == [[]]
