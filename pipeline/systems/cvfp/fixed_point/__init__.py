"""The first phase: contexts that forget where they began, and differ from each other."""
