"""The browser view of a feature cache."""
