"""DyHead: its blocks, its attentions, its fused form."""
