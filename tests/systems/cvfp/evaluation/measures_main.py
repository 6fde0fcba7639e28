"""Started by test_measures.py on every rank: all measures of a small recurrence.

Usage: measures_main OUT. Each rank writes OUT/RANK.json: the scalars by way of reading.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from pipeline.cli import without_local_rank
from pipeline.parallel.topology import create_topology
from pipeline.runtime.sync import SyncPoint
from tests.systems.cvfp.evaluation.reading import CARRIES, measures

if __name__ == "__main__":
    dist.init_process_group("gloo")
    topology = create_topology(1)
    found = {}
    for carry in CARRIES:
        suite, model = measures(carry)
        # Where a stream is cut, and so which tokens have one two back in their row, depends on the number of ranks.
        measured = suite.suite if carry == "document" else suite.evaluate
        found[carry] = measured(model, SyncPoint(topology)).scalars
    (Path(without_local_rank(sys.argv)[1]) / f"{topology.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
