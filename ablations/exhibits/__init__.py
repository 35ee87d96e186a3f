"""What a reader of the paper looks for: gates, positions, slopes, maps of trained attentions, and boxes on images."""
