"""The CUDA source of the affine scan, run on the host under the address sanitizer, against the float64 token loop."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.affine_scan_reference import affine_loop, affine_loop_gradients

ROOT = Path(__file__).resolve().parents[2]
TILE = 16
PIECE = 80  # tokens in a piece of time, where there are 1000
NAMES = ("h", "after", "states", "grad_a", "grad_b", "grad_state")
ORDERS = {"rising": 0, "falling": 1, "shuffled": 2}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    assert compiler, "no C++ compiler"
    program = tmp_path_factory.mktemp("emulator") / "affine_scan_emulator"
    source = Path(__file__).with_name("affine_scan_emulator.cpp")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warn = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    include = ["-I", str(ROOT / "kernels")]
    command = [compiler, "-std=c++20", "-O1", "-g", *sanitize, *warn, *include, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def raw(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def slow(x: Tensor) -> Tensor:
    """Factors that forget little from one piece of time to the next."""
    return 1 - 0.01 * x.sigmoid()


class Case:
    """Inputs of one scan, and what the kernels make of them."""

    def __init__(
        self,
        batch: int,
        tokens: int,
        features: int,
        *,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
        change: float | None = None,
        factor: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        rng = torch.Generator().manual_seed(tokens + features)
        self.dtypes = dtypes
        shape = (batch, tokens, features)
        self.a = factor(2 * torch.randn(shape, generator=rng)).to(dtypes[0])
        self.b, self.grad_h = (torch.randn(shape, generator=rng).to(dtypes[1]) for _ in range(2))
        self.state, self.grad_after = (torch.randn(batch, features, generator=rng) for _ in range(2))
        self.segment_ids = self.resets = None
        if change is not None:
            self.segment_ids = (torch.rand(batch, tokens, generator=rng) < change).int().cumsum(dim=1)
            self.resets = torch.zeros(batch, tokens, dtype=torch.bool)
            self.resets[:, 1:] = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]

    def run(self, emulator: Path, order: int = 0, *, shift: int = 0, states: bool = True) -> tuple[list[Tensor], int]:
        """h, after, states and the three gradients, and the number of kernels launched."""
        batch, tokens, features = self.a.shape
        low = [x == torch.bfloat16 for x in self.dtypes]
        header = [batch, tokens, features, *low, self.resets is not None, states, order, shift]
        tensors = [self.a, self.b, self.resets, self.state, self.grad_h, self.grad_after]
        given, made = emulator.with_name("in"), emulator.with_name("out")
        given.write_bytes(
            np.array(header, dtype=np.int64).tobytes() + b"".join(raw(x) for x in tensors if x is not None)
        )
        done = subprocess.run([str(emulator), str(given), str(made)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        content = made.read_bytes()
        saved = (batch, -(-tokens // TILE) if states else 0, features)
        outputs = []
        for like, shape in (
            (self.b, self.b.shape),
            (self.state, self.state.shape),
            (self.state, saved),
            (self.a, self.a.shape),
            (self.b, self.b.shape),
            (self.state, self.state.shape),
        ):
            output = torch.empty(shape, dtype=like.dtype)
            part, content = content[: output.nbytes], content[output.nbytes :]
            if part:
                output = torch.frombuffer(bytearray(part), dtype=like.dtype).reshape(shape)
            outputs.append(output)
        (launches,) = np.frombuffer(content, dtype=np.int64)
        return outputs, int(launches)

    def truth(self) -> list[Tensor]:
        h, after = affine_loop(self.a, self.b, state=self.state, segment_ids=self.segment_ids)
        before = torch.cat([self.state.double()[:, None], h[:, :-1]], dim=1)[:, ::TILE]
        gradients = affine_loop_gradients(self.a, h, self.state, self.grad_h, self.grad_after, self.segment_ids)
        return [h, after, before, *gradients]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, x, y in zip(NAMES, actual, expected, strict=True):
        assert x.shape == y.shape
        tolerance = 3e-3 if x.dtype == torch.bfloat16 else 2e-6
        assert bool(x.isfinite().all()), f"{name} has elements that no thread wrote"
        error = float((x.double() - y).norm() / y.norm())
        assert error <= tolerance, f"{name}: {error:.2e}"


SHAPES = [
    pytest.param((2, 1, 3), 2, id="one token"),
    pytest.param((1, 63, 5), 2, id="shorter than a piece"),
    pytest.param((2, 65, 6), 2, id="ragged tile"),
    pytest.param((2, 1000, 7), 6, id="split in time"),
    pytest.param((1, 5000, 1), 6, id="one feature"),
    pytest.param((1, 40, 16_500), 2, id="too short for a split"),
]


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("shape", "dtypes", "least", "passes"),
    [
        # 64K tokens of 16 heads of 128, and fewer and more features: almost four blocks for each of an H200's 132.
        pytest.param((1, 65_536, 2048), (F32, F32), 512, 2, id="64K x 2048, float32"),
        pytest.param((1, 65_536, 2048), (F32, BF16), 512, 2, id="64K x 2048, a in float32"),
        pytest.param((1, 65_536, 2048), (BF16, BF16), 512, 2, id="64K x 2048, bfloat16"),
        pytest.param((1, 65_536, 512), (BF16, BF16), 512, 2, id="64K x 512, bfloat16"),
        pytest.param((8, 8192, 2048), (BF16, BF16), 512, 2, id="8 x 8K x 2048, bfloat16"),
        pytest.param((8, 8192, 4096), (F32, F32), 256, 1, id="8 x 8K x 4096, float32: full as it is"),
        pytest.param((8, 8192, 8192), (BF16, BF16), 256, 1, id="8 x 8K x 8192, bfloat16: full as it is"),
        # Pieces of 64 tokens or more.
        pytest.param((1, 1024, 2048), (BF16, BF16), 128, 2, id="1K x 2048, bfloat16"),
    ],
)
def test_the_launches_fill_a_device(
    emulator: Path, shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], least: int, passes: int
) -> None:
    words = [*map(str, shape), *(str(int(dtype == BF16)) for dtype in dtypes)]
    text = subprocess.run([str(emulator), *words], capture_output=True, text=True, check=True).stdout
    blocks = [int(word) for word in text.split()]
    assert len(blocks) == (6 if passes == 2 else 2)
    # The kernel in between joins the pieces: a thread for each feature.
    over_tokens = blocks if passes == 1 else [n for i, n in enumerate(blocks) if i % 3 != 1]
    assert len(set(over_tokens)) == 1 and over_tokens[0] >= least
    # No more than it aims at, by a piece: every piece costs a state.
    assert over_tokens[0] <= 2048


@pytest.mark.parametrize("change", [None, 0.05], ids=["one segment", "segments"])
@pytest.mark.parametrize(("shape", "launches"), SHAPES)
def test_values_and_gradients_equal_the_token_loop(
    emulator: Path, shape: tuple[int, int, int], launches: int, change: float | None
) -> None:
    case = Case(*shape, change=change)
    actual, launched = case.run(emulator)
    assert launched == launches
    assert_close(actual, case.truth())


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("features", [10, 11])
@pytest.mark.parametrize("b", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("a", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(emulator: Path, a: torch.dtype, b: torch.dtype, features: int, shift: int) -> None:
    """bfloat16 features go in pairs where they are even and aligned."""
    case = Case(2, 300, features, dtypes=(a, b), change=0.02)
    actual, _ = case.run(emulator, shift=shift)
    assert_close(actual, case.truth())
    assert all(torch.equal(x, y) for x, y in zip(actual, case.run(emulator, shift=1 - shift)[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_the_threads_changes_no_bit(emulator: Path, dtype: torch.dtype) -> None:
    case = Case(2, 700, 6, dtypes=(dtype, dtype), change=0.01)
    expected, _ = case.run(emulator, ORDERS["rising"])
    for order in ORDERS.values():
        actual, _ = case.run(emulator, order)
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("change", [None, 0.004], ids=["one segment", "segments"])
def test_what_lasts_from_piece_to_piece(emulator: Path, change: float | None) -> None:
    """Some pieces hold a segment's start, and some none."""
    case = Case(2, 1000, 6, change=change, factor=slow)
    actual, launches = case.run(emulator)
    assert launches == 6
    assert_close(actual, case.truth())


def test_what_is_no_number_stays_so_in_bfloat16(emulator: Path) -> None:
    """Of a NaN with all bits set, which is what a GPU makes, rounding would carry into the sign."""
    case = Case(1, 40, 2, dtypes=(torch.float32, torch.bfloat16))
    case.a[0, 20, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    h = case.run(emulator)[0][0]
    assert h[0, 20:, 0].isnan().all() and h[0, :20].isfinite().all() and h[0, :, 1].isfinite().all()


def test_factors_of_any_size(emulator: Path) -> None:
    """Exactly 0, negative, and above 1."""
    case = Case(2, 300, 8, factor=lambda x: (1.1 * torch.tanh(x)) * (x.abs() > 0.3))
    assert (case.a == 0).any() and (case.a < -1).any() and (case.a > 1).any()
    assert_close(case.run(emulator)[0], case.truth())


def test_products_beyond_the_range_of_float32(emulator: Path) -> None:
    """A piece's map may be 4^70 where its state is tiny, and infinite where its state is zero."""
    case = Case(1, 1000, 3)
    for x in (case.b, case.state, case.grad_h, case.grad_after):
        x.zero_()
    case.a.fill_(4.0)
    case.state[:, 1:], case.grad_after[:, 1:] = 2.0**-100, 2.0**-100
    case.a[:, 70:, 1:] = 1.0
    case.a[:, 500, 2] = 0.0
    case.a[:, :, 0] = 1e30
    case.b[:, -1] = case.grad_h[:, 0] = 1.0
    actual, launches = case.run(emulator)
    assert launches == 6
    assert_close(actual, case.truth())
    assert actual[0].abs().max() > 2.0**39


def test_nothing_crosses_a_segment_border(emulator: Path) -> None:
    """Not even what is no number; in the first piece, between two pieces, and far from any border."""
    case = Case(1, 1000, 4, change=0.0, factor=slow)
    for border in (20, PIECE - 1, PIECE, PIECE + 1, 700):
        case.segment_ids = (torch.arange(1000)[None] >= border).int()
        case.resets = torch.arange(1000)[None] == border
        clean = case.run(emulator)[0]
        held = case.b.clone()
        case.b[:, border - 1] = torch.nan
        h = case.run(emulator)[0][0]
        case.b = held
        assert h[:, border - 1].isnan().all() and torch.equal(h[:, border:], clean[0][:, border:])
        held = case.grad_h.clone()
        case.grad_h[:, border] = torch.inf
        gradients = case.run(emulator)[0][3:]
        case.grad_h = held
        assert all(torch.equal(x[:, :border], y[:, :border]) for x, y in zip(gradients[:2], clean[3:5], strict=True))
        assert torch.equal(gradients[2], clean[5])


def test_the_states_are_saved_on_demand(emulator: Path) -> None:
    case = Case(2, 300, 6)
    saved, launches = case.run(emulator)
    bare, fewer = case.run(emulator, states=False)
    assert fewer == launches // 2
    assert all(torch.equal(x, y) for x, y in zip(saved[:2], bare[:2], strict=True))
