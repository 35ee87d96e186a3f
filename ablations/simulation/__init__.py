"""Detectors whose true AP is known, to see whether intervals hold it."""
