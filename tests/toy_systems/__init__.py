"""Systems of the tests alone, and their recipes: `add` lets the package find them."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def add() -> None:
    """Puts these folders on the paths of `pipeline.systems` and `pipeline.recipes`."""
    import pipeline.recipes
    import pipeline.systems

    for package, folder in ((pipeline.systems, FOLDER), (pipeline.recipes, FOLDER / "recipes")):
        if str(folder) not in package.__path__:
            package.__path__.append(str(folder))
