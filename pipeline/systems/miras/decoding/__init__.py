"""Decoding of the miras system: text is read in pieces by the parallel pass, and continued a token at a time."""
