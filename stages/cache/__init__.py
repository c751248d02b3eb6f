"""Activation store and sparse autoencoder to the feature cache."""
