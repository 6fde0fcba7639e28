"""The network of columns around the memories."""
