"""Bilinear samples that exist only in registers: where they lie, their corners, their gradients."""
