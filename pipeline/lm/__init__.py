"""What language-model systems share: attention, loss head, pretrained weights, held-out perplexity and recall."""
