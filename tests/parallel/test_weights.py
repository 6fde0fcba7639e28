"""Weights are filled by name, and a file that does not fit says which tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import StoredTensor, file_tensors
from pipeline.parallel.weights import fill, full_shape, gathered, generator_for, load_safetensors


class Model(nn.Module):
    def __init__(self, *, reverse: bool = False) -> None:
        super().__init__()
        sizes = {"first": (3, 2), "second": (4,)}
        for name in reversed(sizes) if reverse else sizes:
            self.register_parameter(name, nn.Parameter(torch.full(sizes[name], torch.nan)))


def draw(seed: int, name: str, count: int = 4) -> list[float]:
    return torch.rand(count, generator=generator_for(seed, name)).tolist()


def test_a_generator_depends_on_seed_and_name() -> None:
    streams = [draw(seed, name) for seed in (0, 1, 11) for name in ("a", "b", "1:a", "")]
    assert len({tuple(stream) for stream in streams}) == len(streams)


def test_a_generator_depends_on_nothing_else() -> None:
    expected = draw(3, "layer.weight")
    torch.manual_seed(99)
    torch.rand(5)
    draw(4, "other")
    state = torch.get_rng_state()
    assert draw(3, "layer.weight") == expected
    assert torch.equal(torch.get_rng_state(), state)


def random_value(name: str, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=generator_for(0, name))


def test_filling_does_not_depend_on_the_order_of_building() -> None:
    models = [Model(), Model(reverse=True)]
    for model in models:
        fill(model, random_value)
    one, other = (dict(model.named_parameters()) for model in models)
    assert list(one) != list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_the_named_are_filled() -> None:
    model = Model()
    fill(model, lambda name, shape: torch.ones(shape), ["second", "absent"])
    assert model.second.eq(1).all() and model.first.isnan().all()


def test_filling_keeps_dtype_and_leaf() -> None:
    model = Model().bfloat16()
    fill(model, random_value)
    assert model.first.dtype == torch.bfloat16
    assert model.first.is_leaf and model.first.requires_grad and model.first.grad_fn is None


def test_a_value_of_another_shape_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        fill(Model(), lambda name, shape: torch.ones(7))


def test_unsharded_parameters_are_whole_already() -> None:
    model = Model()
    with gathered(model.parameters(), modify=True):
        assert full_shape(model.first) == (3, 2)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, StoredTensor]:
    """Two shards of a model, with a tensor that nobody asks for."""
    save_file({"a": torch.arange(6.0).reshape(3, 2), "unused": torch.zeros(9)}, tmp_path / "1.safetensors")
    save_file({"b": torch.arange(4.0)}, tmp_path / "2.safetensors")
    return {**file_tensors(tmp_path / "1.safetensors"), **file_tensors(tmp_path / "2.safetensors")}


def load(model: nn.Module, files: dict[str, StoredTensor], rename: dict[str, str]) -> None:
    load_safetensors(model, lambda: files, rename, Topology(), what="some/model")


def test_parameters_are_read_from_whatever_file_has_them(files: dict[str, StoredTensor]) -> None:
    model = Model()
    load(model, files, {"first": "a", "second": "b"})
    assert model.first.flatten().tolist() == list(range(6))
    assert model.second.tolist() == list(range(4))


def test_what_is_not_asked_for_is_left_alone(files: dict[str, StoredTensor]) -> None:
    model = Model()
    load(model, files, {"second": "b"})
    assert model.first.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_file_of_another_precision_is_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"b": torch.arange(4.0).to(dtype)}, tmp_path / "other.safetensors")
    model = Model()
    load(model, file_tensors(tmp_path / "other.safetensors"), {"second": "b"})
    assert model.second.dtype == torch.float32 and model.second.tolist() == list(range(4))


def refusal(model: nn.Module, files: dict[str, StoredTensor], rename: dict[str, str]) -> str:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError) as caught:
        load(model, files, rename)
    # Nothing is written before everything fits.
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], equal_nan=True, rtol=0, atol=0)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_tensors_are_counted_and_the_first_is_named(files: dict[str, StoredTensor]) -> None:
    message = refusal(Model(), files, {"second": "b", "first": "absent.weight"})
    assert message.startswith("some/model: 1 ") and "'absent.weight'" in message


def test_a_tensor_of_another_shape_is_named_with_both_shapes_and_the_file(files: dict[str, StoredTensor]) -> None:
    message = refusal(Model(), files, {"first": "a", "second": "unused"})
    assert message.startswith("some/model: 'unused' in 1.safetensors is (9,), the model wants (4,)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_not_taken_for_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """Their values mean nothing without scales that are elsewhere."""
    save_file({"b": torch.ones(4).to(dtype)}, tmp_path / "quantised.safetensors")
    message = refusal(Model(), file_tensors(tmp_path / "quantised.safetensors"), {"second": "b"})
    assert "'b' in quantised.safetensors is " in message and "give the original ones" in message
