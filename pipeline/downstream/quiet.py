"""What surrounds the harness: its noise, its seeds and its processes stay with it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

import numpy as np
import torch

from pipeline.checkpoint.rng import rng_state, set_rng_state

SEEDS = {"python": 0, "numpy": 1234, "torch": 1234, "few-shot": 1234}
"""Those of the harness's own command."""


class _Others(io.TextIOBase):
    """A stream without what the thread that made it writes: the monitor's thread may have to say that a rank stalls."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream, self.silent = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.silent else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def harness() -> Iterator[None]:
    """Around calls of the harness: seeded as by its own command, with this process's random states, variables and
    streams as they were behind it. Its warnings go to standard error, its progress bars and prints nowhere; what other
    threads print stays."""
    state = rng_state()
    random.seed(SEEDS["python"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    logger, handler = logging.getLogger("lm_eval"), logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.WARNING)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    # Its bootstrap would fork a process that holds sockets, or a GPU.
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(_Others(sys.stdout)), contextlib.redirect_stderr(_Others(sys.stderr)):
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
        set_rng_state(state)
