"""Synthetic activations with a known dictionary."""
