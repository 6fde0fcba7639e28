"""A step of the neuromorphic system on a device: the host waits for none of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.systems.neuromorphic.harness import created, documents, small
from tests.systems.neuromorphic.host_reads import steps_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("phase", ["A", "B", "C"])
def test_no_step_synchronises(tmp_path: Path, phase: str) -> None:
    """Steps that are not logged, forward and backward, after one in which kernels are loaded and state is made."""
    documents(tmp_path / "documents")
    run = steps_of(created(small(tmp_path)), phase, torch.device("cuda"))
    run()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
