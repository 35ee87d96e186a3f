"""This package in the layout of Hugging Face's Kernel Hub; `python -m kernels.bench.hub OUT` writes it."""
