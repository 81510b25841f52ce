"""Stems: image (B, C, H, W) -> feature map (B, D, h, w) whose pixels become tokens."""

from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.nn import functional as F


class PatchStem(nn.Module):
    r"""Cut the image into squares and project each square linearly.

    .. math::
        z_{ij} = W\,\mathrm{vec}(x_{pi:pi+p,\;pj:pj+p}) + b

    An image whose sides are no multiples of p is padded with zeros below and at the right, so that
    no pixel is lost.

    Args:
        dim: D, the width of a token.
        patch_size: p, the side of a square in pixels.
        in_channels: C, the channels of the image.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: (B, D, h, w) with h = ceil(H / p) and w = ceil(W / p).

    Map:
        None.

    Raises:
        ValueError: ``patch_size`` is below 1.

    Reference:
        Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", eq. 1,
        https://arxiv.org/abs/2010.11929.
        Differs from the paper in: the padding.

    Example:
        >>> import torch
        >>> PatchStem(8, patch_size=4)(torch.rand(2, 3, 16, 21)).shape
        torch.Size([2, 8, 4, 6])
    """

    def __init__(
        self,
        dim: int,
        patch_size: int = 16,
        *,
        in_channels: int = 3,
    ):
        super().__init__()
        if patch_size < 1:
            raise ValueError(f"patch_size must be at least 1; got {patch_size}")
        self.stride = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def grid(
        self,
        height: int,
        width: int,
    ) -> tuple[int, int]:
        """Count the rows and columns of tokens in an image of this size."""
        return ceil_divide(height, self.stride), ceil_divide(width, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        # While exporting, a test of the sizes would tie the graph to the example's size.
        if is_exporting() or height % self.stride or width % self.stride:
            right = -width % self.stride
            below = -height % self.stride
            x = F.pad(x, (0, right, 0, below))
        return self.proj(x)  # (B, C, H, W) -> (B, D, h, w)


class ConvStem(nn.Module):
    r"""Halve the image by pairs of 3 x 3 convolutions, then project each pixel.

    .. math::
        x_0 = x, \qquad x_{i+1} = \mathrm{ReLU}(\mathrm{BN}(W_i * x_i)), \qquad z = W x_n + b

    Strides of 2 and 1 alternate, and a stride of 2 doubles the channels: n halvings give the
    stride :math:`2^n` and D channels. No stride of 1 follows the last halving.

    Args:
        dim: D, the width of a token; at least ``patch_size``.
        patch_size: :math:`2^n`, the side of the square of pixels that a token stands for; a power
            of two from 2 up.
        in_channels: C, the channels of the image.

    Shape:
        - Input: (B, C, H, W), any H and W from 1 up.
        - Output: (B, D, h, w) with h = ceil(H / patch_size) and w = ceil(W / patch_size).

    Map:
        None.

    Raises:
        ValueError: ``patch_size`` is no power of two, or above ``dim``.

    Reference:
        Xiao et al. 2021, "Early Convolutions Help Transformers See Better",
        https://arxiv.org/abs/2106.14881. Differs from the paper in: where a stride of 1 follows one
        of 2, and that widths always double up to D.

    Example:
        >>> import torch
        >>> ConvStem(16, patch_size=4)(torch.rand(2, 3, 16, 21)).shape
        torch.Size([2, 16, 4, 6])
    """

    def __init__(
        self,
        dim: int,
        patch_size: int = 8,
        *,
        in_channels: int = 3,
    ):
        super().__init__()
        halvings = patch_size.bit_length() - 1
        if patch_size < 2 or patch_size != 2**halvings or patch_size > dim:
            raise ValueError(
                "patch_size of a convolution stem must be a power of two from 2 to "
                f"dim={dim}; got {patch_size}"
            )
        self.stride = patch_size
        layers: list[nn.Module] = []
        channels = in_channels
        for halving in reversed(range(halvings)):
            width = dim // 2**halving
            layers += _conv_norm_relu(channels, width, stride=2)
            layers += _conv_norm_relu(width, width, stride=1)
            channels = width
        # No stride of 1 follows the last halving: drop that convolution, its norm and its ReLU.
        self.conv = nn.Sequential(*layers[:-3])
        self.proj = nn.Conv2d(dim, dim, 1)

    def grid(
        self,
        height: int,
        width: int,
    ) -> tuple[int, int]:
        """Count the rows and columns of tokens in an image of this size."""
        return ceil_divide(height, self.stride), ceil_divide(width, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv(x))


def ceil_divide(length: int, stride: int) -> int:
    """Divide and round up, so that the rest of a side gets a token as well."""
    return -(-length // stride)


def _conv_norm_relu(
    channels: int,
    width: int,
    *,
    stride: int,
) -> list[nn.Module]:
    """Build a 3 x 3 convolution, its batch norm and a ReLU."""
    conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(width), nn.ReLU()]


TokenStem = PatchStem | ConvStem
TOKEN_STEMS: dict[str, type[TokenStem]] = {"patch": PatchStem, "conv": ConvStem}
