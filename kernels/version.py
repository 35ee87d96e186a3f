"""The version of the three packages, which are released together."""

__version__ = "0.1.0"
