"""ResNet: the host for blocks, with torchvision's parameter names, so that its weights load."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from visattn.blocks.catalog import create_block

# Blocks that are convolutions with attention inside: they replace a 3 x 3 convolution, where the
# blocks of other names stand in the slot at the end of a unit.
CONVOLUTIONS = ("sk", "split", "epsa", "cot", "involution")


@dataclass(frozen=True)
class ResNetConfig:
    """One row of CNNS: stem (a key of CONV_STEMS), unit, depth and width of each stage."""

    stem: str
    unit: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]


# Kernel size and stride of the first convolution; "imagenet" pools behind it.
CONV_STEMS = {
    "cifar": (3, 1),
    "half": (3, 2),
    "imagenet": (7, 2),
}
CIFAR = (16, 32, 64)
IMAGENET = (64, 128, 256, 512)
CNNS = {
    "resnet8": ResNetConfig("cifar", "basic", (1, 1, 1), CIFAR),
    "resnet14": ResNetConfig("cifar", "basic", (2, 2, 2), CIFAR),
    "resnet20": ResNetConfig("cifar", "basic", (3, 3, 3), CIFAR),
    "resnet32": ResNetConfig("cifar", "basic", (5, 5, 5), CIFAR),
    "resnet56": ResNetConfig("cifar", "basic", (9, 9, 9), CIFAR),
    "resnet8_wide": ResNetConfig("half", "basic", (1, 1, 1), (32, 64, 128)),
    "resnet10": ResNetConfig("imagenet", "basic", (1, 1, 1, 1), IMAGENET),
    "resnet18": ResNetConfig("imagenet", "basic", (2, 2, 2, 2), IMAGENET),
    "resnet34": ResNetConfig("imagenet", "basic", (3, 4, 6, 3), IMAGENET),
    "resnet50": ResNetConfig("imagenet", "bottleneck", (3, 4, 6, 3), IMAGENET),
}


class BasicUnit(nn.Module):
    r"""Two 3 x 3 convolutions and a slot for a block on a residual path.

    .. math::
        y = \mathrm{ReLU}\bigl(\mathrm{slot}(\mathrm{BN}(W_2 * \phi(W_1 * x))) + W_s x\bigr),
        \qquad \phi = \mathrm{ReLU} \circ \mathrm{BN}

    Args:
        channels: Width of the input.
        width: Width of the convolutions.
        stride: Of the first convolution.
        block: Name of a block, or None.
        block_options: The block's options.

    Shape:
        - Input: (B, channels, H, W).
        - Output: (B, width, ceil(H / stride), ceil(W / stride)).

    Map:
        The block's.

    Reference:
        He et al. 2016, "Deep Residual Learning for Image Recognition",
        https://arxiv.org/abs/1512.03385.
        Differs from: nothing, without a block.

    Example:
        >>> import torch
        >>> BasicUnit(4, 8, stride=2)(torch.rand(2, 4, 7, 5)).shape
        torch.Size([2, 8, 4, 3])
    """

    expansion = 1

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        stride: int = 1,
        block: str | None = None,
        block_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.conv1 = _conv(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv_or_block(width, 1, block, block_options)
        self.bn2 = nn.BatchNorm2d(width)
        self.slot = _slot(width, block, block_options)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.slot(self.bn2(self.conv2(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(y + shortcut)


class BottleneckUnit(nn.Module):
    r"""A 3 x 3 convolution between two 1 x 1, and a slot for a block, on a residual path.

    .. math::
        y = \mathrm{ReLU}\bigl(\mathrm{slot}(\mathrm{BN}(W_3\,
            \phi(W_2 * \phi(W_1 x)))) + W_s x\bigr),
        \qquad \phi = \mathrm{ReLU} \circ \mathrm{BN}

    Args:
        channels: Width of the input.
        width: Width of the 3 x 3 convolution; the output is four times as wide.
        stride: Of the 3 x 3 convolution.
        block: Name of a block, or None.
        block_options: The block's options.

    Shape:
        - Input: (B, channels, H, W).
        - Output: (B, 4 width, ceil(H / stride), ceil(W / stride)).

    Map:
        The block's.

    Reference:
        He et al. 2016, "Deep Residual Learning for Image Recognition",
        https://arxiv.org/abs/1512.03385.
        Differs from the paper in: the stride is at the 3 x 3 convolution, as in torchvision.

    Example:
        >>> import torch
        >>> BottleneckUnit(4, 8, stride=2)(torch.rand(2, 4, 7, 5)).shape
        torch.Size([2, 32, 4, 3])
    """

    expansion = 4

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        stride: int = 1,
        block: str | None = None,
        block_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _conv(channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv_or_block(width, stride, block, block_options)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.slot = _slot(out_channels, block, block_options)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.slot(self.bn3(self.conv3(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(y + shortcut)


UNITS: dict[str, type[BasicUnit | BottleneckUnit]] = {
    "basic": BasicUnit,
    "bottleneck": BottleneckUnit,
}


class ResNet(nn.Module):
    r"""A residual network with the same attention block in every unit, or with none.

    .. math::
        y = W \cdot \mathrm{mean}_{hw}\bigl(\mathrm{stages}(\mathrm{stem}(x))\bigr) + b

    Args:
        config: Stem, unit, depths and widths: a row of ``CNNS``.
        num_classes: Width of the output; 0 gives the pooled features.
        in_channels: Channels of the images.
        block: Name of a block of ``BLOCKS`` for the slot of every unit, or None. sk, split, epsa,
            cot and involution take the place of the 3 x 3 convolutions with stride 1 instead.
        block_options: The block's options.

    Shape:
        - Input: (B, in_channels, H, W), any H and W from 1 up.
        - Output: (B, num_classes) logits.

    Map:
        Every block's own.

    Raises:
        ValueError: The block is unknown or does not fit the widths.

    Reference:
        He et al. 2016, "Deep Residual Learning for Image Recognition",
        https://arxiv.org/abs/1512.03385.
        Differs from the paper in: the shortcut of the CIFAR nets is a 1 x 1 convolution (option
        B), not padding with zeros.

    Example:
        >>> import torch
        >>> ResNet(CNNS["resnet8"], num_classes=10, block="se")(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        config: ResNetConfig,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        block: str | None = None,
        block_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.config = config
        unit = UNITS[config.unit]
        kernel_size, stride = CONV_STEMS[config.stem]
        channels = config.widths[0]
        self.conv1 = _conv(in_channels, channels, kernel_size, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.Identity()
        if config.stem == "imagenet":
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages: list[str] = []
        for depth, width in zip(config.depths, config.widths, strict=True):
            units = []
            for index in range(depth):
                # Every stage but the first halves the map in its first unit.
                halves = bool(self.stages) and index == 0
                units.append(
                    unit(
                        channels,
                        width,
                        stride=2 if halves else 1,
                        block=block,
                        block_options=block_options,
                    )
                )
                channels = width * unit.expansion
            self.stages.append(f"layer{len(self.stages) + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*units))
        self.num_features = channels
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(channels, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map (B, num_features, h, w)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.maxpool(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.forward_features(x).mean((2, 3))  # (B, C, h, w) -> (B, C)
        return self.fc(pooled)


def build_resnet(
    *,
    config: ResNetConfig,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    block: str | None = None,
    block_options: dict[str, Any] | None = None,
) -> ResNet:
    """Build a ResNet, by default with the 10 classes of CIFAR-10 or the 1000 of ImageNet.

    It takes images of any size, so ``image_size`` has no effect.
    """
    if num_classes is None:
        num_classes = 1000 if config.stem == "imagenet" else 10
    return ResNet(
        config, num_classes, in_channels=in_channels, block=block, block_options=block_options
    )


def _conv(
    channels: int,
    width: int,
    kernel_size: int,
    stride: int = 1,
) -> nn.Conv2d:
    """Build a padded convolution without bias, initialized as in He et al. 2015."""
    padding = kernel_size // 2
    conv = nn.Conv2d(channels, width, kernel_size, stride, padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _conv_or_block(
    width: int,
    stride: int,
    block: str | None,
    options: dict[str, Any] | None,
) -> nn.Module:
    """Build the 3 x 3 convolution of a unit, or the block that replaces it."""
    # A block keeps the size of its map, so a convolution with a stride stays.
    if block in CONVOLUTIONS and stride == 1:
        return create_block(block, width, **(options or {}))
    return _conv(width, width, 3, stride)


def _slot(
    channels: int,
    block: str | None,
    options: dict[str, Any] | None,
) -> nn.Module:
    """Build the block at the end of a unit; blocks that replace a convolution leave it empty."""
    if not block or block in CONVOLUTIONS:
        return nn.Identity()
    return create_block(block, channels, **(options or {}))


def _shortcut(
    channels: int,
    width: int,
    stride: int,
) -> nn.Sequential | None:
    """Build a strided 1 x 1 convolution, or None where the shapes agree."""
    if stride == 1 and channels == width:
        return None
    conv = _conv(channels, width, 1, stride)
    return nn.Sequential(conv, nn.BatchNorm2d(width))
