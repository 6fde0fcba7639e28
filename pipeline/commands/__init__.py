"""The commands that are no package of their own, and how flags are read."""
