"""Scores of a sparse autoencoder."""
