"""Documents: where they come from, and their passes."""
