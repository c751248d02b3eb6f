"""The on-disk formats, the only meeting place of the stages."""
