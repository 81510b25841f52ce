"""build_vit: a ViT from plain words and numbers.

Only here do the models turn names into objects; ViT itself takes modules.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import nn

from visattn.core.attention import RELATIONS
from visattn.core.attention.heads import width_per_head
from visattn.core.normalize import NORMALIZERS
from visattn.core.position import POSITIONS
from visattn.core.similarity import SIMILARITIES
from visattn.models.stem import TOKEN_STEMS
from visattn.models.vit import ViT, ViTBlock
from visattn.names import lookup

T = TypeVar("T")

# Relations that partition the grid of patches, in which a class token has no position.
FOLDING = ("window", "shifted_window", "grid", "axial", "criss_cross", "neighborhood")
# Relations that give an output for every token.
MIXER_NAMES = ("self", *FOLDING, "memory", "channel")
MIXERS = {name: RELATIONS[name] for name in MIXER_NAMES}


@dataclass(frozen=True)
class Tokens:
    """How an image becomes tokens, and which are pooled; see ViT for the options."""

    stem: str = "patch"
    patch_size: int = 16
    class_position: bool = True
    class_token: bool = True
    num_registers: int = 0
    pool: str = "class"

    @property
    def prefix(self) -> int:
        """The number of tokens in front of the patches."""
        return self.class_token + self.num_registers


@dataclass(frozen=True)
class Mixing:
    """How tokens attend to each other; names come from the tables of core.

    Several relations alternate from block to block, such as ``["window", "shifted_window"]``.
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
        """The relations that alternate."""
        if isinstance(self.relation, str):
            return [self.relation]
        return list(self.relation)

    @property
    def extents(self) -> dict[str, int | None]:
        """The sizes that some relations take."""
        return {"window_size": self.window_size, "kernel_size": self.kernel_size}

    def build_relation(
        self,
        name: str,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        prefix: int,
    ) -> nn.Module:
        """Build the relation of one block."""
        head_dim = width_per_head(dim, num_heads)
        vector_size = head_dim
        if name == "channel":
            # Channel attention compares channels, each a vector over all tokens.
            vector_size = prefix + grid[0] * grid[1]
        options = {
            "similarity": make(SIMILARITIES, self.similarity, "similarity", vector_size, num_heads),
            "normalize": make(NORMALIZERS, self.normalize, "normalize", num_heads),
            "position": _build_position(self.position, head_dim, num_heads, grid),
            "qk_norm": self.qk_norm or None,
        }
        accepted = _relation_options(name)
        for option, size in self.extents.items():
            if option in accepted:
                options[option] = size
        return _build_relation(name, dim, num_heads, prefix, options)


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
    **options: Any,
) -> ViT:
    """Build a ViT; the other options are the fields of Tokens and Mixing, all on one level."""
    option_names = dict.fromkeys(known_options(build_vit))
    for option in options:
        lookup(option_names, option, "option of a ViT")
    tokens = Tokens(**_select_fields(Tokens, options))
    mixing = Mixing(**_select_fields(Mixing, options))
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    height, width = image_size
    width_per_head(dim, num_heads)  # refuses heads that do not divide dim
    stem_class = lookup(TOKEN_STEMS, tokens.stem, "stem")
    stem = stem_class(dim, tokens.patch_size, in_channels=in_channels)
    grid = stem.grid(height, width)
    names = mixing.names  # block i has relation i modulo their number
    _check_extents(mixing.extents, names)
    blocks = []
    for index in range(depth):
        name = names[index % len(names)]
        block = ViTBlock(
            dim,
            mixing.build_relation(name, dim, num_heads, grid, tokens.prefix),
            mlp_ratio=mlp_ratio,
            layer_scale=layer_scale,
            drop_path=drop_path * index / max(depth - 1, 1),  # rises linearly with depth
        )
        blocks.append(block)
    return ViT(
        stem,
        blocks,
        dim=dim,
        num_classes=num_classes,
        image_size=(height, width),
        positions=_learned_positions(tokens, mixing),
        class_token=tokens.class_token,
        num_registers=tokens.num_registers,
        pool=_build_pool(tokens.pool, dim, num_heads, mlp_ratio),
        dropout=dropout,
    )


def _learned_positions(tokens: Tokens, mixing: Mixing) -> str:
    """Name the tokens that get a learned position, in the words of ViT."""
    if mixing.position != "learned":
        return "none"
    return "all" if tokens.class_position else "patches"


def known_options(build: Callable) -> list[str]:
    """List the options of a build function; build_vit also takes those of Tokens and Mixing."""
    names = []
    for name, parameter in inspect.signature(build).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names.append(name)
    if build is build_vit:
        names += [field.name for field in (*fields(Tokens), *fields(Mixing))]
    return names


def _select_fields(
    group: type[Tokens | Mixing],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return those of the options that are fields of the dataclass."""
    names = {field.name for field in fields(group)}
    return {name: value for name, value in options.items() if name in names}


def make(
    table: Mapping[str, Callable[..., T]],
    choice: str | Callable[..., T] | None,
    argument: str,
    *sizes: int,
) -> T | None:
    """Call a class of the table by its name, or any callable, with the sizes."""
    if choice is None:
        return None
    build = lookup(table, choice, argument) if isinstance(choice, str) else choice
    return build(*sizes)


def _build_position(
    position: str,
    head_dim: int,
    num_heads: int,
    grid: tuple[int, int],
) -> nn.Module | None:
    """Build the module that adds positions to the scores; learned ones belong to the ViT."""
    if position in ("learned", "none"):
        return None
    if position not in POSITIONS:
        # Raises, with all words that `position` may be.
        lookup(dict.fromkeys(("learned", "none", *POSITIONS)), position, "position")
    return POSITIONS[position](head_dim, num_heads, grid)


def _build_pool(
    pool: str,
    dim: int,
    num_heads: int,
    mlp_ratio: float,
) -> str | nn.Module:
    """Build the attention pool; the ViT knows "class" and "mean" by name."""
    lookup(dict.fromkeys(("class", "mean", "attention")), pool, "pool")
    if pool != "attention":
        return pool
    return RELATIONS["pool"](dim, num_heads, mlp_ratio=mlp_ratio)


def _check_extents(
    extents: Mapping[str, int | None],
    names: Sequence[str],
) -> None:
    """Refuse a size that none of the relations takes."""
    for option, size in extents.items():
        accepted = any(option in _relation_options(name) for name in names)
        if size is not None and not accepted:
            raise ValueError(
                f"{option}={size} has no effect: relation {', '.join(names)} takes none"
            )


def _relation_options(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the constructor parameters of a relation."""
    return inspect.signature(lookup(MIXERS, name, "relation")).parameters


def _build_relation(
    name: str,
    dim: int,
    num_heads: int,
    prefix: int,
    options: Mapping[str, Any],
) -> nn.Module:
    """Build a relation; an option that is None keeps the relation's default."""
    chosen = {}
    for option, value in options.items():
        if value is not None:
            chosen[option] = value
    accepted = _relation_options(name)
    for option in chosen:
        if option not in accepted:
            raise ValueError(f"relation {name!r} takes no {option}")
    if name in FOLDING and prefix:
        raise ValueError(
            f"relation {name!r} folds the grid of patches: it needs class_token=False "
            "and no registers"
        )
    return MIXERS[name](dim, num_heads, **chosen)
