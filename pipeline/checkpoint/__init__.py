"""Checkpoints: commit protocol, resume, verification."""
