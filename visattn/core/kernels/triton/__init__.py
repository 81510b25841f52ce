"""Fused GPU kernels for the normalizers that no library serves; modules here, but for device and ops, need Triton."""
