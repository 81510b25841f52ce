"""insert and remove: a block into any network and out again, no key of the network renamed."""

import torch
from torch import Tensor, nn

from visattn.surgery.block import one_map_block
from visattn.surgery.places import dry_run, find, walk

CHILD = "inserted"


class Inserted(nn.Module):
    r"""A block behind a host module, faded in from zero where it would change the network at the start.

    .. math::
        y = x + \gamma\,\bigl(\mathrm{block}(x) - x\bigr)

    Args:
        block: The block; its output has the shape of its input.
        fade: Whether there is a gamma, one learned number that starts at zero. Without it y =
            block(x).

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

    def __init__(self, block: nn.Module, *, fade: bool = True):
        super().__init__()
        self.block = block
        self.gamma = nn.Parameter(torch.zeros(())) if fade else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        if self.gamma is None:
            return y
        return torch.lerp(x, y.to(x.dtype), self.gamma.to(x.dtype))


def run_inserted(host: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """The forward hook of a host: its output goes through the block inserted behind it."""
    return host.inserted(output)


def insert(
    model: nn.Module,
    block_name: str,
    where: str = "blocks",
    identity: bool = True,
    *,
    example: Tensor | tuple[int, ...] | None = None,
    **options,
) -> nn.Module:
    r"""Insert a block behind modules of a network, in place, and return the network.

    Every key of the network's state dict stays; the blocks add theirs under ``HOST.inserted``.
    Insert before ``torch.compile``, ``DistributedDataParallel`` and the optimizer are built.

    Args:
        model: Any network that takes one tensor: torchvision's, timm's, your own.
        block_name: A name of ``BLOCKS``.
        where: A pattern of module names, matched part by part between the dots (``"layer[1-4].*"``:
            every residual block; ``"layer*.*.bn3"``: inside the residual branch, where most papers
            put their block); or a rule: ``"stages"`` (behind the last block at each resolution),
            ``"blocks"`` (behind every residual block), ``"after:ClassName"``.
        identity: Start as the network was: a block that is not the identity at its own init is
            faded in from zero, and weights of its own that start at zero are moved a little, so
            that one zero is left on the path.
        example: An input of the model or its shape, for the one dry run that finds the maps; 96 x
            96 by default.
        **options: The block's.

    Raises:
        ValueError: ``where`` matches nothing or a module that gives no (B, C, H, W) map, the block
            is unknown, takes more than one map or does not fit, or a place is taken.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = insert(resnet18(), "se", where="layer[3-4].*", reduction=8)
        >>> [name for name, part in model.named_modules() if isinstance(part, Inserted)]
        ['layer3.0.inserted', 'layer3.1.inserted', 'layer4.0.inserted', 'layer4.1.inserted']
        >>> any("inserted" in key for key in remove(model).state_dict())
        False
    """
    root = dry_run(model, example)
    added = {}
    for name, given in find(root, where).items():
        host = model.get_submodule(name)
        _refuse_taken(name, host)
        added[name] = _build(block_name, name, given, identity, options).train(host.training)
    placed = {}
    try:
        for name, block in added.items():
            placed[_place(model, name, block)] = block
        _hook(model, placed, example)
    except Exception:
        _take_out(model, set(placed.values()))
        raise
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take every inserted block out again, in place, and return the network as it was."""
    _take_out(model, {part for part in model.modules() if isinstance(part, Inserted)})
    return model


def _build(block_name: str, name: str, given: Tensor, identity: bool, options: dict) -> Inserted:
    """The block for the map that a host gave: on its device, in its dtype, with a zero gamma if the block needs one."""
    block = one_map_block(block_name, given.shape[1], options)
    # Asked in any case: a block that does not take these maps is refused before the network is
    # touched.
    same = _is_identity(block, block_name, name, given)
    fade = identity and not same
    if fade:
        _open(block)
    # Of the map, not of the weights of the host: a pooling has none.
    return Inserted(block, fade=fade).to(device=given.device, dtype=given.dtype)


def _is_identity(block: nn.Module, block_name: str, name: str, given: Tensor) -> bool:
    """Whether a block gives back exactly what it takes; asked before it leaves the CPU."""
    size = given.shape[1:]
    x = torch.linspace(-2, 2, 2 * size.numel()).reshape(2, *size)
    try:
        with torch.no_grad():
            return torch.equal(block.eval()(x), x)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"block {block_name!r} does not take the maps {tuple(given.shape)} of module {name!r} ({error}); "
            "change its options, or pass example=, an input of the model or its shape"
        ) from error


def _open(block: nn.Module) -> None:
    """Move weights that start at zero a little: behind gamma they would be a second zero, and hide what is behind."""
    for name, parameter in block.named_parameters():
        if "bias" not in name and not parameter.detach().any():
            nn.init.normal_(parameter, std=0.02)


def _refuse_taken(name: str, host: nn.Module) -> None:
    if isinstance(getattr(host, CHILD, None), Inserted) or isinstance(host, Inserted):
        raise ValueError(
            f"module {name!r} has an inserted block; remove(model) first, or insert elsewhere"
        )


def _place(model: nn.Module, name: str, block: Inserted) -> str:
    """Register the block as a child of its host, or behind it in the Sequential around it; return the block's name."""
    host = model.get_submodule(name)
    if not isinstance(host, (nn.ModuleDict, nn.ModuleList)):
        host.add_module(CHILD, block)
        return f"{name}.{CHILD}"
    # A container with a forward of its own (a dense block) would call a new child as one of its
    # layers.
    outer, _, own = name.rpartition(".")
    around = model.get_submodule(outer)
    if not isinstance(around, nn.Sequential):
        raise ValueError(
            f"module {name!r} runs its own children, so a block cannot be its child; choose the module around it"
        )
    names = [child for child, _ in around.named_children()]
    around.add_module(f"{own}_{CHILD}", block)
    for later in names[names.index(own) + 1 :]:
        part = getattr(around, later)
        delattr(around, later)
        around.add_module(later, part)
    return f"{outer}.{own}_{CHILD}".removeprefix(".")


def _hook(model: nn.Module, placed: dict[str, Inserted], example) -> None:
    """Hook the hosts that do not run their new child by themselves; a Sequential does, and so do some stages."""
    ran = {call.module for call in walk(dry_run(model, example))}
    for name, block in placed.items():
        if block not in ran:
            model.get_submodule(name.rpartition(".")[0]).register_forward_hook(run_inserted)


def _take_out(model: nn.Module, blocks: set[Inserted]) -> None:
    for host in list(model.modules()):
        for name in [name for name, child in host.named_children() if child in blocks]:
            delattr(host, name)
            for key in [key for key, hook in host._forward_hooks.items() if hook is run_inserted]:
                del host._forward_hooks[key]
