"""The convolution of a few pooled planes to one, as CBAM and triplet attention need it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.blocks.parts.products import plain


class _PlaneConv(torch.autograd.Function):
    """A convolution to one channel; its gradients are a depthwise convolution and one product of matrices."""

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
        plane = None
        if ctx.needs_input_grad[0]:
            plane = _depthwise(
                gradient.expand_as(x), weight.flip(2, 3).expand(x.size(0), -1, -1, -1)
            )
        return plane, _kernel_gradient(x, gradient, weight.size(2)) if ctx.needs_input_grad[
            1
        ] else None


def _depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """Every plane of (B, P, H, W) convolved with its own kernel: the batch, folded into the channels, fills vectors."""
    folded = x.flatten(0, 1).unsqueeze(0)
    kernels = kernels.flatten(0, 1).unsqueeze(1)
    return F.conv2d(folded, kernels, padding=kernels.size(-1) // 2, groups=kernels.size(0)).view(
        x.shape
    )


def _kernel_gradient(x: Tensor, gradient: Tensor, size: int) -> Tensor:
    """The sums of x, shifted, times the gradient: shifts along rows in one matrix, along columns in the other."""
    half = size // 2
    x = F.pad(x, (half,) * 4).unfold(3, gradient.size(3), 1)
    gradient = F.pad(gradient[:, 0], (0, 0, 2 * half, 2 * half)).unfold(1, x.size(2), 1)
    return torch.einsum("bphjw,btwh->ptj", x, gradient).flip(1).unsqueeze(0)


class PlaneConv(nn.Conv2d):
    """A convolution to one channel, without bias, that keeps height and width."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if plain(x, self.weight) else _PlaneConv.apply(x, self.weight)
