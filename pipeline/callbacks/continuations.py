"""A picture of texts that a model has gone on with, beside those that followed."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path

from pipeline.evaluation_result import Continuations

WIDTH = 100
"""Characters of a line."""
COLOURS = {"prompt": "black", "model": "tab:blue", "truth": "tab:green"}


def draw_continuations(sample: Continuations, path: Path, title: str = "") -> None:
    """Prompt, what the model wrote, and what followed, a block each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: list[tuple[str, str]] = []
    for number, (name, text) in sample.parts():
        head = f"{number} {name}: " if name == "prompt" else f"  {name}: "
        wrapped = textwrap.wrap(head + _printable(text), WIDTH, subsequent_indent="    ", drop_whitespace=False) or [
            head
        ]
        lines += [(name, line) for line in wrapped]
        lines += [("", "")] * (name == "truth")
    figure = Figure(figsize=(11, 0.7 + 0.2 * len(lines)))
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.25 / height, title, fontsize="medium", weight="bold", va="center", parse_math=False)
    for place, (name, line) in enumerate(lines):
        y = 1 - (0.6 + 0.2 * place) / height
        colour = COLOURS.get(name, "black")
        figure.text(0.02, y, line, family="monospace", fontsize=9, color=colour, va="center", parse_math=False)
    with warnings.catch_warnings():
        # What a model writes may have characters that the font lacks: it shows a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=90)


def _printable(text: str) -> str:
    return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)
