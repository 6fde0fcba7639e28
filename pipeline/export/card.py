"""The model card: what was trained, on what, and the figures that its run left, each with its command."""

from __future__ import annotations

import json
import math
import shlex
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import __version__
from pipeline.callbacks.metrics import read_rows
from pipeline.checkpoint.manifest import problems
from pipeline.checkpoint.restore import TRAINER_STATE, read_progress
from pipeline.config_file import to_plain
from pipeline.errors import brief
from pipeline.evaluation_result import CHANCE, COUNT, STDERR, TASKS, has_chance
from pipeline.files.json_file import parse_json
from pipeline.files.run_file import NAME as RUN_FILE
from pipeline.inference.trained import Trained

TEMPLATE = Path(__file__).with_name("model_card.md")
README = "README.md"
NOT_SHOWN = ("output_dir", "resume", "init_from", "run_name", "run_id", "output_root", "dry_run", "profile")
"""Fields of a config that say where a run's files lay, or how it was started."""
PASSED = ("step", "phase_step", "tokens", "elapsed")
"""Numbers of a `val` row that were not measured on held-out data."""
COUNTED = ("labels", "documents")
"""Scalars that say what the others beside them were measured on."""
LOSSES = ("loss", "ppl", "bpb")
NOT_RECORDED = "not recorded"
USE_MODEL = """\
```python
from transformers import pipeline

generate = pipeline("text-generation", "{folder}"{trusted})
print(generate({prompt}, max_new_tokens=50)[0]["generated_text"])
```"""
USE_IDS = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}"{trusted})
```"""

USE_MEMORY = """\
```bash
mnemos train RECIPE {flags} --model.memory.pretrained {folder}
```"""


@dataclass(frozen=True)
class Facts:
    """What the card says besides what the checkpoint does."""

    title: str
    summary: str
    use: str
    checked: str
    is_model: bool = True
    """Whether transformers loads the folder, as which the Hub then shows it."""


def use_model(folder: str, *, has_tokenizer: bool, trusts_code: bool) -> str:
    """Lines of Python that load a folder, for people who have transformers."""
    trusted = ", trust_remote_code=True" if trusts_code else ""
    lines = USE_MODEL if has_tokenizer else USE_IDS
    return lines.format(folder=folder, trusted=trusted, prompt='"def load(path):"')


def use_memory(folder: str, flags: str) -> str:
    """The command that attaches a memory to its base, for people who have this project."""
    return USE_MEMORY.format(folder=folder, flags=flags)


def write_card(trained: Trained, folder: Path, facts: Facts) -> None:
    """Writes README.md into a folder, from the template beside this module."""
    config, run = trained.config, _run_folder(trained.checkpoint)
    base = getattr(getattr(config.model, "backbone", None), "pretrained", None)
    versions = trained.manifest.get("versions") or {}
    commit = _run_file(run).get("commit")
    text = string.Template(TEMPLATE.read_text()).substitute(
        library="library_name: transformers\npipeline_tag: text-generation\n" if facts.is_model else "",
        tags="\n".join(f"- {tag}" for tag in ("mnemos", trained.config.recipe)),
        base_model=f"base_model: {base}\n" if base and not Path(base).exists() else "",
        title=facts.title,
        summary=facts.summary,
        use=facts.use,
        training=_lines(_training(trained)),
        data=_lines(_data(trained)),
        figures=_figures(trained.checkpoint, run) or "None: no evaluation of this checkpoint lies beside its run.",
        checked=facts.checked,
        config=yaml.safe_dump(_shown(to_plain(config)), sort_keys=False).strip(),
        version=versions.get("mnemos") or __version__,
        commit=f", commit {commit}" if isinstance(commit, str) else "",
    )
    (folder / README).write_text(text)


def _lines(facts: Mapping[str, object]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _training(trained: Trained) -> dict[str, object]:
    config, manifest = trained.config, trained.manifest
    counts = {"trained": 0, "frozen": 0}
    for name, parameter in trained.model.named_parameters():
        counts["trained" if name in trained.trained else "frozen"] += parameter.numel()
    frozen = f", and {counts['frozen']:,} stayed as they were" if counts["frozen"] else ""
    found: dict[str, object] = {
        "recipe": f"`{config.recipe}`",
        "parameters": f"{counts['trained']:,} were trained{frozen}",
        "steps": f"{manifest['step']:,} of {config.steps:,}",
    }
    # Damaged, it is a figure less.
    if (trained.checkpoint / TRAINER_STATE).is_file() and not problems(
        trained.checkpoint, hashes=True, only=(TRAINER_STATE,)
    ):
        found["tokens with a label"] = f"{read_progress(trained.checkpoint).tokens:,}"
    if "global_batch" in manifest:
        found["sequences a step"] = f"{manifest['global_batch']:,}, of {config.sequence_length:,} tokens each"
    beta, other = config.optimizer.betas
    found["optimizer"] = (
        f"AdamW, learning rate {config.lr:g}, {config.warmup_steps:,} steps of warm-up, {config.optimizer.schedule}"
        f" schedule, betas {beta:g} and {other:g}, weight decay {config.weight_decay:g}"
    )
    return found


def _data(trained: Trained) -> dict[str, object]:
    data = trained.config.data
    found: dict[str, object] = {}
    if data.recall is not None:
        found["task"] = "synthetic recall: keys and values, a gap, queries"
    for name, value in (
        ("token files", data.tokens), ("files", data.path), ("mixture", data.mix), ("data set", data.dataset),
    ):  # fmt: skip
        if value:
            found[name] = ", ".join(map(_place, value)) if isinstance(value, tuple) else value
    if not found:
        found["data set"] = "the source files of the Python standard library"
    if data.recall is None:
        found["tokenizer"] = f"`{_place(data.tokenizer)}`"
    if not data.tokens and data.recall is None:
        found["held out"] = f"{data.holdout:.2%} of the documents, by a hash of each"
    fingerprint = trained.manifest.get("data_fingerprint")
    if fingerprint:
        found["fingerprint"] = f"`{brief(json.dumps(fingerprint, sort_keys=True), 400)}`"
    return found


def _place(name: str) -> str:
    """Of a path, what means something elsewhere."""
    return Path(name).name if name.startswith(("/", "~", "..")) else name


def _shown(plain: dict[str, Any]) -> dict[str, Any]:
    """A config without where files lay."""

    def places(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: places(item) for key, item in value.items()}
        if isinstance(value, list):
            return [places(item) for item in value]
        return _place(value) if isinstance(value, str) else value

    return {key: places(value) for key, value in plain.items() if key not in NOT_SHOWN}


def _run_folder(checkpoint: Path) -> Path:
    inside = checkpoint.absolute().parent
    return inside.parent if inside.name == "checkpoints" else inside


def _run_file(run: Path) -> dict[str, Any]:
    return _object(run / RUN_FILE)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where it is absent or damaged: a figure less."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _figures(checkpoint: Path, run: Path) -> str:
    rows = [*_in_training(checkpoint, run), *_evaluations(checkpoint, run)]
    if not rows:
        return ""
    lines = ["| figure | value | measured with | command |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _in_training(checkpoint: Path, run: Path) -> Iterator[tuple[str, ...]]:
    """Of the run's own evaluation at the step of the checkpoint."""
    path, words = run / "metrics.jsonl", _run_file(run).get("command")
    if not path.is_file() or not isinstance(words, list):
        return
    step = checkpoint.name.rpartition("-")[2]
    for row in reversed(read_rows(path)):
        if row["mode"] == "val" and str(row["step"]) == step:
            yield from _rows({name: value for name, value in row.items() if name not in PASSED}, words)
            return


def _evaluations(checkpoint: Path, run: Path) -> Iterator[tuple[str, ...]]:
    """What `mnemos eval` has written of the checkpoint, beside its run."""
    folder = run / "evals" / checkpoint.name
    for path in sorted(folder.rglob("evaluation.json")):
        content = _object(path)
        scalars, words = content.get("scalars"), content.get("command")
        if isinstance(scalars, dict):
            yield from _rows(scalars, words if isinstance(words, list) else ())


def _rows(scalars: Mapping[str, Any], words: Sequence[Any]) -> Iterator[tuple[str, ...]]:
    """A row a figure, with what belongs to it: standard error, count and chance are no figures of their own."""
    numbers = {name: value for name, value in scalars.items() if _is_number(value)}
    command = f"`{_command(words)}`" if words else NOT_RECORDED
    for name, value in numbers.items():
        if name.rpartition("/")[2] not in COUNTED and not _is_fact_of_task(name, numbers):
            yield name, f"{value:.6g}", ", ".join(_measured(name, numbers)), command


def _is_fact_of_task(name: str, numbers: Mapping[str, float]) -> bool:
    """Whether a number says something of the score of a task, or of its documents."""
    if not name.startswith(TASKS):
        return False
    return name.endswith((CHANCE, COUNT)) or (name.endswith(STDERR) and name.removesuffix(STDERR) in numbers)


def _measured(name: str, numbers: Mapping[str, float]) -> Iterable[str]:
    scope, _, last = name.rpartition("/")
    if name.startswith(TASKS):
        if f"{name}{STDERR}" in numbers:
            yield f"standard error {numbers[f'{name}{STDERR}']:.3g}"
        if f"{scope}{COUNT}" in numbers:
            yield f"n {numbers[f'{scope}{COUNT}']:,.0f}"
        if f"{scope}{CHANCE}" in numbers and has_chance(last):
            yield f"chance {numbers[f'{scope}{CHANCE}']:.4g}"
        return
    own = {what: numbers.get(f"{scope}/{what}" if scope else what) for what in COUNTED}
    if not any(own.values()) and (last in LOSSES or "loss" not in numbers):
        # With a part of the model left out, the same documents are read.
        own = {what: numbers.get(what) for what in COUNTED}
    yield from (f"{count:,.0f} {what}" for what, count in own.items() if count is not None)


def _command(words: Sequence[Any]) -> str:
    """The words of a command, without where files lay, for a cell of a table."""
    shown = ["mnemos"]
    for word in map(str, words[1:]):
        flag, equals, value = word.partition("=")
        shown.append(f"{flag}={_place(value)}" if equals and flag.startswith("--") else _place(word))
    return shlex.join(shown).replace("|", "\\|")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
