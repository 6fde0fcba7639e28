"""Models for use after training."""
