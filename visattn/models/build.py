"""Plain words and numbers -> a ViT; the only place of the models where strings stand for objects."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn

from visattn.core.attention import RELATIONS
from visattn.core.attention.full import per_head
from visattn.core.normalize import NORMALIZERS
from visattn.core.position import POSITIONS
from visattn.core.similarity import SIMILARITIES
from visattn.models.stem import TOKEN_STEMS
from visattn.models.vit import ViT, ViTBlock
from visattn.names import lookup

# Relations that give every token of the grid an output, and those of them that fold the grid, which
# has no class token.
FOLDING = ("window", "shifted_window", "grid", "axial", "criss_cross", "neighborhood")
MIXERS = {name: RELATIONS[name] for name in ("self", *FOLDING, "memory", "channel")}


@dataclass(frozen=True)
class Tokens:
    """How an image becomes tokens, and what is pooled from them; the words are those of ViT."""

    stem: str = "patch"
    patch_size: int = 16
    class_position: bool = True
    class_token: bool = True
    num_registers: int = 0
    pool: str = "class"

    @property
    def prefix(self) -> int:
        """How many tokens stand before those of the image."""
        return self.class_token + self.num_registers


@dataclass(frozen=True)
class Mixing:
    """How tokens attend to each other; names come from the tables of core.

    Several relations take turns from block to block, such as ``["window", "shifted_window"]``.
    """

    relation: str | Sequence[str] = "self"
    window_size: int | None = None
    kernel_size: int | None = None
    position: str = "learned"
    qk_norm: bool = False
    similarity: str | Callable | None = None
    normalize: str | Callable | None = None

    @property
    def names(self) -> list[str]:
        """The relations that take turns."""
        return [self.relation] if isinstance(self.relation, str) else list(self.relation)

    @property
    def extents(self) -> dict[str, int | None]:
        """The sizes that some relations take."""
        return {"window_size": self.window_size, "kernel_size": self.kernel_size}

    def attention(
        self, name: str, dim: int, num_heads: int, grid: tuple[int, int], prefix: int
    ) -> nn.Module:
        """Make the relation of one block."""
        head_dim = per_head(dim, num_heads)
        # What channel attention compares are channels, each a vector over the tokens.
        width = prefix + grid[0] * grid[1] if name == "channel" else head_dim
        return _make_relation(
            name,
            dim,
            num_heads,
            prefix,
            similarity=make(SIMILARITIES, self.similarity, "similarity", width, num_heads),
            normalize=make(NORMALIZERS, self.normalize, "normalize", num_heads),
            position=_make_position(self.position, head_dim, num_heads, grid),
            qk_norm=self.qk_norm or None,
            **{word: size for word, size in self.extents.items() if word in _words(name)},
        )


GROUPS = (Tokens, Mixing)


def build_vit(
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    dim: int = 192,
    depth: int = 12,
    num_heads: int = 3,
    mlp_ratio: float = 4.0,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    **options,
) -> ViT:
    """Build a ViT; further options are those of Tokens and Mixing, all on one level."""
    for word in options:
        lookup(dict.fromkeys(known_options(build_vit)), word, "option of a ViT")
    tokens, mixing = (
        group(**{word: options[word] for word in _fields(group) if word in options})
        for group in GROUPS
    )
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    per_head(dim, num_heads)
    patches = lookup(TOKEN_STEMS, tokens.stem, "stem")(
        dim, tokens.patch_size, in_channels=in_channels
    )
    grid, names = patches.grid(*size), mixing.names
    _check_extents(mixing.extents, names)
    blocks = [
        ViTBlock(
            dim,
            mixing.attention(names[i % len(names)], dim, num_heads, grid, tokens.prefix),
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
        positions=("all" if tokens.class_position else "patches")
        if mixing.position == "learned"
        else "none",
        class_token=tokens.class_token,
        num_registers=tokens.num_registers,
        pool=_make_pool(tokens.pool, dim, num_heads, mlp_ratio),
        dropout=dropout,
    )


def known_options(build: Callable) -> list[str]:
    """Return the words that a build function takes, those of its groups among them."""
    parameters = inspect.signature(build).parameters
    named = [
        word
        for word, parameter in parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    return (
        named + [word for group in GROUPS for word in _fields(group)]
        if build is build_vit
        else named
    )


def _fields(group: type) -> list[str]:
    return [field.name for field in fields(group)]


def make(
    table: Mapping, choice: str | Callable | None, argument: str, *sizes: int
) -> nn.Module | None:
    """Make the object that a name of the table, or a callable of the sizes, stands for."""
    if choice is None:
        return None
    return (lookup(table, choice, argument) if isinstance(choice, str) else choice)(*sizes)


def _make_position(
    position: str, head_dim: int, num_heads: int, grid: tuple[int, int]
) -> nn.Module | None:
    """Make what gives positions to scores; learned positions live in the ViT itself."""
    if position in ("learned", "none"):
        return None
    known = {"learned": None, "none": None, **POSITIONS}
    return lookup(known, position, "position")(head_dim, num_heads, grid)


def _make_pool(pool: str, dim: int, num_heads: int, mlp_ratio: float) -> str | nn.Module:
    """Make the attention pool; the other two are words of the ViT."""
    lookup(dict.fromkeys(("class", "mean", "attention")), pool, "pool")
    return RELATIONS["pool"](dim, num_heads, mlp_ratio=mlp_ratio) if pool == "attention" else pool


def _check_extents(extents: Mapping, names: Sequence[str]) -> None:
    """Refuse an extent that no relation takes."""
    for word, size in extents.items():
        if size is not None and not any(word in _words(name) for name in names):
            raise ValueError(f"{word}={size} has no effect: relation {', '.join(names)} takes none")


def _words(name: str) -> Mapping:
    """Return the options of a relation."""
    return inspect.signature(lookup(MIXERS, name, "relation")).parameters


def _make_relation(name: str, dim: int, num_heads: int, prefix: int, **options) -> nn.Module:
    """Make a relation with the options that were given, or say which it does not take."""
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in _words(name):
            raise ValueError(f"relation {name!r} takes no {option}")
    if name in FOLDING and prefix:
        raise ValueError(
            f"relation {name!r} folds the grid of patches: it needs class_token=False and no registers"
        )
    return MIXERS[name](dim, num_heads, **given)
