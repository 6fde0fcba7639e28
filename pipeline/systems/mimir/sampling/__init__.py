"""New peptides: the sampler, what a user chooses, and what is said of each."""

from pipeline.systems.mimir.sampling.sampler import Denoise, draw_lengths, guided, sample, tempered

__all__ = ["Denoise", "draw_lengths", "guided", "sample", "tempered"]
