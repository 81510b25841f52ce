"""Sharding: which parts of a network several devices hold in pieces (FSDP)."""

from collections import Counter

import torch
import torch.distributed
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard


def repeated_blocks(model: nn.Module) -> set[type]:
    """Return the classes of the blocks that repeat in a network: what is gathered, used and dropped one at a time.

    Example:
        >>> from torchvision.models import resnet18
        >>> [kind.__name__ for kind in repeated_blocks(resnet18())]
        ['BasicBlock']
    """
    counts = Counter(
        type(child)
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential)
        for child in parent.children()
        if sum(
            1 for part in child.modules() if next(part.parameters(recurse=False), None) is not None
        )
        > 1
    )
    kinds = {
        kind
        for kind, count in counts.items()
        if count > 1 and kind not in (nn.Sequential, nn.ModuleList)
    }
    holders = {  # a stage, whose blocks are what repeats
        type(module)
        for module in model.modules()
        if type(module) in kinds
        for part in module.modules()
        if part is not module and type(part) in kinds
    }
    return kinds - holders


def shard(model: nn.Module, mesh) -> None:
    """Shard a network's parameters over the processes of a mesh, block by block."""
    kinds = repeated_blocks(model)
    for module in model.modules():
        if type(module) in kinds:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def any_has_batch(here: bool, device: torch.device) -> bool:
    """Tell the other processes whether this one has a batch left; return whether any has."""
    left = torch.tensor(int(here), device=device)
    torch.distributed.all_reduce(left, torch.distributed.ReduceOp.MAX)
    return bool(left)


class ShardedParameters(ModelParallelStrategy):
    """Lightning's strategy for sharded parameters, with every process sharing the data and none a tensor."""

    def __init__(self):
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def sharding_strategy(module) -> ShardedParameters:
    """Return the strategy meant by ``--trainer.strategy fsdp``, or say what does not work with it."""
    wrong = {
        "ema keeps a whole copy of the weights": module.recipe.ema,
        "unfreeze_epoch changes which parameters have gradients": module.recipe.unfreeze_epoch,
        "channels_last stores weights in an order that cannot be cut": module.memory_format
        is torch.channels_last,
    }
    for reason, asked in wrong.items():
        if asked:
            raise ValueError(f"{reason}: it does not work with --trainer.strategy fsdp")
    return ShardedParameters()
