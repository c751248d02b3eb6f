"""Text to packed token windows."""
