"""The convolution of a few pooled planes to one, as CBAM and triplet attention need it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.blocks.parts.products import plain


class _PlaneConv(torch.autograd.Function):
    """A convolution to one channel.

    Its gradients are a depthwise convolution and one matrix product.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        kernels = weight.expand(x.size(0), -1, -1, -1)
        return _depthwise(x, kernels).sum(1, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x_gradient = None
        weight_gradient = None
        if ctx.needs_input_grad[0]:
            # (1, P, k, k) -> (B, P, k, k); a flipped kernel transposes the convolution
            kernels = weight.flip(2, 3).expand(x.size(0), -1, -1, -1)
            x_gradient = _depthwise(gradient.expand_as(x), kernels)
        if ctx.needs_input_grad[1]:
            weight_gradient = _kernel_gradient(x, gradient, weight.size(2))
        return x_gradient, weight_gradient


def _depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve every plane of (B, P, H, W) with its own kernel of (B, P, k, k).

    The batch is folded into the channels, which fills the vector registers: P alone is small.
    """
    planes = x.flatten(0, 1).unsqueeze(0)  # (B, P, H, W) -> (1, B * P, H, W)
    kernels = kernels.flatten(0, 1).unsqueeze(1)  # (B, P, k, k) -> (B * P, 1, k, k)
    padding = kernels.size(-1) // 2
    convolved = F.conv2d(planes, kernels, padding=padding, groups=kernels.size(0))
    return convolved.view(x.shape)


def _kernel_gradient(x: Tensor, gradient: Tensor, size: int) -> Tensor:
    """The sums of shifted x (B, P, H, W) times the gradient (B, 1, H, W): (1, P, k, k).

    Shifts along a row are windows of x, shifts along a column windows of the gradient, so that
    all k * k sums are one matrix product.
    """
    half = size // 2
    # (B, P, H, W) -> (B, P, H + 2 half, k, W)
    row_windows = F.pad(x, (half,) * 4).unfold(3, gradient.size(3), 1)
    # (B, 1, H, W) -> (B, k, W, H + 2 half)
    padded_gradient = F.pad(gradient[:, 0], (0, 0, 2 * half, 2 * half))
    column_windows = padded_gradient.unfold(1, row_windows.size(2), 1)
    sums = torch.einsum("bphjw,btwh->ptj", row_windows, column_windows)
    # the windows of the gradient run against those of x
    return sums.flip(1).unsqueeze(0)


class PlaneConv(nn.Conv2d):
    """A convolution to one channel, without bias, that keeps height and width."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if plain(x, self.weight):
            return super().forward(x)
        return _PlaneConv.apply(x, self.weight)
