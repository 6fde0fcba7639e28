"""`--compile`: the blocks of a model through torch.compile, one by one, each as a single graph."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.capabilities import Compiles
from pipeline.config import RunConfig
from pipeline.ds_config import zero_stage
from pipeline.errors import UserError
from pipeline.host.hardware import on_gpu
from pipeline.ops.fuse import compile_variants
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
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise UserError(
            f"--compile: generated code needs Python's headers, which are not in {headers}: install them (python3-dev),"
            " or give --no-compile"
        )


def compile_blocks(config: RunConfig, system: System, model: nn.Module) -> int:
    """Has every block compiled at its first call in training, where `--compile` was given; returns how many blocks
    there are.

    Names of parameters stay as they are. Blocks of the same sizes share one compiled graph. Evaluations, whose texts
    are of any length, run the blocks as they are.
    """
    if not config.compile:
        return 0
    assert isinstance(system, Compiles)
    blocks = system.blocks(model)
    for block in blocks:
        compiled = compile_variants(block._call_impl, backend=BACKEND, fullgraph=True, dynamic=False)
        # Where nn.Module.compile keeps it: copies and pickles of the module leave it out.
        block._compiled_call_impl = functools.partial(_call, block, compiled)
    return len(blocks)


def _call(block: nn.Module, compiled: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    return (compiled if block.training else block._call_impl)(*arguments, **named)
