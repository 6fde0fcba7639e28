"""Documents to training batches: sources, tokenizers, packing, stateful loaders."""
