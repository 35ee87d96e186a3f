"""Modulated deformable convolution."""
