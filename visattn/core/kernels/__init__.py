"""The evaluations: exact ways to compute m without, where mathematics allows, the N x N matrix."""
