"""The vision transformer: a stem, blocks of attention and MLP, a pooled head. Parameter names are timm's."""

import re

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.nn import functional as F


class ViTBlock(nn.Module):
    r"""Attention between tokens, then an MLP on each token, both on a residual path.

    .. math::
        x' = x + \lambda_1 \odot \mathrm{attn}(\mathrm{LN}(x)), \qquad
        y = x' + \lambda_2 \odot \mathrm{MLP}(\mathrm{LN}(x'))

    Args:
        dim: D, the width of a token.
        attention: A relation of ``visattn.core.attention`` over ``dim``.
        mlp_ratio: The MLP's hidden width over D.
        layer_scale: First value of :math:`\lambda`; None for :math:`\lambda = 1` without a parameter.
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
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid=grid)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    r"""Turn an image into tokens, let them attend to each other, and classify what is pooled from them.

    .. math::
        z_0 = [z_\mathrm{class};\, z_\mathrm{registers};\, \mathrm{stem}(x)] + p, \qquad
        z_l = \mathrm{block}_l(z_{l-1}), \qquad y = W\,\mathrm{pool}(\mathrm{LN}(z_L)) + b

    Images of another size than ``image_size`` are welcome: the learned positions p are resized
    (bicubic, antialiased).

    Args:
        stem: Image to feature map (B, D, h, w), with ``grid(height, width)`` as PatchStem.
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
        Differs from the
        paper in: the options named above; positions are resized for another image size and on
        loading.

    Example:
        >>> from visattn.models.presets import create_model
        >>> create_model("vit_nano", num_classes=5, image_size=(24, 32))(torch.rand(2, 3, 24, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: list[nn.Module],
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
        _check(positions, pool, class_token)
        self.num_classes, self.num_features = num_classes, dim
        self.num_prefix_tokens = class_token + num_registers
        self.grid_size = stem.grid(*image_size)
        self.patch_embed = stem
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, dim)) if num_registers else None
        self.prefix_positions = self.num_prefix_tokens if positions == "all" else 0
        count = self.grid_size[0] * self.grid_size[1] + self.prefix_positions
        self.pos_embed = None if positions == "none" else nn.Parameter(torch.zeros(1, count, dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity() if pool == "mean" else nn.LayerNorm(dim, eps=1e-6)
        self.attn_pool = pool if isinstance(pool, nn.Module) else None
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pool == "mean" else nn.Identity()
        self.pool = "attention" if isinstance(pool, nn.Module) else pool
        self.head_drop = nn.Dropout(dropout)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()
        self.register_load_state_dict_pre_hook(_resize_on_load)

    def _init_weights(self) -> None:
        """Draw weights as timm does; what a similarity or normalizer learns keeps its own start."""
        for name, module in self.named_modules():
            if (
                isinstance(module, nn.Linear)
                and ".attend." not in name
                and ".position." not in name
            ):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """Flatten a feature map (B, D, h, w) to (B, prefix + h w, D), with positions."""
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            positions = self.pos_embed
            # While exporting, a comparison would tie the graph to the example's size.
            if is_exporting() or grid != self.grid_size:
                positions = resize_positions(
                    positions, self.grid_size, grid, prefix=self.prefix_positions
                )
            if not self.prefix_positions:
                x = x + positions
        prefix = [
            t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None
        ]
        if prefix:
            x = torch.cat([*prefix, x], dim=1)
        return x + positions if self.prefix_positions and self.pos_embed is not None else x

    def forward_features(self, x: Tensor) -> Tensor:
        """Turn images into normalized tokens (B, prefix + h w, D)."""
        x = self.patch_embed(x)
        grid = tuple(x.shape[-2:])
        x = self._to_tokens(x)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Pool the tokens and classify them."""
        if self.pool == "class":
            x = x[:, 0]
        elif self.pool == "mean":
            x = x[:, self.num_prefix_tokens :].mean(1)
        else:
            x = self.attn_pool(x[:, self.num_prefix_tokens :])[:, 0]
        return self.head(self.head_drop(self.fc_norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last layer, as timm's models do."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh last layer for another number of classes."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay must leave alone."""
        tokens = re.compile(r"^(cls_token|reg_token|pos_embed|attn_pool\.latent)$|\.position\.")
        return {name for name, _ in self.named_parameters() if tokens.search(name)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Group parameters by depth for layer-wise learning rates, in timm's notation."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], *, prefix: int = 0
) -> Tensor:
    """Lay learned positions (1, prefix + h w, D) out for another grid; those of prefix tokens stay."""
    kept, patches = positions[:, :prefix], positions[:, prefix:]
    sheet = patches.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    sheet = F.interpolate(sheet, size=tuple(new), mode="bicubic", antialias=True)
    return torch.cat([kept, sheet.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def _resize_on_load(model: ViT, state: dict, prefix: str, *_) -> None:
    """Fit the positions of weights that were trained at another image size; their grid is taken to be square."""
    key = prefix + "pos_embed"
    if model.pos_embed is None or key not in state or state[key].shape == model.pos_embed.shape:
        return
    count = state[key].shape[1] - model.prefix_positions
    side = round(max(count, 0) ** 0.5)
    if side * side != count or not count or state[key].shape[2] != model.num_features:
        return  # load_state_dict then names the two shapes
    state[key] = resize_positions(
        state[key], (side, side), model.grid_size, prefix=model.prefix_positions
    )


def _check(positions: str, pool: str | nn.Module, class_token: bool) -> None:
    """Refuse words the ViT does not know."""
    if positions not in ("all", "patches", "none"):
        raise ValueError(f"positions must be 'all', 'patches' or 'none'; got {positions!r}")
    if not isinstance(pool, nn.Module) and pool not in ("class", "mean"):
        raise ValueError(f"pool must be 'class', 'mean' or a module; got {pool!r}")
    if pool == "class" and not class_token:
        raise ValueError(
            "pool='class' needs class_token=True; without a class token use pool='mean' or an attention pool"
        )
