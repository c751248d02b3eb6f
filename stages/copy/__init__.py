"""An activation store in another shape: other types, fewer taps or windows, other shards."""
