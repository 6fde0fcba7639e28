"""Flags of the prototype's trainer that are no field here: what they mean as flags of the engine, or which to use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError, shown

TOKENIZERS = {
    "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "llama2": "meta-llama/Llama-2-7b-hf",
    "smollm": "HuggingFaceTB/SmolLM2-135M",
    "gpt-neox": "EleutherAI/gpt-neox-20b",
}
"""The prototype's short names of tokenizers whose name on the hub is another one."""
DECODER = {"--snapshot": "--model.decoder", "--no-snapshot": "--model.no-decoder"}
"""The prototype's switch of the spatial decoder."""
FOLDERS = ("--output-dir", "--output-root", "--run-name", "--run-id")
CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
"""Where a run directory has its checkpoints and its metrics."""


def in_own_flags(words: Sequence[str]) -> list[str]:
    """The words with --save-dir and --metrics-file in the form of --output-dir, --phases A,B of --phases A B, short
    names of tokenizers as those of the hub, and --no-snapshot as --model.no-decoder. Raises UserError for what cannot
    be said here, with the flag to use."""
    folders: dict[str, tuple[str, Path]] = {}
    rest: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in ("--save-dir", "--metrics-file"):
            if not equals and not pending:
                raise UserError(f"{flag} needs a value")
            value = value if equals else pending.pop(0)
            folders[flag] = (value, _run_directory(flag, value))
        elif flag in DECODER and not equals:
            rest.append(DECODER[flag])
        elif flag in ("--tokenizer", "--data.tokenizer") and (equals or pending):
            rest += [flag, _tokenizer(value if equals else pending.pop(0))]
        elif flag == "--phases" and (equals or pending):
            rest += [flag, *(value if equals else pending.pop(0)).split(",")]
        else:
            rest.append(word)
    return [*rest, *_output_directory(folders, rest)]


def _tokenizer(name: str) -> str:
    # A folder of that name is meant where there is one.
    return name if Path(name).exists() else TOKENIZERS.get(name, name)


def _run_directory(flag: str, value: str) -> Path:
    """The run directory whose checkpoints, or whose metrics, the prototype would write to `value`."""
    path = Path(value)
    if flag == "--save-dir":
        return path.parent if path.name == CHECKPOINTS else path
    if path.name != METRICS:
        raise UserError(
            f"{flag} {shown(value)}: a run has its metrics in {METRICS} of its folder: give DIR/{METRICS}, or"
            " --output-dir DIR"
        )
    return path.parent


def _output_directory(folders: dict[str, tuple[str, Path]], rest: Sequence[str]) -> list[str]:
    """--output-dir with the one folder that the prototype's flags mean. Raises UserError where there is another."""
    if not folders:
        return []
    flag, (value, folder) = next(iter(folders.items()))
    given = next((word.partition("=")[0] for word in rest if word.partition("=")[0].replace("_", "-") in FOLDERS), None)
    if given is not None:
        raise UserError(f"{flag} and {given} are both given, and each names the run directory: keep {given}")
    for other, (name, directory) in folders.items():
        if directory != folder:
            raise UserError(
                f"{flag} {shown(value)} and {other} {shown(name)} are of two folders, and a run has one: give"
                " --output-dir DIR, which has checkpoints/ and metrics.jsonl"
            )
    return ["--output-dir", str(folder)]
