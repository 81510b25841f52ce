"""Fused GPU kernels for the normalizers that no library serves.

All modules here but ``device`` and ``ops`` need Triton to be imported.
"""
