"""Topology, the Ulysses exchange and the global-token loss."""

import os

from pipeline.host.hardware import on_gpu

if not on_gpu():
    # DeepSpeed picks its accelerator when it is imported, and without this says on stdout that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
