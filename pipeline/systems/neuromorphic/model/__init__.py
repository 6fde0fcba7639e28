"""The parts that run in every span: columns of recurrent layers, working memory and decoder."""
