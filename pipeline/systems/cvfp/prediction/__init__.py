"""The second phase: the next token from the token stream."""
