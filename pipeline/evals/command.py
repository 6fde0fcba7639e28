"""`eval CHECKPOINT`: held-out perplexity by position and recall by distance, with the memory on, emptied and off; or
another suite. `eval FOLDER`: tasks of a model without a run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.callbacks.heat_map import draw_heat_map
from pipeline.callbacks.plots import caption, draw_curve
from pipeline.callbacks.samples import finite, write_samples
from pipeline.checkpoint.manifest import LATEST, MANIFEST, pointed, problems
from pipeline.checkpoint.restore import read_progress
from pipeline.commands.command_help import HELP
from pipeline.commands.flags import parse_flags, wants_help
from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.errors import UserError
from pipeline.evals.folder import evaluate_folder, is_model_folder
from pipeline.evals.suites import Chosen, pop_suite
from pipeline.evaluation_result import TASKS, Table
from pipeline.files.output import writing
from pipeline.host.versions import versions
from pipeline.inference.trained import no_checkpoint
from pipeline.load import checked_system, load_model
from pipeline.parallel.collectives import shared_errors
from pipeline.recipes import all_recipes
from pipeline.runtime.ranks import describe_devices, device_of, start, stop
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Curve, Evaluation

RAW = "--raw-weights"
"""The switch for the weights of the last update, where the checkpoint has a moving average of them."""


def run_eval(words: Sequence[str]) -> None:
    """The command. Any flag of the recipe may follow the checkpoint; the result goes beside the checkpoint's run."""
    if not words or words[0].startswith("-"):
        raise UserError("eval needs a checkpoint: mnemos eval OUT/checkpoints/checkpoint-500")
    checkpoint = find_checkpoint_folder(Path(words[0])).absolute()
    command = ["mnemos", "eval", *words]
    suite, flags = pop_suite(words[1:])
    if is_model_folder(checkpoint):
        if wants_help(flags):
            print(HELP["eval"])
            return
        evaluation, facts = evaluate_folder(checkpoint, suite, flags)
        report(evaluation, checkpoint, suite, {**facts, "command": command}, checkpoint.name)
        return
    raw, flags = RAW in flags, [word for word in flags if word != RAW]
    if not (checkpoint / MANIFEST).is_file():
        raise UserError(f"{checkpoint}: {no_checkpoint(checkpoint)}")
    wrong = problems(checkpoint, hashes=False) or problems(checkpoint, hashes=True, only=("config.yaml",))
    if wrong:
        raise UserError(wrong[0])
    config = parse_flags(load_config(checkpoint / "config.yaml", all_recipes()), flags, f"mnemos eval {words[0]}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % config.parallel.sequence:
        # A checkpoint of two sequence ranks is evaluated on one laptop as well.
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, sequence=1))
    try:
        topology = start(config)
        system = checked_system(config, topology)
        suite.check(system)
        suite = suite.prepared(system, checkpoint, topology)
        if not suite.suite.reads_data:
            config = without_data(config)
            system = checked_system(config, topology)
        loaded = load_model(config, system, topology, weights=checkpoint, raw=raw)
        with shared_errors(topology):
            name = read_progress(checkpoint).phase
        # One of before phases had names has one phase.
        phase = next((phase for phase in loaded.phases if phase.name == name), loaded.phases[0])
        evaluation = suite.run(system, loaded.model.to(device_of(topology)), phase, SyncPoint(topology))
        if topology.rank == 0:
            facts = {"machine": describe_devices(topology), "checkpoint": checkpoint.name, "command": command}
            report(evaluation, checkpoint, suite, facts, caption(config.recipe, system.caption(), checkpoint.name))
    finally:
        stop()


def report(evaluation: Evaluation, path: Path, suite: Chosen, facts: Mapping[str, object], subtitle: str) -> None:
    """Prints the result and writes it: beside the run's checkpoints; a checkpoint that was copied elsewhere, and a
    model without a run, keep theirs beside themselves."""
    beside = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    folder = beside / "evals" / path.name / suite.folder
    write(evaluation, folder, {"versions": versions(), **facts}, subtitle)
    print(render(evaluation))
    print(f"written to {folder}")


def without_data(config: RunConfig) -> RunConfig:
    """The run without the files that it trained on, which need not be here."""
    data = dataclasses.replace(config.data, path=(), dataset=None, mix=(), tokens=(), held_out_tokens=())
    return dataclasses.replace(config, data=data)


def find_checkpoint_folder(path: Path) -> Path:
    """A checkpoint folder; checkpoints/best means the one that this file names, a run folder that of its `latest`."""
    path = pointed(path)
    latest = path / "checkpoints" / LATEST
    if latest.is_file():
        return path / "checkpoints" / latest.read_text().strip()
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint")
    return path


def write(evaluation: Evaluation, folder: Path, facts: dict[str, object], subtitle: str = "") -> None:
    """evaluation.json, per curve a PNG, titled with what it is of, and its numbers, and the samples below samples/."""
    path = folder / "evaluation.json"
    scalars = {name: value if math.isfinite(value) else None for name, value in evaluation.scalars.items()}
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        content = {**facts, "scalars": scalars, **{name: finite(table) for name, table in evaluation.tables.items()}}
        path.write_text(json.dumps(content, indent=2) + "\n")
    with writing(folder):
        for name, curve in evaluation.curves.items():
            draw_curve(curve, folder / f"{name}.png", subtitle)
        for name, heat_map in evaluation.heat_maps.items():
            draw_heat_map(heat_map, folder / f"{name}.png", subtitle)
    write_samples(evaluation.samples, folder / "samples")


def render(evaluation: Evaluation) -> str:
    """Scalars but those that stand in tables, then each curve as a table, then the tables."""
    scalars = {name: value for name, value in evaluation.scalars.items() if not name.startswith(TASKS)}
    lines = [f"{name:<24} {value:.6g}" for name, value in scalars.items()]
    for curve in evaluation.curves.values():
        lines += ["", *_table(curve)]
    for table in evaluation.tables.values():
        lines += [*([""] if lines else []), *_rows(table)]
    return "\n".join(lines)


def _rows(table: Table) -> list[str]:
    """Rows under the names of their columns, words to the left and numbers to the right."""
    columns = [[name.replace("_", " "), *(_cell(row[name]) for row in table)] for name in (table[0] if table else ())]
    words = [any(isinstance(row[name], str) for row in table) for name in (table[0] if table else ())]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.ljust(width) if is_word else cell.rjust(width)
            for cell, width, is_word in zip(cells, widths, words, strict=True)
        ).rstrip()
        for cells in zip(*columns, strict=True)
    ]


def _cell(value: str | float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(curve: Curve) -> list[str]:
    labels = list(curve.series)
    lines = [
        f"{curve.title}: {curve.y_label}",
        f"{curve.x_label:>48}  " + "  ".join(f"{label:>12}" for label in labels),
    ]
    places = [name.replace("\n", ", ") for name in curve.names] or [f"{x:g}" for x in curve.x]
    for index, place in enumerate(places):
        values = [curve.series[label][index] for label in labels]
        if any(math.isfinite(value) for value in values):
            lines.append(f"{place:>48}  " + "  ".join(f"{value:>12.4g}" for value in values))
    return lines
