"""A trained SAE, tuned end to end through its language model."""
