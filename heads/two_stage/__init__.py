"""Detectors that propose regions and look at them again."""
