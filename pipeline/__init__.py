"""Mnemos: language models that remember, trained on one DeepSpeed engine."""

__version__ = "0.1.0"
