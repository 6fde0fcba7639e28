"""Neuromorphic language model: recurrent columns with working, procedural and episodic memory, trained in phases."""
