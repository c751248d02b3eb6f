"""Token windows through the language model to the activation store."""
