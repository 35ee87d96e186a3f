"""What detections are worth: COCO's twelve numbers, the same under image weights, error types, and replicates."""
