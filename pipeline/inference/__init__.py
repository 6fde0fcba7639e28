"""Models for use after training: text that goes on from a prompt, what was read, kept for later, and samples.

`load` gives a model and its tokenizer, which `generate(model, tokenizer, prompt)`, `stream` and `read` take. `draw`
gives samples of a model that goes on from no text.
"""

from __future__ import annotations

from pipeline.inference.drawing import draw
from pipeline.inference.generation import Token, generate, stream
from pipeline.inference.load import Loaded, load
from pipeline.inference.state_file import load_state, save_state
from pipeline.inference.texts import Texts, read

__all__ = ["Loaded", "Texts", "Token", "draw", "generate", "load", "load_state", "read", "save_state", "stream"]
