"""The convolution of a few pooled planes to one, as CBAM and triplet attention need it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlaneConv(nn.Conv2d):
    """A convolution to one channel, without bias, that keeps height and width.

    On a CPU it runs depthwise with the batch folded into the channels, which fills vectors that one channel would not.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not x.is_cpu:
            return super().forward(x)
        weight = self.weight.expand(x.size(0), -1, -1, -1).flatten(0, 1).unsqueeze(1)
        each = F.conv2d(x.flatten(0, 1).unsqueeze(0), weight, padding=self.padding, groups=weight.size(0))
        return each.view(x.shape).sum(1, keepdim=True)
