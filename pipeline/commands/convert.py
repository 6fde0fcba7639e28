"""`checkpoint convert`: to DeepSpeed's universal format, to OLMo's native layout, and from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.units import human_bytes

CONVERT = """\
usage: mnemos checkpoint convert CHECKPOINT DIR
       mnemos checkpoint convert CHECKPOINT DIR --to olmo [--tokenizer NAME]
       mnemos checkpoint convert FOLDER DIR --from olmo

Writes a checkpoint to the new folder DIR in the universal format, which any number of ranks and any ZeRO stage can
resume from. CHECKPOINT is a checkpoint's folder, or a run directory for its newest complete one; it stays as it is.

  --to olmo    write DIR/step{N}-unsharded as OLMo's trainer does: model.pt, optim.pt, train.pt and config.yaml, of a
               system that trains an OLMo or OLMo 2 decoder and nothing besides
  --from olmo  FOLDER is such a folder; DIR becomes a checkpoint in the universal format, to resume from, or to take the
               weights from with --init-from
  --tokenizer NAME  with --to olmo: the tokenizer of the run, as --data.tokenizer, where its token files do not say, say
                    several, or name one that is elsewhere now"""
TOKENIZER = "--tokenizer"
FORMAT_FLAGS = ("--to", "--from", TOKENIZER)
UNIVERSAL = "universal"


def check_format(flags: Mapping[str, str | None]) -> str | None:
    """The flag that names OLMo's layout; None where the universal format is meant. Raises UserError."""
    from pipeline.lm.olmo_folder import NATIVE

    given = [flag for flag in ("--to", "--from") if flag in flags]
    if TOKENIZER in flags and (given != ["--to"] or flags["--to"] != NATIVE):
        raise UserError(f"checkpoint convert: {TOKENIZER} goes with --to {NATIVE} alone: leave it out")
    if len(given) > 1:
        raise UserError("checkpoint convert: --to and --from are both given: convert in two steps")
    if not given or (given == ["--to"] and flags["--to"] == UNIVERSAL):
        return None
    known = [NATIVE] if given == ["--from"] else [NATIVE, UNIVERSAL]
    if flags[given[0]] not in known:
        raise UserError(f"checkpoint convert {given[0]} {flags[given[0]]}: give {' or '.join(known)}")
    return given[0]


def to_universal(checkpoint: Path, out: Path) -> None:
    """Writes a checkpoint in the universal format. Raises UserError."""
    from pipeline.checkpoint.universal import convert

    begun = time.perf_counter()
    convert(checkpoint, out)
    print(f"{checkpoint} -> {out}: {_size(out)} in the universal format, {time.perf_counter() - begun:.1f} s")
    print(f"resume from it on any number of ranks and any ZeRO stage: train RECIPE --resume {out} --output-dir NEW_DIR")


def to_native(checkpoint: Path, out: Path, tokenizer: str | None = None) -> None:
    """Writes a checkpoint below `out` as OLMo's trainer does. `tokenizer`: in place of the run's, where that is not
    known. Raises UserError."""
    import dataclasses

    from pipeline.capabilities import TrainsDecoder
    from pipeline.checkpoint.loader_state import dtypes_at, makers_at
    from pipeline.checkpoint.manifest import manifest_with, problems
    from pipeline.checkpoint.olmo_native import Decoder, write_native
    from pipeline.config_file import load_config
    from pipeline.data.run_tokenizer import is_here, run_tokenizer
    from pipeline.lm.olmo_config import model_section
    from pipeline.lm.olmo_folder import CONFIG
    from pipeline.recipes import all_recipes
    from pipeline.system import create_system

    begun = time.perf_counter()
    wrong = problems(checkpoint, hashes=True, only=(CONFIG,))
    if wrong:
        raise UserError(wrong[0])
    run = load_config(checkpoint / CONFIG, all_recipes())
    system = create_system(run)
    if not isinstance(system, TrainsDecoder):
        raise UserError(
            f"{checkpoint}: a checkpoint of {run.recipe}, which is more than a decoder: OLMo's layout has no place for"
            " the rest; give one of a recipe that trains an OLMo"
        )
    config, makers = system.decoder_config(), makers_at(checkpoint)
    data = run.data if tokenizer is None else dataclasses.replace(run.data, tokenizer=tokenizer)
    dtypes = dtypes_at(checkpoint)
    if data.tokens and len(dtypes) > 1:
        raise UserError(
            f"{checkpoint}: its token files hold {' and '.join(sorted(dtypes))}, and OLMo reads files of one dtype"
            " alone: write them all as uint32, and convert a checkpoint of a run that went on from it with those"
            " (--data.on-change accept)"
        )
    if data.tokens and dtypes:
        # OLMo takes uint16 unless its file says otherwise.
        dtype: Any = dtypes.pop()
        data = dataclasses.replace(data, token_dtype=dtype)
    stated = data.eos_id if data.tokens else None
    if stated is not None and not any(makers) and not is_here(data.tokenizer):
        # All that is asked of it is known, and a name needs no network.
        vocabulary, eos = config.vocab_size, stated
    else:
        made_by = run_tokenizer(data, config.vocab_size, makers, given=tokenizer, fix=f"give {TOKENIZER} NAME")
        vocabulary, eos = made_by.vocab_size, made_by.eos_id if stated is None else stated
        data = dataclasses.replace(data, tokenizer=made_by.name)
    # The config.yaml names it.
    run = dataclasses.replace(run, data=data)
    system = create_system(run)
    assert isinstance(system, TrainsDecoder)
    section = model_section(config, vocabulary=vocabulary, eos=eos, length=run.sequence_length)
    content = system.native_config(section, manifest_with(checkpoint, "global_batch")["global_batch"])
    written = write_native(checkpoint, out, Decoder(config, system.decoder_prefix), run, content)
    print(f"{checkpoint} -> {written}: {_size(written)} in OLMo's layout, {time.perf_counter() - begun:.1f} s")


def from_native(folder: Path, out: Path) -> None:
    """Writes a folder of OLMo's as a checkpoint in the universal format. Raises UserError."""
    from pipeline.capabilities import TrainsDecoder
    from pipeline.checkpoint.olmo_native import Decoder, read_native
    from pipeline.global_batch import in_global_batches
    from pipeline.inference.load import native_run
    from pipeline.lm.olmo_folder import CONFIG
    from pipeline.load import model_without_storage

    begun = time.perf_counter()
    run = native_run(folder)
    # On one rank: a resume on others keeps the sequences of a step.
    run = in_global_batches(run, (), 1)
    built = model_without_storage(run)
    assert isinstance(built.system, TrainsDecoder)
    decoder = Decoder(built.system.decoder_config(), built.system.decoder_prefix)
    lacks = read_native(folder, out, decoder, run, built.phases[0].name)
    print(f"{folder} -> {out}: {_size(out)} in the universal format, {time.perf_counter() - begun:.1f} s")
    for what in lacks:
        print(f"{folder}: {what}")
    print(f"go on from it: train --config {out / CONFIG} --resume {out} --output-dir NEW_DIR; its data begins anew")


def _size(folder: Path) -> str:
    return human_bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
