"""Operators on boxes: RoIAlign, BorderAlign, NMS."""
