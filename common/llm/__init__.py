"""Decoder-only language models: weights, tokenizers, forward pass and taps."""
