"""Where documents come from: local files by random access, Hugging Face data sets as streams."""
