"""Texts: windows of tokens, their perplexity and divergence, and self-written ones."""
