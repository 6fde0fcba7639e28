"""Peptides from files: tables, their checks, splits, epochs, and a process that makes sets whose entropy is known."""
