"""Mimir: discrete diffusion over peptides, by label and by the protein that they are to bind."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.capabilities import DataCommands


def data_commands() -> DataCommands:
    """`data synth mimir`, and `data verify` of files of peptides."""
    from pipeline.systems.mimir.data.commands import PeptideCommands

    return PeptideCommands()
