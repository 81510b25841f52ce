"""Plain words and numbers -> a ViT; the only place of the models where strings stand for objects."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches

from torch import nn

from visattn.core.attention import RELATIONS, SelfAttention
from visattn.core.normalize import NORMALIZERS
from visattn.core.position import POSITIONS
from visattn.core.similarity import SIMILARITIES
from visattn.models.stem import STEMS
from visattn.models.vit import ViT, ViTBlock


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
    qk_norm: bool = False,
    similarity: str | Callable | None = None,
    normalize: str | Callable | None = None,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> ViT:
    """Build a ViT; the words are those of ViT, ViTBlock and SelfAttention, names come from the tables of core."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    head_dim = dim // num_heads
    patches = find(STEMS, stem, "stem")(dim, patch_size, in_channels=in_channels)

    def attention() -> nn.Module:
        return SelfAttention(
            dim,
            num_heads,
            similarity=make(SIMILARITIES, similarity, "similarity", head_dim, num_heads),
            normalize=make(NORMALIZERS, normalize, "normalize", num_heads),
            position=_make_position(position, head_dim, num_heads, patches.grid(*size)),
            qk_norm=qk_norm,
        )

    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    blocks = [
        ViTBlock(dim, attention(), mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop_path=rate) for rate in rates
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
        pool=RELATIONS["pool"](dim, num_heads, mlp_ratio=mlp_ratio) if pool == "attention" else pool,
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
