"""The research systems, a folder each with the same file names: config, model, system, evaluation."""
