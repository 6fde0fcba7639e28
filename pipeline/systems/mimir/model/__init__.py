"""The denoiser: a bidirectional transformer over the residues of a peptide, given label, target and time."""

from pipeline.systems.mimir.model.model import MimirModel, ModelOutput
from pipeline.systems.mimir.model.sequences import TargetSequences

__all__ = ["MimirModel", "ModelOutput", "TargetSequences"]
