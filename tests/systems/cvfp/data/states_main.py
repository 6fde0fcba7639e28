"""Started by test_states.py on every rank: states that are computed together, in OUT.

Usage: states_main OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from pipeline.cli import without_local_rank
from pipeline.parallel.topology import create_topology
from pipeline.systems.cvfp.data.states import frozen_states
from tests.systems.cvfp.data.numbered import DOCUMENTS, KEY, check, loader, one_pass

if __name__ == "__main__":
    dist.init_process_group("gloo")
    topology = create_topology(1)
    folder = Path(without_local_rank(sys.argv)[1])
    found = frozen_states(folder, DOCUMENTS, KEY, topology, lambda: one_pass(loader(topology)))
    check(found, loader(topology))
    dist.barrier()
    dist.destroy_process_group()
