"""Released weights: the names, the layouts and the files they come in."""
