"""A whole DyHead block for all levels at once."""
