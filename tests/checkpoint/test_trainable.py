"""What was trained, taken without the rest of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.checkpoint.trainable import load_trainable
from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from tests.checkpoint.small_runs import Averaging, save


class TestLoadTrainable:
    def test_it_fills_what_was_trained_and_leaves_the_rest(self, make_run) -> None:
        run = make_run()
        folder = save(run, 5)
        model = nn.Linear(3, 2)
        bias = model.bias.clone()
        load_trainable(model, folder, Topology())
        assert torch.equal(model.weight, run.engine.module.weight)
        assert torch.equal(model.bias, bias)

    def test_moving_averages_come_back_with_the_weights(self, make_run) -> None:
        run = make_run()
        run.engine.module = trained = Averaging()
        trained(torch.tensor([1.0, 2.0, 4.0]))
        folder = save(run, 5)
        assert set(load_file(folder / "trainable.safetensors")) == {"weight", "average", "count"}
        model = Averaging()
        load_trainable(model, folder, Topology())
        assert torch.equal(model.weight, trained.weight)
        assert model.average.tolist() == [0.5, 1, 2] and model.count == 1
        assert not model.scratch.any(), "it is in no state_dict"

    def test_they_may_be_of_another_precision(self, tmp_path: Path) -> None:
        save_file({"average": torch.full((3,), 0.5, dtype=torch.bfloat16)}, tmp_path / "trainable.safetensors")
        model = Averaging()
        load_trainable(model, tmp_path, Topology())
        assert model.average.tolist() == [0.5] * 3 and model.average.dtype == torch.float32

    def test_a_checkpoint_without_them_leaves_them_as_they_are(self, make_run) -> None:
        run = make_run()
        folder = save(run, 5)
        model = Averaging()
        model(torch.ones(3))
        load_trainable(model, folder, Topology())
        assert torch.equal(model.weight, run.engine.module.weight)
        assert model.average.tolist() == [0.5] * 3 and model.count == 1

    @pytest.mark.parametrize(
        "stored, message",
        [
            ({"average": torch.ones(4)}, r"'average' is \(4,\), the model wants \(3,\)"),
            ({"count": torch.tensor(0.5)}, r"'count' is torch\.float32, the model wants torch\.int64"),
            ({"scratch": torch.ones(3)}, "'scratch' is no parameter of this model"),
        ],
    )
    def test_buffers_of_another_model_are_named_before_anything_is_filled(
        self, tmp_path: Path, stored: dict[str, torch.Tensor], message: str
    ) -> None:
        save_file({"weight": torch.full((2, 3), 7.0), **stored}, tmp_path / "trainable.safetensors")
        model = Averaging()
        with pytest.raises(UserError, match=message):
            load_trainable(model, tmp_path, Topology())
        assert not model.weight.eq(7).any()

    def test_a_flipped_byte_is_found_where_there_is_a_hash(self, make_run) -> None:
        run = make_run()
        folder = save(run, 7)
        path = folder / "trainable.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=r"trainable\.safetensors: content differs from its hash"):
            load_trainable(nn.Linear(3, 2), folder, Topology())
        # What was exported has none.
        (folder / "manifest.json").unlink()
        load_trainable(nn.Linear(3, 2), folder, Topology())

    def test_a_folder_without_weights_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no trainable\.safetensors there"):
            load_trainable(nn.Linear(3, 2), tmp_path, Topology())

    def test_a_parameter_of_another_model_is_named(self, tmp_path: Path) -> None:
        save_file({"gate": torch.zeros(2)}, tmp_path / "trainable.safetensors")
        with pytest.raises(UserError, match="'gate' is no parameter of this model"):
            load_trainable(nn.Linear(3, 2), tmp_path, Topology())

    def test_another_shape_is_named(self, make_run) -> None:
        folder = save(make_run(), 5)
        with pytest.raises(
            UserError, match=r"'weight' in trainable\.safetensors is \(2, 3\), the model wants \(2, 4\)"
        ):
            load_trainable(nn.Linear(4, 2), folder, Topology())

    def test_a_truncated_file_is_named(self, make_run) -> None:
        folder = save(make_run(), 5)
        path = folder / "trainable.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(UserError, match=r"trainable\.safetensors"):
            load_trainable(nn.Linear(3, 2), folder, Topology())
