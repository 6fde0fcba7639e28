"""`import pipeline.export.hf`: the Auto classes of transformers then know the models of this package.

`AutoModelForCausalLM.from_pretrained(FOLDER)` then takes an exported folder with the code that is installed here, and
leaves alone the code that the folder carries.
"""

from __future__ import annotations

from pipeline.lm.auto_classes import register_auto_classes

register_auto_classes()
