"""Procedural and episodic memory: what is read, and what is written at the end of a span."""
