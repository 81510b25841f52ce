"""Sharded parameters (FSDP): which parts of a network the devices hold in pieces."""

from collections import Counter

import torch
import torch.distributed
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from visattn.training.recipe import Recipe


def repeated_blocks(model: nn.Module) -> set[type]:
    """Return the classes of a network's repeated blocks: what is gathered and freed one at a time.

    Example:
        >>> from torchvision.models import resnet18
        >>> [block.__name__ for block in repeated_blocks(resnet18())]
        ['BasicBlock']
    """
    counts: Counter[type] = Counter()
    for parent in model.modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            counts.update(type(child) for child in parent.children() if _is_composite(child))
    repeated = {block for block, count in counts.items() if count > 1}
    repeated -= {nn.Sequential, nn.ModuleList}
    return repeated - _stages(model, repeated)


def _is_composite(module: nn.Module) -> bool:
    """Whether at least two of a module's parts have parameters of their own."""
    count = 0
    for part in module.modules():
        if next(part.parameters(recurse=False), None) is not None:
            count += 1
    return count > 1


def _stages(model: nn.Module, repeated: set[type]) -> set[type]:
    """Return the classes of stages: repeated modules that hold other repeated modules."""
    stages: set[type] = set()
    for module in model.modules():
        if type(module) not in repeated:
            continue
        inner_types = {type(part) for part in module.modules() if part is not module}
        if inner_types & repeated:
            stages.add(type(module))
    return stages


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network's parameters over the processes of a mesh, block by block."""
    blocks = repeated_blocks(model)
    for module in model.modules():
        if type(module) in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def any_has_batch(has_batch: bool, device: torch.device) -> bool:
    """Say to the other processes whether this one has a batch left; return whether any has."""
    flag = torch.tensor(int(has_batch), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


class ShardedParameters(ModelParallelStrategy):
    """Lightning's strategy for sharded parameters: all processes split the data, none a tensor."""

    def __init__(self):
        super().__init__(
            data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def sharding_strategy(recipe: Recipe, channels_last: bool) -> ShardedParameters:
    """Return the strategy meant by ``--trainer.strategy fsdp``, or raise where it cannot work."""
    conflicts = {
        "ema keeps a whole copy of the weights": recipe.ema > 0,
        "unfreeze_epoch changes which parameters have gradients": recipe.unfreeze_epoch > 0,
        "channels_last stores weights in an order that cannot be cut": channels_last,
    }
    for reason, applies in conflicts.items():
        if applies:
            raise ValueError(f"{reason}: it does not work with --trainer.strategy fsdp")
    return ShardedParameters()
