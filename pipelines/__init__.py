"""The command line, the chain of stages, and the recipes."""
