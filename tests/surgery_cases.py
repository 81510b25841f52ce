"""The small network that surgery is tested on, and what is read from it."""

import inspect

import torch
from torch import nn

from visattn.blocks.catalog import BLOCKS
from visattn.models.cnn import ResNet, ResNetConfig
from visattn.surgery import Inserted

TINY = ResNetConfig("cifar", "basic", (1, 2), (8, 16))


def tiny():
    torch.manual_seed(0)
    return ResNet(TINY, 5).eval()


def takes_many(block):
    """Whether a block takes more than one map."""
    return len(inspect.signature(BLOCKS[block].block.forward).parameters) > 2


def image(*size, seed=1):
    return torch.randn(*(size or (2, 3, 19, 16)), generator=torch.Generator().manual_seed(seed))


def inserted_blocks(model):
    return [module for module in model.modules() if isinstance(module, Inserted)]


def inserted_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, Inserted)]


def fade_in(model):
    """Move every gamma away from zero, so that the blocks act."""
    for block in inserted_blocks(model):
        if block.gamma is not None:
            nn.init.constant_(block.gamma, 0.3)
    return model


def count_hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
