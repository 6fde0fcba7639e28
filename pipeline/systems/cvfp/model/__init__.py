"""The recurrent model: embedding, blocks of a context and a token stream, and head."""
