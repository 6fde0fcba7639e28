"""Reading and writing small files."""
