"""Tasks of lm-evaluation-harness on a model: in training, of a checkpoint, of a folder that transformers loads."""
