"""What is measured of contexts: effective rank, whether they forget their start, and what can be read from them."""
