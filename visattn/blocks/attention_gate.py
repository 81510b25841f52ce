"""The attention gate of Attention U-Net: a coarse map decides which positions of a finer one pass."""

from torch import Tensor, nn
from torch.nn import functional as F

from visattn.blocks.parts.check import hidden_width, require_map, require_positive
from visattn.blocks.parts.norm import make_norm
from visattn.blocks.parts.products import scaled
from visattn.core.tap import Tap


class AttentionGate(nn.Module):
    r"""Gate the positions of a map by additive attention with a coarser gating map.

    .. math::
        y_{cij} = \alpha_{ij}\, x_{cij}, \qquad
        \alpha = \mathrm{up}\,\sigma\bigl(\psi^\top \mathrm{ReLU}(W_x x + \mathrm{up}(W_g g) + b_g) + b_\psi\bigr)

    Args:
        channels: C, the width of x.
        gate_channels: The width of g; None takes C.
        reduction: r, so the inner width is ``max(1, C // r)``.
        subsample: Extent and stride of W_x: the gate is computed at H / subsample by W / subsample.
        project: Whether a 1 x 1 convolution and a norm follow the gated map.
        norm: Of that projection: ``"batch"``, ``"layer"`` or ``"none"``.

    Shape:
        - Inputs: x (B, C, H, W) with H and W of ``subsample`` or more, and g (B, gate_channels, h,
          w), any h and w from 1 up.
        - Output: as x.

    Map:
        ``tap``, kind spatial: (B, 1, H, W), values in (0, 1), no sum.

    Raises:
        ValueError: A width, ``reduction`` or ``subsample`` is below 1, or x is smaller than
            ``subsample``.

    Reference:
        Oktay et al. 2018, "Attention U-Net: Learning Where to Look for the Pancreas",
        https://arxiv.org/abs/1804.03999. Differs from the authors' code in: there the gated map is
        projected (``project=True``), by a convolution whose bias, idle before batch norm, is left
        out here.

    Example:
        >>> import torch
        >>> AttentionGate(12, gate_channels=6)(torch.rand(2, 12, 14, 22), torch.rand(2, 6, 7, 11)).shape
        torch.Size([2, 12, 14, 22])
    """

    def __init__(
        self,
        channels: int,
        *,
        gate_channels: int | None = None,
        reduction: int = 2,
        subsample: int = 2,
        project: bool = False,
        norm: str = "batch",
    ):
        super().__init__()
        inner = hidden_width(channels, reduction)
        self.channels = channels
        self.gate_channels = channels if gate_channels is None else gate_channels
        self.subsample = subsample
        require_positive(gate_channels=self.gate_channels, subsample=subsample)
        self.project_x = nn.Conv2d(channels, inner, subsample, stride=subsample, bias=False)
        self.project_gate = nn.Conv2d(self.gate_channels, inner, 1)
        self.score = nn.Conv2d(inner, 1, 1)
        self.project = nn.Identity()
        if project:
            self.project = nn.Sequential(
                nn.Conv2d(channels, channels, 1, bias=False), make_norm(norm, channels)
            )
        self.tap = Tap("spatial")

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        require_map(x, self.channels, name="x")
        require_map(gate, self.gate_channels, name="gate")
        if min(x.size(2), x.size(3)) < self.subsample:
            raise ValueError(
                f"x must be {self.subsample} x {self.subsample} or more (subsample); got {tuple(x.shape)}"
            )
        inner = self.project_x(x)
        inner = (inner + _resized(self.project_gate(gate), inner)).relu()
        alpha = self.tap(_resized(self.score(inner).sigmoid(), x))
        return self.project(scaled(x, alpha))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the height and width of `like`, bilinear between pixel centers."""
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)
