"""Settings of the guide's config.py that are no field: what they mean as flags, or which flag takes their place."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import UserError, shown
from pipeline.systems.cvfp.phase import FIXED_POINT, PREDICTION

SWITCHES = ("skip-phase1", "skip-phase2", "save-checkpoint", "load-checkpoint")
VALUES = ("vocab-size", "device")
SAID = {"true": True, "1": True, "false": False, "0": False}


def in_own_flags(words: Sequence[str]) -> list[str]:
    """The words with --skip-phase1, --skip-phase2 and --load-checkpoint in the form of --phases and --resume, each also
    with --no- or a value. Raises UserError for what cannot be said here, with the flag to use."""
    switches, values, rest = _taken(words)
    skipped = [name for name in ("skip-phase1", "skip-phase2") if switches.get(name)]
    if skipped and _has(rest, "--phases", "--phase"):
        raise UserError(f"--{skipped[0]} with --phases, which says the same: leave one out")
    if len(skipped) == 2:
        raise UserError("--skip-phase1 and --skip-phase2 leave nothing to run: give one of them")
    if "skip-phase1" in skipped:
        if not _has(rest, "--init-from"):
            raise UserError(
                "--skip-phase1: a run goes on by itself after the phases that it has done; to begin another one with"
                " the second phase, name the checkpoint of the first: --init-from CHECKPOINT"
            )
        rest += ["--phases", PREDICTION]
    if "skip-phase2" in skipped:
        rest += ["--phases", FIXED_POINT]
    if switches.get("save-checkpoint") is False:
        raise UserError(
            "--no-save-checkpoint: a run ends with a checkpoint: give --epochs.save 0 --save-every 0 for none before"
        )
    if "load-checkpoint" in switches:
        if _has(rest, "--resume", "--resume-from"):
            raise UserError("--load-checkpoint with --resume, which says the same: leave one out")
        rest += ["--resume", "auto" if switches["load-checkpoint"] else "never"]
    if "vocab-size" in values:
        raise UserError(
            f"--vocab-size {shown(values['vocab-size'])}: the vocabulary is the tokenizer's: give --data.tokenizer"
        )
    if "device" in values:
        raise UserError(
            f"--device {shown(values['device'])}: a GPU is taken where there is one: set DS_ACCELERATOR=cpu before the"
            " command for the CPU"
        )
    return rest


def _has(words: Sequence[str], *flags: str) -> bool:
    return any(word.partition("=")[0] in flags for word in words)


def _taken(words: Sequence[str]) -> tuple[dict[str, bool], dict[str, str], list[str]]:
    """The guide's switches and values among the words, and the other words. Raises UserError."""
    switches: dict[str, bool] = {}
    values: dict[str, str] = {}
    rest: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("_", "-") if flag.startswith("--") else ""
        on, name = not name.startswith("no-"), name.removeprefix("no-")
        if name in SWITCHES:
            if not equals and pending and pending[0].lower() in SAID:
                value = pending.pop(0)
            elif not equals:
                value = "true"
            if value.lower() not in SAID:
                raise UserError(f"{flag} is {shown(value)}: give it alone, or true or false")
            switches[name] = SAID[value.lower()] == on
        elif name in VALUES and on:
            values[name] = value if equals else pending.pop(0) if pending else ""
        else:
            rest.append(word)
    return switches, values, rest
