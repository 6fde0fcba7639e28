"""Token files: documents that are tokenised already, as raw ids."""
