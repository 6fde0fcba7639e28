"""Mimir: discrete diffusion over peptides, by label and by the protein that they are to bind."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.data_commands import DataCommands
    from pipeline.system import System


def create(config: RunConfig) -> System:
    """The system of a run whose model section is a `MimirConfig`."""
    from pipeline.systems.mimir.system import MimirSystem

    return MimirSystem(config)


def data_commands() -> DataCommands:
    """`data synth mimir`, and `data verify` of files of peptides."""
    from pipeline.systems.mimir.data.commands import PeptideCommands

    return PeptideCommands()
