"""Samples of a trained model that goes on from no text: `draw`, by the options that its system has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.files.given_path import expanded

if TYPE_CHECKING:
    from pipeline.capabilities import Drawn, DrawOptions, Draws
    from pipeline.config import RunConfig


@dataclass(frozen=True)
class Drawer:
    """A checkpoint of a system that draws, before its weights are read."""

    checkpoint: Path
    config: RunConfig
    system: Draws


def draw(path: str | Path, **options: Any) -> list[dict[str, Any]]:
    """What the model in a checkpoint or run directory draws, a row each. `options`: by the names of the flags that
    `mnemos generate CHECKPOINT --help` lists. Raises UserError; TypeError for an option that there is not."""
    drawer = find_drawer(path)
    if drawer is None:
        raise UserError(f"{path}: holds no checkpoint of a model that draws samples: give one that does")
    return [dict(row) for row in draw_with(drawer, dataclasses.replace(drawer.system.draw_options(), **options)).rows]


def find_drawer(path: str | Path) -> Drawer | None:
    """None for all that is no checkpoint or run directory, and for those of systems that draw nothing. Raises UserError
    for a checkpoint that is damaged."""
    from pipeline.checkpoint.manifest import MANIFEST, pointed

    folder = pointed(expanded(path))
    if not (folder / MANIFEST).is_file() and not (folder / "checkpoints").is_dir():
        return None
    from pipeline.capabilities import Draws
    from pipeline.inference.load import GIVE
    from pipeline.inference.trained import find, read_config
    from pipeline.system import create_system

    checkpoint = find(folder, GIVE)
    config = read_config(checkpoint)
    system: Any = create_system(config)
    return Drawer(checkpoint, config, system) if isinstance(system, Draws) else None


def draw_with(drawer: Drawer, options: DrawOptions) -> Drawn:
    """Raises UserError."""
    from pipeline.host.hardware import choose_accelerator, on_gpu
    from pipeline.inference.trained import load_trained, read_run

    drawer.system.check_draw(options)
    choose_accelerator()
    read_run(drawer.checkpoint)
    system: Any = drawer.system
    model = load_trained(drawer.checkpoint, drawer.config, system, raw=options.raw_weights).model
    return drawer.system.draw(model.to("cuda" if on_gpu() else "cpu"), options)
