"""Rotary positions in two dimensions."""

import torch
from torch import Tensor

from visattn.core.position.coordinates import Coordinates, repeat_for_batch
from visattn.core.position.definition import Position


class Rope(Position):
    r"""Rotate queries and keys by angles that grow with the row and the column: 2D axial RoPE.

    .. math::
        \tilde q_{2t:2t+2} = R(\theta_t\, p)\, q_{2t:2t+2}, \qquad \theta_t = b^{-t / (D/4)},\; t < D / 4

    The first half of the channels turns with the row p = y, the second half with the column p = x,
    so that :math:`\tilde q \cdot \tilde k` depends on the two positions through their difference alone. Tokens in front of
    the grid (class, registers) do not turn.

    Args:
        head_dim: D, a multiple of 4.
        num_heads: Without effect: all heads turn alike.
        grid: Without effect: angles follow from the coordinates of each call.
        base: b; the slowest angle is about 1 / b per token.

    Shape:
        - Input: q (B, H, Nq, D), k (B, H, Nk, D) and their Coordinates.
        - Output: q, k turned, and None for the bias.

    Map:
        None: it changes the scores.

    Raises:
        ValueError: ``head_dim`` is no multiple of 4.

    Reference:
        Heo et al. 2024, "Rotary Position Embedding for Vision Transformer",
        https://arxiv.org/abs/2403.13298 (axial frequencies, base 100); Su et al. 2021,
        https://arxiv.org/abs/2104.09864. Differs from the papers in: nothing.

    Example:
        >>> from visattn.core.position import grid_coordinates
        >>> q = torch.rand(2, 3, 1 + 5 * 7, 8)
        >>> turned, _, _ = Rope(8)(q, q, grid_coordinates((5, 7)))
        >>> torch.equal(turned[:, :, 0], q[:, :, 0]), torch.equal(turned[:, :, -1], q[:, :, -1])
        (True, False)
    """

    adds_to_scores = False

    def __init__(
        self,
        head_dim: int,
        num_heads: int = 1,
        grid: tuple[int, int] | None = None,
        *,
        base: float = 100.0,
    ):
        super().__init__()
        if head_dim < 4 or head_dim % 4:
            raise ValueError(
                f"head_dim must be a multiple of 4 for a rotation by rows and columns; got {head_dim}"
            )
        self.head_dim = head_dim
        self.base = base

    def forward(
        self, q: Tensor, k: Tensor, coordinates: Coordinates
    ) -> tuple[Tensor, Tensor, None]:
        return self._rotate(q, coordinates.queries), self._rotate(k, coordinates.keys), None

    def _rotate(self, x: Tensor, yx: Tensor) -> Tensor:
        """Rotate neighboring channel pairs of the tokens that have coordinates ``yx``."""
        # Angles in half precision would place distant tokens wrong.
        exact = torch.promote_types(x.dtype, torch.float32)
        quarter = self.head_dim // 4
        step = torch.arange(quarter, device=x.device, dtype=exact)
        theta = self.base ** (-step / quarter)
        angle = (yx[..., None] * theta).flatten(2)[:, None]  # (G, 1, N, D / 2): rows, then columns
        angle = repeat_for_batch(angle, x.shape[0])
        prefix = x.shape[2] - yx.shape[1]
        first, second = x[:, :, prefix:].unflatten(-1, (-1, 2)).unbind(-1)
        cos = angle.cos()
        sin = angle.sin()
        pairs = [first * cos - second * sin, first * sin + second * cos]
        rotated = torch.stack(pairs, dim=-1).flatten(-2)
        return torch.cat([x[:, :, :prefix], rotated.to(x.dtype)], dim=2)
