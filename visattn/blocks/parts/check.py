"""What every block refuses, said in one voice."""

from torch import Tensor


def require_positive(**sizes: int) -> None:
    """Refuse sizes below 1, by name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 or more; got {size}")


def require_odd(**sizes: int) -> None:
    """Refuse even or non-positive kernel extents, by name: only an odd kernel has a center."""
    for name, size in sizes.items():
        if size < 1 or size % 2 == 0:
            raise ValueError(f"{name} must be odd and positive; got {size}")


def require_divisible(channels: int, groups: int, *, groups_name: str = "groups") -> None:
    """Refuse channels that do not split evenly into groups, naming both."""
    if groups < 1 or channels % groups:
        raise ValueError(
            f"channels must be a multiple of {groups_name}; got {channels} and {groups}"
        )


def require_choice(name: str, value: str, choices) -> None:
    """Refuse a word that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def require_map(x: Tensor, channels: int, *, name: str = "input") -> None:
    """Refuse what is not (B, channels, H, W): a wrong width would broadcast silently in a block without weights."""
    if x.dim() != 4 or x.size(1) != channels:
        raise ValueError(f"{name} must be (B, {channels}, H, W); got {tuple(x.shape)}")


def hidden_width(channels: int, reduction: int, *, at_least: int = 1) -> int:
    """The width of a bottleneck, channels // reduction but never below `at_least`."""
    require_positive(channels=channels, reduction=reduction)
    return max(at_least, channels // reduction)
