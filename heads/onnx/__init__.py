"""Our operators as standard operators of ONNX, for `torch.onnx.export`; `python -m heads.export` exports a detector."""

from heads.onnx.symbolics import register_symbolics
from heads.onnx.translation import onnx_translation_table

__all__ = ["onnx_translation_table", "register_symbolics"]
