"""Activation store to a sparse autoencoder."""
