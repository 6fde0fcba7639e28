"""Memory that a process frees stays its own, for the next tensors."""

from __future__ import annotations

import ctypes
import os

OURS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Where glibc's user says how malloc is to do it."""
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 2**25
"""In bytes, as large as glibc lets it be: what is larger is still returned at once."""


def keep_freed_memory() -> None:
    """Has glibc's malloc keep freed memory in place of returning it, unless the environment says how it is to be.

    A training step frees its activations and takes as many again. Returned to Linux, they are new to the process, which
    pays for every page (docs/parallel.md has the figures). Nothing changes under another C library.
    """
    if any(name in os.environ for name in OURS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Either alone would also end what glibc does by itself: it raises both to the size of what is freed.
    mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
    mallopt(TRIM_THRESHOLD, -1)
