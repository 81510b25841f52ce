"""Attention blocks for feature maps (B, C, H, W), one file per paper; `table` lists them."""
