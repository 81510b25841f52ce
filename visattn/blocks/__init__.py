"""Attention blocks for feature maps (B, C, H, W), one file per paper; `catalog` lists them."""
