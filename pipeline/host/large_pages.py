"""Memory of large tensors on a CPU in pages of 2 MB."""

from __future__ import annotations

import os

VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""What torch reads at its first allocation: whether to ask Linux for transparent huge pages, for tensors of 2 MB and
more. Nothing changes where Linux gives them to all programs, or to none."""


def use_large_pages() -> None:
    """Asks for them, unless the environment says otherwise.

    A training step gives its large tensors back and takes them again, and Linux hands out and clears every page anew
    (docs/parallel.md has the figures).
    """
    os.environ.setdefault(VARIABLE, "1")
