"""What detectors do with boxes: codings, anchors, assignment, sampling, losses, selection."""
