"""What the engine is told of the system: phases, parameters, costs, and what cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.capabilities import CountsEpochs, CountsParts
from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig
from pipeline.errors import UserError
from pipeline.host.devices import find_device
from pipeline.load import decide, model_without_storage
from pipeline.parallel.topology import Topology
from pipeline.phases import names, pick
from pipeline.plan.estimate import PlanOptions, make_plan
from pipeline.recipes.cvfp import cvfp_10k, cvfp_100k, cvfp_tiny
from pipeline.system import Evaluation, System, create_system
from pipeline.systems.cvfp.config import CvfpConfig
from tests.systems.cvfp.harness import documents, small

WHOLE = 91_429_969
"""Parameters of the published model."""


def phases_of(config: RunConfig) -> dict[str, frozenset[str]]:
    return {phase.name: names(phase) for phase in model_without_storage(config).phases}


def trained(config: RunConfig) -> dict[str, int]:
    loaded = model_without_storage(config)
    sizes = {name: parameter.numel() for name, parameter in loaded.model.named_parameters()}
    return {phase.name: sum(sizes[name] for name in names(phase)) for phase in loaded.phases}


def decided(config: RunConfig, topology: Topology | None = None) -> System[Any]:
    system = create_system(config)
    system.files = system.list_data()
    return decide(system, topology or Topology()).system


def test_parameters_are_those_of_the_published_model_by_part() -> None:
    config = cvfp_100k()
    system = create_system(config)
    assert isinstance(system, CountsParts) and isinstance(system, CountsEpochs)
    parts = system.parameter_parts()
    assert parts == {
        "embedding": 38_597_376, "embedding norm": 1_536, "blocks": 6 * 2_363_904, "head": 38_647_633,
    }  # fmt: skip
    assert sum(parts.values()) == WHOLE
    model = model_without_storage(config).model
    assert sum(parameter.numel() for parameter in model.parameters()) == WHOLE


def test_each_phase_trains_what_its_loss_reaches() -> None:
    norm = 2 * 768
    # The blocks and their input norm, without one norm of the last block; the head besides; never a given embedding.
    assert trained(cvfp_100k()) == {
        "fixed_point": 6 * 2_363_904 + norm - norm, "prediction": 6 * 2_363_904 + 38_647_633,
    }  # fmt: skip
    tiny = phases_of(cvfp_tiny())
    assert "embedding.weight" in tiny["prediction"] and "embedding.weight" not in tiny["fixed_point"]
    assert "blocks.1.norm_token.weight" not in tiny["fixed_point"] and "blocks.1.linear.weight" in tiny["fixed_point"]
    assert "blocks.1.norm_context.weight" not in tiny["prediction"]
    assert "blocks.0.norm_context.weight" in tiny["prediction"] & tiny["fixed_point"]


def model_of(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def test_frozen_contexts_leave_the_head_alone() -> None:
    config = cvfp_tiny()
    assert isinstance(config.model, CvfpConfig)
    prediction = dataclasses.replace(config.model.prediction, freeze_context=True)
    assert phases_of(model_of(config, prediction=prediction))["prediction"] == {"head.weight", "head.bias"}


def test_a_test_is_the_first_phase_alone(folder: Path) -> None:
    system = decided(small(folder, model__test=True))
    model = system.build()
    assert [phase.name for phase in pick(system.config, system.phases(model))] == ["fixed_point"]
    # What a checkpoint holds is what the other trains too: it may be gone on with.
    assert phases_of(model_of(cvfp_tiny(), test=True)) == phases_of(cvfp_tiny())
    first, second = model_without_storage(cvfp_tiny()).phases
    assert not first.judged and second.judged and second.until_evaluated is None
    assert first.until_evaluated is not None
    assert first.until_evaluated({"converged": 0.95}) and not first.until_evaluated({"converged": 0.949})


def test_a_token_costs_the_matrices_of_the_blocks() -> None:
    system = create_system(cvfp_100k())
    first, second = model_without_storage(cvfp_100k()).phases
    blocks, head = 6 * 2 * 1536**2, 2 * 768 * 50257
    assert blocks == pytest.approx(28.3e6, rel=1e-3)
    found = system.flops(128, first)
    # A pass finds the contexts first; 28.3 MFLOP forward, 85 with backward.
    assert (found.forward, found.backward) == (2 * blocks, 2 * blocks)
    found = system.flops(128, second)
    assert (found.forward, found.backward) == (2 * blocks + head, 2 * (blocks + head))


def test_a_plan_counts_what_training_holds() -> None:
    plan = make_plan(cvfp_100k(), PlanOptions(device="T4"))
    assert plan.counts.parameters == WHOLE and plan.fits
    assert plan.held["contexts"] == 781 * 128 * 768 * 4
    device = find_device("T4")
    assert device is not None and plan.memory < 2 * 2**30


def test_a_plan_of_a_test_has_the_first_phase_alone() -> None:
    config = cvfp_100k()
    of_test, of_first = (
        make_plan(one, PlanOptions(device="T4"))
        for one in (model_of(config, test=True), dataclasses.replace(config, phases=("fixed_point",)))
    )
    assert [entry.phase.name for entry in of_test.counts.phases] == ["fixed_point"]
    assert (of_test.steps, of_test.hours, of_test.held) == (of_first.steps, of_first.hours, of_first.held)
    assert 0 < of_test.steps < make_plan(config, PlanOptions(device="T4")).steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("cvfp")
    documents(found / "documents")
    return found


def test_passes_of_both_phases_are_settled_by_the_data(folder: Path) -> None:
    """An iteration of the first phase and an epoch of the second have as many steps, on any number of ranks."""
    for topology, rows in ((Topology(), 8), (Topology(world=2), 4)):
        system = decided(small(folder, batch_size=rows, model__vocab=5), topology)
        config = system.config
        assert isinstance(config.model, CvfpConfig) and config.model.vocab == 260
        assert (config.steps, config.eval_every, config.save_every) == (6, 3, 6)
        assert config.model.fixed_point.steps == 6
        assert decide(system, topology).config == config
        model = system.build()
        assert [phase.steps for phase in system.phases(model)] == [6, 6]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parallel__sequence": 2, "sequence_length": 12}, "--parallel.sequence 2: contexts follow each other"),
        ({"model__carry": "stream", "grad_accum": 2}, "--grad-accum 2: with --carry stream"),
        ({"sequence_length": 1}, "--sequence-length 1: "),
        ({"model__test": True, "phases": ("prediction",)}, "--phases prediction with --test, which runs fixed_point"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    config = small(folder, **changes)
    with pytest.raises(UserError) as error:
        create_system(config).check(Topology(world=config.parallel.sequence, sequence=config.parallel.sequence))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_resume_with_micro_batches_of_a_stream_is_refused(folder: Path) -> None:
    """Its global batch may make more of them than the flags say."""
    system = create_system(small(folder, model__carry="stream", grad_accum=2))
    system.files = system.list_data()
    with pytest.raises(UserError, match=r"^--grad-accum 2: with --carry stream"):
        system.settled(Topology())


def test_the_settings_of_the_guide_are_flags() -> None:
    words = (
        "cvfp_100k --num-samples 100 --phase1-max-iterations 7 --phase1-convergence-threshold 0.1"
        " --phase1-min-converged-ratio 0.9 --phase1-learning-rate 0.003 --dist-reg-weight 0.4 --ema-momentum 0.99"
        " --context-noise-std 0.02 --phase2-learning-rate 0.001 --phase2-epochs 4 --freeze-context --num-layers 3"
        " --context-dim 64 --carry stream --model.as-published --test --cache-dir elsewhere"
    )
    config = parse_run(words.split(), "train")
    model = config.model
    assert isinstance(model, CvfpConfig)
    first = model.fixed_point
    assert (first.iterations, first.threshold, first.converged, first.lr) == (7, 0.1, 0.9, 0.003)
    assert (first.diversity_weight, first.momentum, first.noise) == (0.4, 0.99, 0.02)
    assert (config.lr, config.epochs.train, model.prediction.freeze_context) == (0.001, 4, True)
    assert (model.num_samples, model.layers, model.width, model.carry) == (100, 3, 64, "stream")
    assert model.as_published and model.test and model.data_cache == "elsewhere"


def test_recipes_are_of_the_guides_two_sizes() -> None:
    for recipe, samples in ((cvfp_10k(), 78), (cvfp_100k(), 781)):
        model = recipe.model
        assert isinstance(model, CvfpConfig)
        assert (model.num_samples, recipe.sequence_length, model.embedding) == (samples, 128, "gpt2")
        assert (model.width, model.layers, model.vocab, recipe.data.tokenizer) == (768, 6, 50257, "gpt2")


def test_a_headline_has_the_baselines_beside_each_figure() -> None:
    system = create_system(cvfp_tiny())
    scalars = {"loss": 2.0, "accuracy": 0.25, "unigram_ppl": 20.0, "unigram_accuracy": 0.1, "context_zero_ppl": 9.5}
    text = system.headline(Evaluation(scalars))
    assert text == (
        "val 2.000 | ppl 7.39 (unigram 20.00, context at zero 9.50) | accuracy 0.2500 (unigram 0.1000)"
    )  # fmt: skip
    assert system.describe("cpu", torch.float32)["embedding"] == "random, trained in the second phase"


def test_a_headline_of_contexts_has_the_baselines_beside_each_figure() -> None:
    """Each number is another one, so that none stands in another's place."""
    system = create_system(cvfp_tiny())
    first = {"converged": 0.91, "converged_val": 0.92}
    assert system.headline(Evaluation(first)) == "converged 91.00%, held out 92.00%"
    whole = first | {
        "converged_pass_to_pass": 0.93,
        "converged/random_init": 0.11, "converged_val/random_init": 0.12, "effective_rank/train": 0.81,
        "effective_rank/val": 0.82, "effective_rank/random_init_train": 0.41, "effective_rank/random_init_val": 0.42,
        "effective_rank/gaussian": 0.96, "final_diff": 0.003, "final_diff/random_init": 0.005,
        "final_diff_relative": 0.0001, "final_diff_relative/random_init": 0.0002,
    }  # fmt: skip
    assert system.headline(Evaluation(whole)) == (
        "converged 91.00% (untrained 11.00%, from pass to pass 93.00%), held out 92.00% (untrained 12.00%)"
        " | effective rank 81.0% (untrained 41.0%, independent numbers 96.0%),"
        " held out 82.0% (untrained 42.0%, independent numbers 96.0%)"
        " | final_diff 0.003 (untrained 0.005), as a share of the norm 0.0001 (untrained 0.0002)"
    )
