"""Detectors that predict at every position."""
