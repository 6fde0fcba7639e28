"""What the package of a system offers to the `data` commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class DataCommands(Protocol):
    """What `data_commands()` of a system's package returns, where it has such a function: the system reads files of a
    kind of its own, or makes sets from a known process."""

    suffixes: tuple[str, ...]
    """Of the files that it reads, such as ".csv"."""
    synth_options: Any
    """A dataclass of the flags of `data synth SYSTEM`, with their defaults."""
    verify_options: Any
    """As `synth_options`, of `data verify FILE ...`."""

    def synth(self, options: Any) -> None:
        """Makes a set. Raises UserError."""
        ...

    def verify(self, files: Sequence[str], options: Any) -> None:
        """Prints each check of each file. Raises UserError when one fails."""
        ...
