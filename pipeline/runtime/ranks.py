"""The start and the end of the ranks of a job."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import RunConfig
from pipeline.errors import RankError, UserError
from pipeline.host.hardware import on_gpu
from pipeline.host.local import LocalHost
from pipeline.parallel.rendezvous import join
from pipeline.parallel.topology import Topology, create_topology

HEARTBEAT_MARGIN = datetime.timedelta(seconds=30)
"""Time in which the heartbeat can name a rank before a collective that waits for it gives up."""


def start(config: RunConfig) -> Topology:
    """Joins the process group (one of a single rank without a launcher) and lays out the ranks."""
    if "RANK" not in os.environ:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(os.environ.get(name) or 1) > 1:
                raise UserError(
                    f"{name} is {os.environ[name]}, but RANK is not set: start the ranks with launch.sh or torchrun"
                    " (docs/multi_node.md)"
                )
        port = LocalHost(os.environ).free_port()
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu():
        if local_rank >= torch.cuda.device_count():
            raise RankError(
                f"rank {os.environ['RANK']}: no GPU {local_rank} here (there are {torch.cuda.device_count()}):"
                " start fewer ranks"
            )
        torch.cuda.set_device(local_rank)
    timeout = collective_timeout(config)
    if not dist.is_initialized():
        backend = "nccl" if on_gpu() else "gloo"
        join(backend, timeout, datetime.timedelta(minutes=config.parallel.start_minutes))
    # torchrun and DeepSpeed's launcher name the ranks of a node differently.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
    return create_topology(
        config.parallel.sequence,
        local_rank=local_rank,
        nodes=max(1, dist.get_world_size() // local),
        timeout=timeout,
    )


def collective_timeout(config: RunConfig) -> datetime.timedelta:
    """How long a collective may wait before it gives up."""
    # The heartbeat names the rank first; a collective that gives up only knows that it waited.
    return datetime.timedelta(minutes=config.parallel.timeout_minutes) + HEARTBEAT_MARGIN


def stop() -> None:
    """Leaves the process group; gloo's threads abort the interpreter when it ends without this."""
    if dist.is_initialized():
        dist.destroy_process_group()


def device_of(topology: Topology) -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", topology.local_rank) if on_gpu() else torch.device("cpu")


def describe_devices(topology: Topology) -> dict[str, Any]:
    """The devices of a run, for run.json and every figure that is published."""
    if on_gpu():
        properties = torch.cuda.get_device_properties(topology.local_rank)
        device = {"kind": "cuda", "name": properties.name, "memory": properties.total_memory}
    else:
        device = {"kind": "cpu", "name": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return {"device": device, "ranks": topology.world, "data": topology.data, "sequence": topology.sequence,
            "nodes": topology.nodes, "platform": platform.platform()}  # fmt: skip
