"""Plain words and numbers -> a ViT; the only place of the models where strings stand for objects."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from torch import nn

from visattn.core.attention import RELATIONS
from visattn.core.attention.full import per_head
from visattn.core.normalize import NORMALIZERS
from visattn.core.position import POSITIONS
from visattn.core.similarity import SIMILARITIES
from visattn.models.stem import STEMS
from visattn.models.vit import ViT, ViTBlock

# Relations that give every token of the grid an output, and those of them that fold the grid, which has no class token.
FOLDING = ("window", "shifted_window", "grid", "axial", "criss_cross", "neighborhood")
MIXERS = {name: RELATIONS[name] for name in ("self", *FOLDING, "memory", "channel")}


def build_vit(
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    dim: int = 192,
    depth: int = 12,
    num_heads: int = 3,
    mlp_ratio: float = 4.0,
    stem: str = "patch",
    patch_size: int = 16,
    position: str = "learned",
    class_position: bool = True,
    class_token: bool = True,
    num_registers: int = 0,
    pool: str = "class",
    relation: str | Sequence[str] = "self",
    window_size: int | None = None,
    kernel_size: int | None = None,
    qk_norm: bool = False,
    similarity: str | Callable | None = None,
    normalize: str | Callable | None = None,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> ViT:
    """Build a ViT; the words are those of ViT, ViTBlock and the relations, names come from the tables of core.

    Several relations take turns from block to block, such as ``["window", "shifted_window"]``.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    head_dim, prefix = per_head(dim, num_heads), class_token + num_registers
    patches = find(STEMS, stem, "stem")(dim, patch_size, in_channels=in_channels)
    grid = patches.grid(*size)
    names = [relation] if isinstance(relation, str) else list(relation)
    extents = {"window_size": window_size, "kernel_size": kernel_size}
    _check_extents(extents, names)

    def attention(name: str) -> nn.Module:
        # What channel attention compares are channels, each a vector over the tokens.
        width = prefix + grid[0] * grid[1] if name == "channel" else head_dim
        return _make_relation(
            name,
            dim,
            num_heads,
            prefix,
            similarity=make(SIMILARITIES, similarity, "similarity", width, num_heads),
            normalize=make(NORMALIZERS, normalize, "normalize", num_heads),
            position=_make_position(position, head_dim, num_heads, grid),
            qk_norm=qk_norm or None,
            **{word: size for word, size in extents.items() if word in _words(name)},
        )

    blocks = [
        ViTBlock(
            dim,
            attention(names[i % len(names)]),
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            drop_path=drop_path * i / max(depth - 1, 1),
        )
        for i in range(depth)
    ]
    return ViT(
        patches,
        blocks,
        dim=dim,
        num_classes=num_classes,
        image_size=size,
        positions=("all" if class_position else "patches") if position == "learned" else "none",
        class_token=class_token,
        num_registers=num_registers,
        pool=_make_pool(pool, dim, num_heads, mlp_ratio),
        dropout=dropout,
    )


def find(table: Mapping, name: str, argument: str):
    """Look a name up, or say which names come near and which there are."""
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    known = f"known: {', '.join(table)}" if len(table) < 50 else f"{len(table)} are known"
    raise ValueError(f"unknown {argument} {name!r}; {hint}{known}")


def make(table: Mapping, choice: str | Callable | None, argument: str, *sizes: int) -> nn.Module | None:
    """Make the object that a name of the table, or a callable of the sizes, stands for."""
    if choice is None:
        return None
    return (find(table, choice, argument) if isinstance(choice, str) else choice)(*sizes)


def _make_position(position: str, head_dim: int, num_heads: int, grid: tuple[int, int]) -> nn.Module | None:
    """Make what gives positions to scores; learned positions live in the ViT itself."""
    if position in ("learned", "none"):
        return None
    known = {"learned": None, "none": None, **POSITIONS}
    return find(known, position, "position")(head_dim, num_heads, grid)


def _make_pool(pool: str, dim: int, num_heads: int, mlp_ratio: float) -> str | nn.Module:
    """Make the attention pool; the other two are words of the ViT."""
    find(dict.fromkeys(("class", "mean", "attention")), pool, "pool")
    return RELATIONS["pool"](dim, num_heads, mlp_ratio=mlp_ratio) if pool == "attention" else pool


def _check_extents(extents: Mapping, names: Sequence[str]) -> None:
    """Refuse an extent that no relation takes."""
    for word, size in extents.items():
        if size is not None and not any(word in _words(name) for name in names):
            raise ValueError(f"{word}={size} has no effect: relation {', '.join(names)} takes none")


def _words(name: str) -> Mapping:
    """Return the options of a relation."""
    return inspect.signature(find(MIXERS, name, "relation")).parameters


def _make_relation(name: str, dim: int, num_heads: int, prefix: int, **options) -> nn.Module:
    """Make a relation with the options that were given, or say which it does not take."""
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in _words(name):
            raise ValueError(f"relation {name!r} takes no {option}")
    if name in FOLDING and prefix:
        raise ValueError(f"relation {name!r} folds the grid of patches: it needs class_token=False and no registers")
    return MIXERS[name](dim, num_heads, **given)
