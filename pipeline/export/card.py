"""The model card: what was trained, on what, and the figures that its run left, each with its command."""

from __future__ import annotations

import json
import math
import shlex
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import __version__
from pipeline.callbacks.metrics import read_rows
from pipeline.checkpoint.restore import TRAINER_STATE, read_progress
from pipeline.config_file import to_plain
from pipeline.errors import brief
from pipeline.files.json_file import parse_json
from pipeline.files.run_file import NAME as RUN_FILE
from pipeline.inference.trained import Trained

TEMPLATE = Path(__file__).with_name("model_card.md")
README = "README.md"
NOT_SHOWN = ("output_dir", "resume", "init_from", "run_name", "run_id", "dry_run", "profile")
"""Fields of a config that say where a run's files lay, or how it was started."""
PASSED = ("step", "phase_step", "tokens", "elapsed")
"""Numbers of a `val` row that were not measured on held-out data."""
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
    if (trained.checkpoint / TRAINER_STATE).is_file():
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
    lines = ["| figure | value | command |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value:.6g} | `{command}` |" for name, value, command in rows)])


def _in_training(checkpoint: Path, run: Path) -> Iterator[tuple[str, float, str]]:
    """Of the run's own evaluation at the step of the checkpoint."""
    path, words = run / "metrics.jsonl", _run_file(run).get("command")
    if not path.is_file() or not isinstance(words, list):
        return
    step = checkpoint.name.rpartition("-")[2]
    command = shlex.join(["mnemos", *(_place(str(word)) for word in words[1:])])
    for row in reversed(read_rows(path)):
        if row["mode"] == "val" and str(row["step"]) == step:
            yield from (
                (name, value, command) for name, value in row.items() if name not in PASSED and _is_number(value)
            )
            return


def _evaluations(checkpoint: Path, run: Path) -> Iterator[tuple[str, float, str]]:
    """What `mnemos eval` has written of the checkpoint, beside its run."""
    folder = run / "evals" / checkpoint.name
    for path in sorted(folder.rglob("evaluation.json")):
        suite = path.parent.relative_to(folder).as_posix()
        words = ["mnemos", "eval", checkpoint.name, *([] if suite == "." else ["--suite", suite])]
        scalars = _object(path).get("scalars")
        for name, value in (scalars if isinstance(scalars, dict) else {}).items():
            if _is_number(value):
                yield name, value, shlex.join(words)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
