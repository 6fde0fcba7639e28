"""What each phase trains, for how long, with which memories, and where a run may begin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.flags import parse_run
from pipeline.config import RunConfig
from pipeline.create_run import phases_of
from pipeline.errors import UserError
from pipeline.load import model_without_storage
from pipeline.parallel.topology import Topology
from pipeline.phases import names
from pipeline.plan.command import render
from pipeline.plan.estimate import PlanOptions
from pipeline.recipes.neuromorphic import neuromorphic, neuromorphic_facts, neuromorphic_tiny
from pipeline.schedule import lr_multiple, schedule_of
from pipeline.system import create_system
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.weights import is_vector, part_of
from tests.systems.neuromorphic.harness import created, documents, small


def parsed(words: str) -> RunConfig:
    return parse_run(words.split(), "train")


def planned(words: str) -> dict[str, int]:
    config = parsed(words)
    phases = phases_of(config, model_without_storage(config).phases, None).every
    return {phase.name: phase.steps for phase in phases}


@pytest.mark.parametrize(
    "words, steps",
    [
        ("neuromorphic --preset phase_a_to_c --tier a", {"A": 5000, "B": 5000, "C": 2500}),
        ("neuromorphic --preset phase_a_to_b --tier a", {"A": 5000, "B": 5000}),
        ("neuromorphic --preset quick_test --tier a", {"A": 200, "B": 200}),
        ("neuromorphic --tier a --steps 70", {"A": 70, "B": 70, "C": 70}),
        ("neuromorphic --tier a --steps 70 --model.lifelong-steps 30", {"A": 70, "B": 70, "C": 30}),
        ("neuromorphic --tier a --phases B C", {"B": 5000, "C": 2500}),
    ],
)
def test_steps_of_a_preset_and_of_flags(words: str, steps: dict[str, int]) -> None:
    assert planned(words) == steps


def test_a_plan_of_facts_has_the_vocabulary_of_the_task() -> None:
    sizes = neuromorphic_facts().model
    assert isinstance(sizes, NeuromorphicConfig) and sizes.facts is not None
    assert sizes.vocab == sizes.facts.vocab == 97


def test_the_guides_commands_are_understood() -> None:
    config = parsed("neuromorphic --preset phase_a_to_c --bs 48")
    assert (config.recipe, config.batch_size, config.model.tier) == ("neuromorphic_phase_a_to_c", 48, "b")  # type: ignore[attr-defined]
    assert config.batch_size * config.sequence_length == 12_288
    assert (config.report.log_every, config.eval_every, config.sample_every) == (50, 200, 200)
    assert (config.report.plot_every, config.save_every, config.ablate_every) == (500, 2500, 1000)
    config = parsed(
        "neuromorphic --phase B --tier a --bs 32 --resume outputs/x/checkpoints/latest --save-interval 5 "
        "--plot-interval 6 --no-plots --compile --seed 3 --tokenizer gpt2 --lr-min 1e-6 --val-interval 7 "
        "--text-sample-interval 8 --log-interval 9 --warmup-steps 10 --d-dec 64 --decoder-layers 1 "
        "--thalamic-tokens 2 --n-heads-decoder 4 --output-root elsewhere --run-name mine --run-id 1"
    )
    assert (config.phase, config.resume, config.compile, config.seed) == ("B", "outputs/x/checkpoints/latest", True, 3)
    assert (config.save_every, config.report.plot_every, config.report.plots) == (5, 6, False)
    assert (config.eval_every, config.sample_every, config.report.log_every) == (7, 8, 9)
    assert config.output_dir == Path("elsewhere/mine/1") and config.optimizer.min_lr == 1e-6
    sizes = config.model.sizes  # type: ignore[attr-defined]
    assert (sizes.decoder_width, sizes.decoder_layers, sizes.thalamic_tokens, sizes.decoder_heads) == (64, 1, 2, 4)
    assert not parsed("neuromorphic --no-compile").compile
    assert parsed("neuromorphic --preset quick_test").output_dir == Path("outputs/neuromorphic_quick_test")
    assert parsed("neuromorphic --output-root there").output_dir == Path("there/neuromorphic")


def test_every_phase_begins_its_schedule_anew_and_ends_it_at_the_least_rate() -> None:
    config = neuromorphic()
    schedule = schedule_of(config)
    assert (schedule.peak, schedule.warmup_steps, schedule.betas) == (3e-4, 1000, (0.9, 0.95))
    for steps in (5000, 2500):
        assert lr_multiple(schedule, steps, 1000) == 1
        assert lr_multiple(schedule, steps, steps) * schedule.peak == pytest.approx(1e-5)


def test_phases_train_what_they_use() -> None:
    loaded = model_without_storage(neuromorphic_tiny())
    every = {name for name, _ in loaded.model.named_parameters()}
    first, second, third = loaded.phases
    assert names(second) == names(third) == every
    assert {part_of(name) for name in every - names(first)} == {"episodic memory"}
    for phase in loaded.phases:
        matrices, vectors = phase.groups
        assert matrices.weight_decay == 0.01 and vectors.weight_decay == 0
        assert not any(map(is_vector, matrices.parameters)) and all(map(is_vector, vectors.parameters))
    system = create_system(neuromorphic_tiny())
    uses: Any = [system.uses(name) for name in "ABC"]  # type: ignore[attr-defined]
    assert [use.episodic for use in uses] == ["absent", "on", "on"]
    assert [use.lifelong for use in uses] == [False, False, True]


def test_a_phase_with_text_of_its_own_begins_with_empty_streams() -> None:
    assert [phase.keep_carry for phase in model_without_storage(neuromorphic()).phases] == [False, False, True]
    config = parsed("neuromorphic --tier a --data-phase B")
    assert [phase.keep_carry for phase in model_without_storage(config).phases] == [False, True, True]


def test_plan_shows_what_is_built_and_what_each_phase_trains() -> None:
    text = " ".join(render(parsed("neuromorphic --preset phase_a_to_c"), PlanOptions()).split())
    for phase, trained, steps in (
        ("A", "94,203,744", "5,000"),
        ("B", "102,131,886", "5,000"),
        ("C", "102,131,886", "2,500"),
    ):
        assert f"phase {phase} 102,131,886 built, {trained} trained, up to {steps} steps" in text
    assert "episodic memory" in text and "published" not in text


def test_plan_has_the_published_counts_beside_ours() -> None:
    text = " ".join(render(parsed("neuromorphic --model.as-published"), PlanOptions()).split())
    assert "phase A 102,726,510 built (published: 102,704,928), 94,798,368 trained" in text
    assert "phase B 102,726,510 built (published: 102,726,510), 102,726,510 trained" in text


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "neuromorphic --preset fast",
            "--preset 'fast': no recipe is called 'neuromorphic_fast': give facts or",
        ),
        ("neuromorphic --tier z", "--tier"),
        ("neuromorphic --tier a --model.span 512", "--model.span 512 is longer than the window of 256"),
        ("neuromorphic --model.span 0", "--model.span is 0: give 1 or more"),
        ("neuromorphic --lr-min 1", "--optimizer.min-lr is 1.0: give a rate from 0 to --lr"),
        ("neuromorphic --model.lifelong-steps 0", "--model.lifelong-steps is 0"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(words: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        parsed(words)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes, topology, message",
    [
        ({}, Topology(world=2, sequence=2), "--parallel.sequence 2: a column reads a token after the one before it"),
        ({"sequence_length": 20}, Topology(), "--sequence-length 20 is no whole number of spans of 8 tokens"),
    ],
)
def test_layouts_that_cannot_be(tmp_path: Path, changes: dict[str, Any], topology: Topology, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_system(small(tmp_path, **changes)).check(topology)


def test_phase_c_asks_for_an_episodic_memory(tmp_path: Path) -> None:
    documents(tmp_path / "documents")
    with pytest.raises(UserError, match="--phases C: it goes on from weights with a trained episodic memory"):
        created(small(tmp_path, phases=("C",)))
    config = small(tmp_path, phase="C")
    with pytest.raises(UserError, match="--phase C: it goes on from the checkpoint that ended B, and there is none"):
        phases_of(config, model_without_storage(config).phases, None)


def test_weights_of_phase_a_are_none_for_phase_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.run import Progress
    from pipeline.systems.neuromorphic import system

    documents(tmp_path / "documents")
    (tmp_path / "trainer_state.json").write_text(json.dumps({}))
    for phase in "AB":
        monkeypatch.setattr(system, "read_progress", lambda folder, phase=phase: Progress(phase=phase))
        config = small(tmp_path, phases=("C",), init_from=tmp_path)
        if phase == "B":
            created(config)
        else:
            with pytest.raises(UserError, match="is of phase A, which trains no episodic memory"):
                created(config)
