"""Sparse autoencoders: one file per variant, scores, and interoperability."""
