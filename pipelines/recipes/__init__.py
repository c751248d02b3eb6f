"""Recipes: TOML files that configure a chain, and the text of the quickstart."""
