"""insert and remove: put a block into any network and take it out; no key is renamed."""

from typing import Any

import torch
from torch import Tensor, nn

from visattn.surgery.block import create_map_block
from visattn.surgery.calls import dry_run, walk
from visattn.surgery.sites import InsertionSite, find_sites

CHILD = "inserted"  # the name of the block in its host


class Inserted(nn.Module):
    r"""A block behind a host module, faded in from zero so that the network starts unchanged.

    .. math::
        y = x + \gamma\,\bigl(\mathrm{block}(x) - x\bigr)

    Args:
        block: The block; its output has the shape of its input.
        fade: Whether there is a gamma, one learned number that starts at zero. Without it
            y = block(x).

    Shape:
        - Input and output: (B, C, H, W).

    Map:
        The block's own.

    Reference:
        The zero-initialized scale of a residual branch: Bachlechner et al. 2020, "ReZero is All You
        Need", https://arxiv.org/abs/2003.04887. Differs from it in: the branch is the change that
        the block makes, so that gamma = 1 is the plain block.

    Example:
        >>> x = torch.rand(2, 3, 5, 7)
        >>> torch.equal(Inserted(nn.Conv2d(3, 3, 1))(x), x)
        True
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        fade: bool = True,
    ):
        super().__init__()
        self.block = block
        self.gamma = nn.Parameter(torch.zeros(())) if fade else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if self.gamma is None:
            return y
        gamma = self.gamma.to(x.dtype)
        return torch.lerp(x, y.to(x.dtype), gamma)


def run_inserted(
    host: nn.Module,
    inputs: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    """Pass the output of a host through the block behind it; a forward hook."""
    block: nn.Module = getattr(host, CHILD)
    return block(output)


def insert(
    model: nn.Module,
    block: str,
    where: str = "blocks",
    identity: bool = True,
    *,
    example: Tensor | tuple[int, ...] | None = None,
    **options: Any,
) -> nn.Module:
    r"""Insert a block behind modules of a network, in place, and return the network.

    Every key of the network's state dict stays; the blocks add theirs under ``HOST.inserted``.
    Insert before ``torch.compile``, ``DistributedDataParallel`` and the optimizer are built.

    Args:
        model: Any network that takes one tensor: torchvision's, timm's, your own.
        block: A name of ``BLOCKS``.
        where: A pattern of module names, matched word by word between dots (``"layer[1-4].*"``:
            every residual block; ``"layer*.*.bn3"``: inside the residual branch, where most papers
            put their block); or a rule: ``"stages"`` (behind the last block at each resolution),
            ``"blocks"`` (behind every residual block), ``"after:ClassName"``.
        identity: Leave the output unchanged at the start: a block that is not the identity when
            initialized is faded in from zero, and its own weights that start at zero get small
            random values, as behind two zeros nothing would learn.
        example: An input of the model or its shape, for the one dry run that finds the maps; 96 x
            96 by default.
        **options: The block's.

    Raises:
        ValueError: ``where`` matches nothing or a module that gives no (B, C, H, W) map, the block
            is unknown, takes more than one map or does not fit, or a module already has one.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = insert(resnet18(), "se", where="layer[3-4].*", reduction=8)
        >>> [name for name, part in model.named_modules() if isinstance(part, Inserted)]
        ['layer3.0.inserted', 'layer3.1.inserted', 'layer4.0.inserted', 'layer4.1.inserted']
        >>> any("inserted" in key for key in remove(model).state_dict())
        False
    """
    blocks = {}
    for site in find_sites(dry_run(model, example), where):
        host = model.get_submodule(site.name)
        _refuse_second_block(site.name, host)
        inserted = _build_for(site, block, identity, options)
        blocks[site.name] = inserted.train(host.training)
    # Nothing has changed so far; from here on an error takes the blocks out again.
    attached: dict[str, Inserted] = {}
    try:
        for host_name, inserted in blocks.items():
            attached[_attach(model, host_name, inserted)] = inserted
        _hook_hosts(model, attached, example)
    except Exception:
        _detach(model, set(attached.values()))
        raise
    return model


def remove(model: nn.Module) -> nn.Module:
    """Remove every inserted block, in place, and return the network as it was."""
    blocks = {module for module in model.modules() if isinstance(module, Inserted)}
    _detach(model, blocks)
    return model


def _build_for(
    site: InsertionSite,
    block_name: str,
    identity: bool,
    options: dict[str, Any],
) -> Inserted:
    """Build the block for the map of a site: on its device, in its dtype, faded in if need be."""
    x = site.feature_map
    block = create_map_block(block_name, x.shape[1], options)
    # Always tested, so that a block that does not fit is refused before the network changes.
    is_identity = _is_identity(block, block_name, site)
    fade = identity and not is_identity
    if fade:
        _fill_zero_weights(block)
    # The map has a device and dtype even where the host, such as a pooling, has no weights.
    return Inserted(block, fade=fade).to(device=x.device, dtype=x.dtype)


def _is_identity(
    block: nn.Module,
    block_name: str,
    site: InsertionSite,
) -> bool:
    """Test on the CPU whether a block returns exactly its input, at the size of the site's map."""
    size = site.feature_map.shape[1:]
    x = torch.linspace(-2, 2, 2 * size.numel())
    x = x.reshape(2, *size)  # two different images (C, H, W)
    try:
        with torch.no_grad():
            return torch.equal(block.eval()(x), x)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"block {block_name!r} does not take the maps {tuple(site.feature_map.shape)} of "
            f"module {site.name!r} ({error}); change its options, or pass example=, an input of "
            "the model or its shape"
        ) from error


def _fill_zero_weights(block: nn.Module) -> None:
    """Draw small values for weights that are all zero: behind gamma = 0 they would not learn."""
    for name, parameter in block.named_parameters():
        if "bias" not in name and not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)


def _refuse_second_block(name: str, host: nn.Module) -> None:
    has_block = isinstance(getattr(host, CHILD, None), Inserted)
    if has_block or isinstance(host, Inserted):
        raise ValueError(
            f"module {name!r} has an inserted block; remove(model) first, or insert elsewhere"
        )


def _attach(
    model: nn.Module,
    host_name: str,
    block: Inserted,
) -> str:
    """Register the block as a child of its host and return its name in the model.

    A ModuleDict or ModuleList with a forward of its own (a dense block) would run a new child as
    one of its layers; there the block goes behind the host, into the Sequential around it.
    """
    host = model.get_submodule(host_name)
    if not isinstance(host, (nn.ModuleDict, nn.ModuleList)):
        host.add_module(CHILD, block)
        return f"{host_name}.{CHILD}"
    outer_name, _, index = host_name.rpartition(".")
    outer = model.get_submodule(outer_name)
    if not isinstance(outer, nn.Sequential):
        raise ValueError(
            f"module {host_name!r} runs its own children, so a block cannot be its child; "
            "choose the module around it"
        )
    block_name = f"{index}_{CHILD}"
    _add_behind(outer, index, block_name, block)
    return f"{outer_name}.{block_name}".removeprefix(".")


def _add_behind(
    sequential: nn.Sequential,
    index: str,
    name: str,
    block: Inserted,
) -> None:
    """Add a child behind the child `index`: those that follow are registered anew, in order."""
    names = [child_name for child_name, _ in sequential.named_children()]
    sequential.add_module(name, block)
    for follower_name in names[names.index(index) + 1 :]:
        follower = sequential.get_submodule(follower_name)
        delattr(sequential, follower_name)
        sequential.add_module(follower_name, follower)


def _hook_hosts(
    model: nn.Module,
    attached: dict[str, Inserted],
    example: Tensor | tuple[int, ...] | None,
) -> None:
    """Hook the hosts that do not run their new child; a Sequential does, and so do some stages."""
    modules_run = {call.module for call in walk(dry_run(model, example))}
    for name, block in attached.items():
        # A second run of the block would apply it twice.
        if block not in modules_run:
            host = model.get_submodule(name.rpartition(".")[0])
            host.register_forward_hook(run_inserted)


def _detach(
    model: nn.Module,
    blocks: set[Inserted],
) -> None:
    """Delete the blocks from their hosts, with the hooks that run them."""
    for host in list(model.modules()):
        for name, child in list(host.named_children()):
            if child in blocks:
                delattr(host, name)
                _remove_hook(host)


def _remove_hook(host: nn.Module) -> None:
    # Found by its function, as a copied or unpickled network has no handle of it.
    for key, hook in list(host._forward_hooks.items()):
        if hook is run_inserted:
            del host._forward_hooks[key]
