"""Procedural and episodic memory: what a stream has learned since its document began, or, lifelong, before it."""
