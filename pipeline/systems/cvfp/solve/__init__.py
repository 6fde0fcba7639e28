"""Contexts of a recurrence at fixed weights: token after token, or by sweeps over all tokens at once."""
