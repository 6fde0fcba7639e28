"""From the words of a command line to a config. Imports nothing heavy until a config is asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, shown
from pipeline.spelling import did_you_mean, nearest, nearest_flag

if TYPE_CHECKING:
    from pipeline.config import RunConfig

HELP_WORDS = ("-h", "--help", "--help-all")
SOURCES = ("data.path", "data.dataset", "data.mix", "data.tokens")
"""Fields that name what is read: one of them that a person gives replaces all of a recipe's."""
RECORDED = (
    "parallel.sequence", *SOURCES, "data.tokenizer", "output_dir", "output_root", "run_name", "run_id", "grad_accum",
    "global_batch_size", "global_batch_tokens", "steps", "stop_after", "save_every", "eval_every", "sample_every",
    "phases", "phase", "epochs.train", "epochs.save", "epochs.evaluate", "epochs.sample",
)  # fmt: skip
"""Fields whose flags mean more than their value: that a person chose it."""
PRESET = "--preset"
"""`SYSTEM --preset P` is the recipe SYSTEM_P."""
LISTED_PATHS = "--data.paths"
"""OLMo's flag for token files."""


def wants_help(words: Sequence[str]) -> bool:
    """Whether the words of a command ask for its help."""
    return not set(HELP_WORDS).isdisjoint(words)


def parse_run(words: Sequence[str], command: str, own: Any = None, ranks: int | None = None) -> RunConfig:
    """The config that `RECIPE [--config FILE] [flags]` means, or `SYSTEM --preset P` for RECIPE. Raises UserError;
    exits for --help and --help-all.

    `own`: the command's own options, a dataclass, for its help and for what a misspelt flag may have meant.
    `ranks`: how many there will be. The recipe's own sequence degree is made to fit them; one that a flag or a --config
    file gives is left alone, to be refused. Micro-batches follow from --global-batch-size. None: both stay as they are.
    """
    from pathlib import Path

    from pipeline.commands.flag_help import show_help
    from pipeline.config import IN_EPOCHS, replace
    from pipeline.config_file import load_config, states
    from pipeline.durations import by_one_measure, with_duration
    from pipeline.global_batch import in_global_batches
    from pipeline.recipes import all_recipes, describe, in_own_flags, read_foreign
    from pipeline.run_name import with_named_folder

    recipes = all_recipes()
    rest = with_listed_paths(words)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else None
    preset, rest = pop_flag(rest, PRESET)
    name = name if preset is None else preset_recipe(name, preset, recipes)
    file, rest = pop_flag(rest, "--config")
    duration, rest = pop_duration(rest)
    if file is not None:
        config = load_config(Path(file), recipes, read_foreign)
        if name is not None and name != config.recipe:
            raise UserError(f"--config {file} is a run of {config.recipe}, not of {name}: name one of them")
        name = config.recipe
    elif name is None:
        if wants_help(rest):
            note = f"RECIPE and its flags may follow: `mnemos {command} RECIPE --help` lists them."
            if own is not None:
                show_help(own, f"mnemos {command} [RECIPE]", everything=True, description=note)
            names = "\n  ".join(sorted(recipes))
            print(f"usage: mnemos {command} RECIPE [--config FILE] [flags]\n\n{note}\n\nrecipes:\n  {names}")
            raise SystemExit(0)
        raise UserError(f"{command} needs a recipe, {_some(recipes)}")
    elif name not in recipes:
        presets = presets_of(name, recipes)
        if presets:
            raise UserError(f"{name} is a system with several recipes: add {PRESET} {' or '.join(presets)}")
        meant = did_you_mean(nearest(name, recipes))
        known = f"{meant} `mnemos recipes` lists them all" if meant else f": name one {_some(recipes)}"
        raise UserError(f"unknown recipe {name!r}{known}")
    else:
        config = recipes[name]()
    program = f"mnemos {command} {name}"
    if wants_help(rest):
        everything = "--help-all" in rest
        show_help(config, program, everything=everything, own=own, description=describe(recipes[name]))
    rest = in_own_flags(recipes[name], rest)
    given: set[str] = set()
    own_steps = tuple(f"model.{name}" for name in config.model.own_steps)
    # Parsed without the recipe's own source, which what a person names replaces.
    sourceless = replace(config, data__path=(), data__dataset=None, data__mix=(), data__tokens=())
    parsed: RunConfig = parse_flags(sourceless, rest, program, own, given, (*RECORDED, *own_steps))
    if given.isdisjoint(SOURCES):
        data = config.data
        parsed = replace(
            parsed, data__path=data.path, data__dataset=data.dataset, data__mix=data.mix, data__tokens=data.tokens
        )
    if "data.tokenizer" not in given:
        chosen = file is not None and states(Path(file), "data", "tokenizer")
        parsed = with_tokenizer_of_backbone(parsed, config if chosen else recipes[name]())
    if {"phases", "phase"} <= given:
        raise UserError(
            f"--phases {' '.join(parsed.phases)} and --phase {parsed.phase} are both given: keep one; --phases names"
            " the phases of the run, and --phase runs one alone"
        )
    if "steps" in given:
        replaced: dict[str, Any] = {name.removeprefix("model."): None for name in own_steps if name not in given}
        parsed = replace(parsed, model=dataclasses.replace(parsed.model, **replaced))
    if file is not None and states(Path(file), "parallel", "sequence"):
        given.add("parallel.sequence")
    if ranks is not None and "parallel.sequence" not in given:
        parsed = replace(parsed, parallel__sequence=math.gcd(parsed.parallel.sequence, ranks))
    if file is not None and states(Path(file), "grad_accum") and not states(Path(file), "global_batch_size"):
        given.add("grad_accum")
    parsed = in_global_batches(parsed, given, ranks)
    parsed = with_duration(parsed, duration, given, ranks, own_stop=config.stop_after is not None)
    lengths = {name for pair in IN_EPOCHS.items() for name in (f"epochs.{pair[0]}", pair[1])}
    in_file = {name for name in lengths if file is not None and states(Path(file), *name.split("."))}
    parsed = by_one_measure(parsed, given | ({"max_duration"} if duration is not None else set()), in_file)
    stated = {"output_dir"} if file is not None and states(Path(file), "output_dir") else set()
    return with_named_folder(parsed, given, stated)


def with_tokenizer_of_backbone(parsed: RunConfig, recipe: RunConfig) -> RunConfig:
    """Where the recipe has the tokenizer of its pretrained backbone, and another backbone is named: that one's. Raises
    UserError for one of a GGUF file, whose tokenizer is in another form."""
    from pipeline.config import replace
    from pipeline.files.given_path import expanded, is_gguf

    own, other = (getattr(run.model, "backbone", None) for run in (recipe, parsed))
    if own is None or other is None:
        return parsed
    mine, named = (getattr(backbone, "pretrained", None) for backbone in (own, other))
    if named is None or named == mine or recipe.data.tokenizer != mine:
        return parsed
    if is_gguf(named) and not parsed.data.tokens:
        raise UserError(
            f"--model.backbone.pretrained {named}: the tokenizer of a GGUF file is not read from it: give a folder with"
            " one, --data.tokenizer DIR"
        )
    at = "" if other.revision == own.revision or expanded(named).exists() else f"@{other.revision}"
    return replace(parsed, data__tokenizer=named + at)


def _some(recipes: Iterable[str]) -> str:
    """Those that run anywhere, and where the others are."""
    *most, last = sorted(name for name in recipes if name.endswith("_tiny"))
    return f"such as {', '.join(most)} or {last}: `mnemos recipes` lists them all"


def presets_of(system: str, recipes: Collection[str]) -> list[str]:
    """What may follow `--preset` behind a system's name."""
    return sorted(recipe.removeprefix(f"{system}_") for recipe in recipes if recipe.startswith(f"{system}_"))


def preset_recipe(system: str | None, preset: str, recipes: Collection[str]) -> str:
    """The recipe that `SYSTEM --preset P` means. Raises UserError."""
    if system is None:
        raise UserError(f"{PRESET} {shown(preset)}: name the system before it, such as `train SYSTEM {PRESET} small`")
    recipe = f"{system}_{preset}"
    if recipe in recipes:
        return recipe
    known = presets_of(system, recipes)
    if system in recipes and not known:
        raise UserError(f"{PRESET} {shown(preset)}: {system} is a recipe by itself: leave {PRESET} out")
    fix = f"give {' or '.join(known)}" if known else "`mnemos recipes` lists all recipes"
    raise UserError(f"{PRESET} {shown(preset)}: no recipe is called {shown(recipe)}: {fix}")


def parse_flags(
    default: Any,
    words: Sequence[str],
    program: str,
    own: Any = None,
    given: set[str] | None = None,
    recorded: Collection[str] = RECORDED,
) -> Any:
    """A dataclass with flags over it. Raises UserError in one line instead of tyro's box; exits for --help.

    `own`: as in `parse_run`. `given`, for a run: takes those of `recorded` whose flags are among the words.
    """
    import contextlib
    import io

    import tyro

    from pipeline.commands.flag_help import flag_names, show_help
    from pipeline.commands.given import recording

    if wants_help(words):
        show_help(default, program, everything="--help-all" in words, own=own)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(captured):
            parsed, unknown = tyro.cli(
                type(default),
                default=default,
                args=words,
                prog=program,
                config=(tyro.conf.AvoidSubcommands,),
                return_unknown_args=True,
                registry=None if given is None else recording(default, recorded, given),
            )
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise UserError(f"{_message(captured.getvalue())} (see {program} --help)") from None
    flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
    if flag is not None:
        known = [*flag_names(default, *([own] if own is not None else [])), "--config", PRESET, *HELP_WORDS]
        meant = did_you_mean(nearest_flag(flag, known))
        raise UserError(f"unknown flag {flag}{meant} (see {program} --help{'' if meant else '-all'})")
    if unknown:
        raise UserError(f"{unknown[0]!r} belongs to no flag (see {program} --help)")
    return parsed


def _message(box: str) -> str:
    """What tyro's box says, in one line: its first paragraph."""
    paragraphs = [""]
    for line in box.splitlines():
        text = line.strip("╭╮╰╯│─- \t") if not line.strip(" │").startswith("--") else line.strip(" │")
        if line.startswith("╭") or not text.strip("─-"):
            paragraphs.append("")
        else:
            paragraphs[-1] = f"{paragraphs[-1]} {text}".strip()
    # A terminal's box has its title in the border; a plain one has it as a paragraph of its own.
    found = [text for text in paragraphs if text]
    return (found[0] if box.startswith("╭") else found[min(1, len(found) - 1)]).rstrip(".")


def pop_flag(words: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag, None where it is absent, and the words without it."""
    for index, word in enumerate(words):
        if word == flag:
            if index + 1 == len(words):
                raise UserError(f"{flag} needs a value")
            return words[index + 1], words[:index] + words[index + 2 :]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2], words[:index] + words[index + 1 :]
    return None, words


def pop_duration(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--max-duration`, the last one where it is given twice, and the words without it."""
    last, rest = None, list(words)
    for flag in ("--max-duration", "--max_duration"):
        value, rest = pop_flag(rest, flag)
        while value is not None:
            last = value
            value, rest = pop_flag(rest, flag)
    return last, rest


def with_listed_paths(words: Sequence[str]) -> list[str]:
    """The words with `--data.paths='[FILE, ...]'`, as OLMo's trainer takes it, in the form of `--data.tokens FILE ...`.
    Raises UserError where the value is no list."""
    file, rest = pop_flag(list(words), LISTED_PATHS)
    if file is None:
        return rest
    names = [name.strip().strip("'\"") for name in file.strip().removeprefix("[").removesuffix("]").split(",")]
    if not (file.strip().startswith("[") and file.strip().endswith("]") and all(names)):
        raise UserError(f"{LISTED_PATHS}={file}: give a list, {LISTED_PATHS}='[FILE, ...]', or --data.tokens FILE ...")
    return [*rest, "--data.tokens", *names]


def split_flags(
    words: Sequence[str], names: Sequence[str], *, numbers: str = "", switches: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Words of the flags in `names` (with their values), and the others.

    `numbers`: a flag that takes all numbers behind it. `switches`: flags without a value.
    """
    own: list[str] = []
    rest: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        name = word.removeprefix("--") if word.startswith("--") else ""
        if name and name in switches:
            own.append(word)
        elif name and name == numbers:
            own.append(word)
            while pending and pending[0].isdigit():
                own.append(pending.pop(0))
        elif name.partition("=")[0] in names and name:
            own.append(word)
            if "=" not in word and pending:
                own.append(pending.pop(0))
        else:
            rest.append(word)
    return own, rest
