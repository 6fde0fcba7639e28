"""The denoiser: its sizes, what it may see, and what it is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.systems.mimir.config import LETTERS, EncoderConfig, MimirConfig
from pipeline.systems.mimir.model import MimirModel, TargetSequences
from pipeline.systems.mimir.model.lengths import EmpiricalLengths
from pipeline.systems.mimir.model.model import parameter_parts
from pipeline.systems.mimir.model.sequences import OTHER, encode

SIZES = {"small": (128, 3, 4, 10), "medium": (256, 4, 4, 25), "large": (512, 6, 8, 35)}
TINY = MimirConfig(width=16, layers=2, heads=2, targets=5, max_length=9, encoder=EncoderConfig(width=8))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def built(config: MimirConfig = TINY, **changes: Any) -> MimirModel:
    torch.manual_seed(1)
    return MimirModel(dataclasses.replace(config, **changes)).double()


def inputs(rows: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "states": torch.randint(len(LETTERS), (rows, length), generator=generator),
        "level": torch.tensor([1.0, 3.0, 7.0, 10.0])[:rows],
        "lengths": torch.tensor([length, 4, 6, 1])[:rows],
        "labels": torch.tensor([1, 0, -1, 1])[:rows],
        "targets": torch.tensor([2, -1, -1, 4])[:rows],
    }


@pytest.mark.parametrize("targets", [0, 1, 800, 803])
@pytest.mark.parametrize("preset", SIZES)
def test_parameters_are_those_of_the_formula(preset: str, targets: int) -> None:
    d, layers, heads, timesteps = SIZES[preset]
    config = MimirConfig(width=d, layers=layers, heads=heads, timesteps=timesteps, targets=targets)
    with torch.device("meta"):
        parameters = count(MimirModel(config))
    vocabulary = 25
    assert config.vocab_size == vocabulary
    expected = (12 * layers + 8) * d**2 + (13 * layers + 2 * vocabulary + 30 + targets) * d + vocabulary
    assert parameters == expected
    assert parameter_parts(config) == {"denoiser": expected}


def test_parameters_are_those_of_the_guide() -> None:
    """839K, 3.9M and 21.5M, at the number of targets that they imply."""
    found = []
    for d, layers, heads, timesteps in SIZES.values():
        with torch.device("meta"):
            found.append(count(MimirModel(MimirConfig(width=d, layers=layers, heads=heads, timesteps=timesteps))))
    assert found == [838_937, 3_909_401, 21_463_577]
    assert [round(number / 1e6, 2) for number in found] == [0.84, 3.91, 21.46]


@pytest.mark.parametrize("kernel", ["uniform", "absorbing"])
@pytest.mark.parametrize("length", ["empirical", "head"])
@pytest.mark.parametrize("target", ["table", "encoder"])
def test_what_other_choices_add_is_counted_apart(kernel: str, length: str, target: str) -> None:
    config = dataclasses.replace(TINY, kernel=kernel, length=length, target=target, timesteps=20)  # type: ignore[arg-type]
    parts = parameter_parts(config)
    assert sum(parts.values()) == count(MimirModel(config))
    assert set(parts) == {"denoiser", *["target encoder"] * (target != "table"), *["length head"] * (length == "head")}


def test_only_letters_are_predicted() -> None:
    for kernel in ("uniform", "absorbing"):
        output = built(kernel=kernel, timesteps=20)(**inputs())
        assert output.logits.shape == (4, 9, len(LETTERS)) and output.log_lengths.shape == (4, 10)


def test_what_lies_beyond_a_length_changes_nothing() -> None:
    model, given = built(), inputs()
    before = model(**given).logits
    inside = torch.arange(9) < given["lengths"][:, None]
    other = torch.where(inside, given["states"], (given["states"] + 5) % len(LETTERS))
    after = model(**{**given, "states": other}).logits
    assert torch.equal(before[inside], after[inside])
    # And a row does not depend on how far it is padded.
    short = model(**{**{name: value[1:2] for name, value in given.items()}, "states": given["states"][1:2, :4]})
    torch.testing.assert_close(short.logits, before[1:2, :4], rtol=1e-12, atol=1e-12)


def test_every_residue_sees_every_other() -> None:
    model, given = built(), inputs()
    before = model(**given).logits
    for position in range(9):
        states = given["states"].clone()
        states[0, position] = (states[0, position] + 1) % len(LETTERS)
        changed = (model(**{**given, "states": states}).logits[0] != before[0]).any(-1)
        assert changed.all()


def test_time_label_and_target_are_told_apart() -> None:
    model, given = built(), inputs()
    before = model(**given).logits
    for name, value in {"level": 5.0, "labels": 0, "targets": 3}.items():
        changed = given[name].clone()
        changed[0] = value
        after = model(**{**given, name: changed}).logits
        assert not torch.allclose(after[0], before[0]) and torch.equal(after[1:], before[1:]), name


def test_no_target_is_the_last_row_and_no_label_adds_nothing() -> None:
    model, given = built(), inputs()
    condition = model.condition(given["labels"], given["targets"])
    table, labels = (model.get_parameter(f"{name}.embedding.weight") for name in ("targets", "labels"))
    assert torch.equal(condition[1], labels[0] + table[5])
    assert torch.equal(condition[2], table[5])
    # A target that training has nothing of, which a table knows no vector for.
    unknown = model.condition(torch.tensor([1]), torch.tensor([5]))
    assert torch.equal(unknown[0], labels[1] + table[5])


def test_an_encoder_reads_sequences_and_no_more() -> None:
    model = built(target="encoder")
    names = ["ACDEFGHIKLMNPQRSTVWY", "MK", "ACDEFGHIKLMNPQRSTVWY*J"]
    ids = torch.from_numpy(encode(names, 64)).long()
    assert ids.shape == (3, 22) and ids[2, 20:].tolist() == [OTHER, OTHER]
    rows = torch.tensor([0, -1, 1, 2])
    given = {**inputs(), "labels": torch.tensor([1, 0, 1, 1])}
    condition = model.condition(given["labels"], given["targets"], TargetSequences(ids, rows))
    assert torch.equal(
        condition[1], model.labels.embedding.weight[0] + model.get_parameter("targets.nothing.weight")[0]
    )
    assert not torch.allclose(condition[0], condition[2]) and not torch.allclose(condition[0], condition[3])
    alone = model.condition(given["labels"][2:3], given["targets"][2:3], TargetSequences(ids[1:2, :2], rows[:1]))
    torch.testing.assert_close(alone[0], condition[2], rtol=1e-12, atol=1e-12)
    assert encode(["A" * 99], 10).shape == (1, 10)
    with pytest.raises(ValueError, match="sequences"):
        model(**inputs())


def test_lengths_are_as_often_as_in_the_data() -> None:
    lengths = EmpiricalLengths(9)
    flat = lengths(torch.tensor([0, 1, -1])).exp()
    torch.testing.assert_close(flat, torch.full((3, 10), 0.1))
    lengths.counts[0, 4], lengths.counts[0, 9] = 3, 1
    torch.testing.assert_close(lengths(torch.tensor([1]))[0].exp()[[4, 9]], torch.tensor([0.75, 0.25]))
    lengths.counts[1, 4] = 4
    found = lengths(torch.tensor([0, 1, -1])).exp()
    assert found[:, [4, 9]].tolist() == [[0.75, 0.25], [1.0, 0.0], [0.875, 0.125]]
    assert found.sum(-1).tolist() == [1, 1, 1]


def test_a_length_head_gives_a_distribution_over_the_lengths_that_may_be() -> None:
    output = built(length="head", min_length=3)(**inputs())
    shares = output.log_lengths.exp()
    torch.testing.assert_close(shares.sum(-1), torch.ones(4, dtype=torch.float64))
    assert np.all(shares[:, :3].detach().numpy() == 0) and (shares[:, 3:] > 0).all()
    assert not torch.allclose(shares[0], shares[3])


def test_recomputation_gives_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = MimirModel(TINY, activation_checkpointing=recompute).double()
        model(**inputs()).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True) if one is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_finite(dtype: torch.dtype) -> None:
    for target in ("table", "encoder"):
        model = built(target=target, length="head")
        sequences = TargetSequences(torch.from_numpy(encode(["MKLV", "ACD"], 64)).long(), torch.tensor([0, -1, -1, 1]))
        exact = model(**inputs(), sequences=sequences)
        halved = model.to(dtype)(**inputs(), sequences=sequences)
        assert halved.logits.dtype == dtype and halved.log_lengths.dtype == torch.float32
        torch.testing.assert_close(halved.logits.double(), exact.logits, rtol=0.1, atol=0.1)
