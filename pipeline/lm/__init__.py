"""What language-model systems share: backbone, attention, loss head, pretrained weights, perplexity and recall.

`from pipeline.lm import load` gives a trained model and its tokenizer (`pipeline.inference.load`).
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # It needs the recipes and systems, which lie above this package and import it (decision 0024).
    if name == "load":
        return importlib.import_module("pipeline.inference.load").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
