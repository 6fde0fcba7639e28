"""`--compile`: the blocks of a model through torch.compile, one by one, each as a single graph."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
from typing import Any

import torch
from torch import nn

from pipeline.capabilities import Compiles
from pipeline.config import RunConfig
from pipeline.ds_config import zero_stage
from pipeline.errors import UserError
from pipeline.host.hardware import on_gpu
from pipeline.ops.fuse import VARIANTS
from pipeline.parallel.topology import Topology
from pipeline.system import System

BACKEND = "inductor"
COMPILERS = ("g++", "clang++", "c++")
"""One of them makes a CPU's code, unless CXX names another."""


def check_compile(config: RunConfig, system: System, topology: Topology, ds_config: dict[str, Any]) -> None:
    """Raises UserError where `--compile` was given and no block of the model would be a single graph."""
    if not config.compile:
        return
    if not isinstance(system, Compiles):
        raise UserError(f"--compile: {config.recipe} has no blocks that can be compiled: leave it out")
    if zero_stage(ds_config) == 3:
        raise UserError(
            f"--compile with --zero {config.zero}: ZeRO-3 gathers weights in the middle of a block, which is then no"
            " single graph: give --zero zero2 or less, or --no-compile"
        )
    system.check_compile(topology)
    if on_gpu() and importlib.util.find_spec("triton") is None:
        raise UserError("--compile: torch.compile needs the package triton here: install it, or give --no-compile")
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([named] if named else COMPILERS)):
        given = f"CXX={named}" if named else f"any of {', '.join(COMPILERS)}"
        raise UserError(f"--compile: there is no C++ compiler ({given}): install one, or give --no-compile")


def compile_blocks(config: RunConfig, system: System, model: nn.Module) -> int:
    """Has every block compiled at its first call, where `--compile` was given; returns how many blocks there are.

    Names of parameters stay as they are. Blocks of the same sizes share one compiled graph.
    """
    if not config.compile:
        return 0
    assert isinstance(system, Compiles)
    blocks = system.blocks(model)
    options: dict[str, Any] = {"backend": BACKEND, "fullgraph": True, "dynamic": False}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:  # from torch 2.13 on
        options["recompile_limit"] = VARIANTS
    for block in blocks:
        block.compile(**options)
    return len(blocks)
