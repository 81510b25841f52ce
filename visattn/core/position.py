"""Positions of tokens on a grid, given to queries and keys (a rotation) or to scores (a bias)."""

import torch
from torch import Tensor, nn


class Rope(nn.Module):
    r"""Rotate queries and keys by angles that grow with the row and the column: 2D axial RoPE.

    .. math::
        \tilde q_{2t:2t+2} = R(\theta_t\, p)\, q_{2t:2t+2}, \qquad \theta_t = b^{-t / (D/4)},\; t < D / 4

    The first half of the channels turns with the row p = y, the second half with the column p = x, so that
    :math:`\tilde q \cdot \tilde k` depends on the two positions through their difference alone. Tokens in front of the grid
    (class, registers) do not turn.

    Args:
        head_dim: D, a multiple of 4.
        num_heads: Without effect: all heads turn alike.
        grid: Without effect: angles follow from the grid of each call.
        base: b, the slowest angle being about 1 / b per token.

    Shape:
        - Input: q, k (B, h, N, D) and grid (rows, columns) of the last rows * columns tokens.
        - Output: q, k as they came in, and None for the bias.

    Map:
        None: it changes the scores.

    Raises:
        ValueError: ``head_dim`` is no multiple of 4.

    Reference:
        Heo et al. 2024, "Rotary Position Embedding for Vision Transformer", https://arxiv.org/abs/2403.13298 (axial
        frequencies, base 100); Su et al. 2021, https://arxiv.org/abs/2104.09864. Differs from the papers in: nothing.

    Example:
        >>> q = torch.rand(2, 3, 1 + 5 * 7, 8)
        >>> turned, _, _ = Rope(8)(q, q, (5, 7))
        >>> torch.equal(turned[:, :, 0], q[:, :, 0]), torch.equal(turned[:, :, -1], q[:, :, -1])
        (True, False)
    """

    def __init__(self, head_dim: int, num_heads: int = 1, grid: tuple[int, int] | None = None, *, base: float = 100.0):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 for a rotation by rows and columns; got {head_dim}")
        self.head_dim, self.base = head_dim, base

    def forward(self, q: Tensor, k: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, None]:
        angle = self._angles(grid, q.device)
        cos, sin = angle.cos(), angle.sin()
        return _rotate(q, cos, sin), _rotate(k, cos, sin), None

    def _angles(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return the angle of each token and channel pair, (rows * columns, D / 2)."""
        quarter = self.head_dim // 4
        theta = self.base ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
        rows, columns = (torch.arange(n, device=device, dtype=torch.float32)[:, None] * theta for n in grid)
        rows = rows[:, None].expand(-1, grid[1], -1)
        columns = columns[None].expand(grid[0], -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighboring channel pairs of the last tokens of x."""
    prefix = x.shape[2] - cos.shape[0]
    kept, turned = x[:, :, :prefix], x[:, :, prefix:]
    first, second = turned.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
    return torch.cat([kept, turned.to(x.dtype)], dim=2)


POSITIONS = {"rope": Rope}
