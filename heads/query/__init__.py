"""Detectors that predict a set from queries."""
