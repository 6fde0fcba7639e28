"""Mimir: discrete diffusion over peptides, by label and by the protein that they are to bind."""
