"""Latent vector models: read a sequence of sentence vectors, predict the next one (docs/vectors.md)."""
