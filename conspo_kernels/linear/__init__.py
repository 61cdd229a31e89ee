"""From hidden states and the head's weight to token statistics and gradients, tile by tile; see `modes.py`."""
