"""GPU operators of DyHead in Triton, each with a plain PyTorch path."""

from kernels.backend import use_backend

__all__ = ["use_backend"]
