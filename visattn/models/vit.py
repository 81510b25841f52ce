"""The vision transformer: stem, blocks, pooled head. Parameter names are timm's."""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.nn import functional as F

from visattn.models.stem import TokenStem

EPS = 1e-6  # of every layer norm, as in timm


class ViTBlock(nn.Module):
    r"""Attention between tokens, then an MLP on each token, both on a residual path.

    .. math::
        x' = x + \lambda_1 \odot \mathrm{attn}(\mathrm{LN}(x)), \qquad
        y = x' + \lambda_2 \odot \mathrm{MLP}(\mathrm{LN}(x'))

    Args:
        dim: D, the width of a token.
        attention: A relation of ``visattn.core.attention`` over ``dim``.
        mlp_ratio: The MLP's hidden width over D.
        layer_scale: First value of :math:`\lambda`; None for no such parameter.
        drop_path: Probability of dropping a residual branch of one image in training.

    Shape:
        - Input: (B, N, D) and the grid (h, w) of the last h * w tokens.
        - Output: (B, N, D).

    Map:
        That of ``attention``.

    Reference:
        Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", eq. 2-3,
        https://arxiv.org/abs/2010.11929; LayerScale: Touvron et al. 2021,
        https://arxiv.org/abs/2103.17239. Differs from the papers in: nothing.

    Example:
        >>> from visattn.core.attention import SelfAttention
        >>> ViTBlock(12, SelfAttention(12, 3))(torch.rand(2, 7, 12)).shape
        torch.Size([2, 7, 12])
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = attention
        self.ls1 = _make_layer_scale(dim, layer_scale)
        self.drop_path1 = _make_drop_path(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = _make_layer_scale(dim, layer_scale)
        self.drop_path2 = _make_drop_path(drop_path)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        mixed = self.attn(self.norm1(x), grid=grid)
        x = x + self.drop_path1(self.ls1(mixed))
        hidden = self.mlp(self.norm2(x))
        return x + self.drop_path2(self.ls2(hidden))


def _make_layer_scale(dim: int, layer_scale: float | None) -> nn.Module:
    if layer_scale is None:
        return nn.Identity()
    return LayerScale(dim, layer_scale)


def _make_drop_path(probability: float) -> nn.Module:
    if probability == 0:
        return nn.Identity()
    return DropPath(probability)


class ViT(nn.Module):
    r"""Turn an image into tokens that attend to each other, pool them, and classify.

    .. math::
        z_0 = [z_\mathrm{class};\, z_\mathrm{registers};\, \mathrm{stem}(x)] + p, \qquad
        z_l = \mathrm{block}_l(z_{l-1}), \qquad y = W\,\mathrm{pool}(\mathrm{LN}(z_L)) + b

    For images of another size than ``image_size`` the learned positions p are resized (bicubic,
    antialiased).

    Args:
        stem: Image to feature map (B, D, h, w); its method ``grid(height, width)`` gives (h, w),
            as in PatchStem.
        blocks: Token mixers called as ``block(x, grid)``, such as ViTBlock.
        dim: D, the width of a token.
        num_classes: Width of the output; 0 gives the pooled features themselves.
        image_size: (height, width) that the learned positions are laid out for.
        positions: Which tokens get a learned position: ``"all"``, ``"patches"`` (as DeiT III and
            DINOv2) or ``"none"``.
        class_token: Whether a class token leads the sequence.
        num_registers: Register tokens behind the class token.
        pool: What the head reads: ``"class"`` (the class token), ``"mean"`` (of the patches,
            normalized after the mean), or a module (B, N, D) -> (B, 1, D) such as PoolAttention.
        dropout: Of the head's input.

    Shape:
        - Input: (B, C, H, W).
        - Output: (B, num_classes).

    Map:
        One of kind "token" per block.

    Raises:
        ValueError: ``positions`` or ``pool`` is unknown; ``pool="class"`` without a class token.

    Reference:
        Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929.
        Differs from the paper in: the options named above; positions are resized for another
        image size and on loading.

    Example:
        >>> from visattn.models.presets import create_model
        >>> model = create_model("vit_nano", num_classes=5, image_size=(24, 32))
        >>> model(torch.rand(2, 3, 24, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        stem: TokenStem,
        blocks: Sequence[nn.Module],
        *,
        dim: int,
        num_classes: int = 1000,
        image_size: tuple[int, int] = (224, 224),
        positions: str = "all",
        class_token: bool = True,
        num_registers: int = 0,
        pool: str | nn.Module = "class",
        dropout: float = 0.0,
    ):
        super().__init__()
        _check_options(positions, pool, class_token)
        self.num_classes = num_classes
        self.num_features = dim
        self.num_prefix_tokens = class_token + num_registers
        self.grid_size = stem.grid(*image_size)
        self.patch_embed = stem
        self.cls_token = _make_tokens(int(class_token), dim)
        self.reg_token = _make_tokens(num_registers, dim)
        self.prefix_positions = self.num_prefix_tokens if positions == "all" else 0
        self.pos_embed = None
        if positions != "none":
            rows, columns = self.grid_size
            self.pos_embed = _make_tokens(self.prefix_positions + rows * columns, dim)
        self.blocks = nn.ModuleList(blocks)
        self._set_pool(pool)
        self.head_drop = nn.Dropout(dropout)
        self.head = _make_head(dim, num_classes)
        self._init_weights()
        self.register_load_state_dict_pre_hook(_resize_on_load)

    def _set_pool(self, pool: str | nn.Module) -> None:
        """Place the norms: before the pool, or behind it where the mean is pooled."""
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=EPS)
        self.fc_norm: nn.Module = nn.Identity()
        self.attn_pool: nn.Module | None = None
        if isinstance(pool, nn.Module):
            self.attn_pool = pool
            self.pool = "attention"
            return
        self.pool = pool
        if pool == "mean":
            self.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(self.num_features, eps=EPS)

    def _init_weights(self) -> None:
        """Draw weights as timm does; similarities, normalizers and positions keep their own."""
        for name, module in self.named_modules():
            belongs_to_core = ".attend." in name or ".position." in name
            if isinstance(module, nn.Linear) and not belongs_to_core:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in self._prefix():
            nn.init.normal_(token, std=1e-6)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _prefix(self) -> list[nn.Parameter]:
        """List the learned tokens in front of the patches: class token, then registers."""
        return [token for token in (self.cls_token, self.reg_token) if token is not None]

    def _to_tokens(self, x: Tensor) -> Tensor:
        """Flatten a feature map (B, D, h, w) to (B, prefix + h w, D), with positions."""
        height, width = x.shape[-2:]
        positions = self._positions_for((height, width))
        x = x.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h w, D)
        batch = x.shape[0]
        prefix = [token.expand(batch, -1, -1) for token in self._prefix()]
        if positions is None:
            return torch.cat([*prefix, x], dim=1) if prefix else x
        if self.prefix_positions:
            return torch.cat([*prefix, x], dim=1) + positions
        x = x + positions
        return torch.cat([*prefix, x], dim=1) if prefix else x

    def _positions_for(
        self,
        grid: tuple[int, int],
    ) -> Tensor | None:
        """Return the learned positions laid out for this grid, if there are any."""
        if self.pos_embed is None:
            return None
        # While exporting, a comparison would tie the graph to the example's size.
        if is_exporting() or grid != self.grid_size:
            return resize_positions(
                self.pos_embed, self.grid_size, grid, prefix=self.prefix_positions
            )
        return self.pos_embed

    def forward_features(self, x: Tensor) -> Tensor:
        """Turn images into normalized tokens (B, prefix + h w, D)."""
        x = self.patch_embed(x)
        grid = tuple(x.shape[-2:])
        x = self._to_tokens(x)  # (B, D, h, w) -> (B, prefix + h w, D)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Pool the tokens and classify them."""
        if self.pool == "class":
            x = x[:, 0]
        elif self.pool == "mean":
            x = x[:, self.num_prefix_tokens :].mean(1)
        elif self.attn_pool is not None:
            x = self.attn_pool(x[:, self.num_prefix_tokens :])[:, 0]
        # (B, D) -> (B, num_classes)
        return self.head(self.head_drop(self.fc_norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last layer, as timm's models do."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by an untrained one for another number of classes."""
        self.num_classes = num_classes
        self.head = _make_head(self.num_features, num_classes)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that are not decayed."""
        tokens = re.compile(r"^(cls_token|reg_token|pos_embed|attn_pool\.latent)$|\.position\.")
        return {name for name, _ in self.named_parameters() if tokens.search(name)}

    def group_matcher(
        self,
        coarse: bool = False,
    ) -> dict[str, Any]:
        """Group parameters by depth for layer-wise learning rates, in timm's notation."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _make_head(dim: int, num_classes: int) -> nn.Module:
    """Build the last layer; without classes the model returns its features."""
    if num_classes == 0:
        return nn.Identity()
    return nn.Linear(dim, num_classes)


def _make_tokens(count: int, dim: int) -> nn.Parameter | None:
    """Allocate learned tokens (1, count, D), or None where there are none."""
    if count == 0:
        return None
    return nn.Parameter(torch.zeros(1, count, dim))


def resize_positions(
    positions: Tensor,
    grid: tuple[int, int],
    target_grid: tuple[int, int],
    *,
    prefix: int = 0,
) -> Tensor:
    """Resize learned positions (1, prefix + h w, D) to another grid; those of the prefix stay."""
    prefix_positions = positions[:, :prefix]
    patches = positions[:, prefix:]
    # (1, h w, D) -> (1, D, h, w)
    plane = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    plane = plane.float()
    plane = F.interpolate(plane, size=target_grid, mode="bicubic", antialias=True)
    # (1, D, h', w') -> (1, h' w', D)
    patches = plane.flatten(2).transpose(1, 2).to(positions.dtype)
    return torch.cat([prefix_positions, patches], dim=1)


def _resize_on_load(
    model: ViT,
    state: dict[str, Tensor],
    prefix: str,
    *_: object,
) -> None:
    """Resize the positions of weights trained at another image size, on a square grid."""
    key = prefix + "pos_embed"
    if model.pos_embed is None or key not in state:
        return
    positions = state[key]
    if positions.shape == model.pos_embed.shape:
        return
    # Where the shapes cannot be matched, load_state_dict names both in its error.
    num_patches = positions.shape[1] - model.prefix_positions
    if num_patches <= 0 or positions.shape[2] != model.num_features:
        return
    edge = math.isqrt(num_patches)
    if edge * edge != num_patches:
        return
    state[key] = resize_positions(
        positions, (edge, edge), model.grid_size, prefix=model.prefix_positions
    )


def _check_options(
    positions: str,
    pool: str | nn.Module,
    class_token: bool,
) -> None:
    """Refuse unknown words and a pool that the tokens cannot serve."""
    if positions not in ("all", "patches", "none"):
        raise ValueError(f"positions must be 'all', 'patches' or 'none'; got {positions!r}")
    if not isinstance(pool, nn.Module) and pool not in ("class", "mean"):
        raise ValueError(f"pool must be 'class', 'mean' or a module; got {pool!r}")
    if pool == "class" and not class_token:
        raise ValueError(
            "pool='class' needs class_token=True; without a class token use pool='mean' "
            "or an attention pool"
        )
