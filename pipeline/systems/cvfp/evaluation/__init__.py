"""What is measured of contexts: their effective rank, whether they forget their start, and what can be read from them."""
