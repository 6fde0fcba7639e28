"""Which code a figure comes from. Standard library only."""

from __future__ import annotations

import hashlib
import subprocess

from pipeline.host.package import PACKAGE, built_commit

ROOT = PACKAGE.parent
SOURCES = ("pipeline", "kernels", "ds_configs", "tests", "setup.py")
ENDINGS = (".py", ".json", ".cpp", ".h", ".cu", ".cuh")


def commit() -> str | None:
    """The commit of the checkout that runs, or that the installed package was built from, with `+` when files differ
    from it; None where neither is known."""
    if not (ROOT / ".git").exists():
        return built_commit()
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        state = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if state.stdout.strip() else "")


def sources_digest() -> str:
    """Of every source file of the checkout: equal where the code is, also in a copy without its history."""
    text = hashlib.sha256()
    for top in SOURCES:
        path = ROOT / top
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            # What a build writes is no source.
            if file.suffix in ENDINGS and file.is_file() and not file.name.startswith("_native"):
                text.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return text.hexdigest()[:16]
