"""What language-model systems share: backbone, attention, loss head, pretrained weights, perplexity and recall."""
