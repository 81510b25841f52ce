"""Networks of other libraries, small and random, and what capture must read in them."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

CLASSES = 7


@dataclass(frozen=True)
class Family:
    """One network: how to build it, the image it takes, and what capture must find.

    ``first`` and ``last`` are layers: (name, heads, grid, prefix); ``count`` is their number.
    """

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int]
    first: tuple
    last: tuple
    count: int
    kinds: tuple[str, ...] = ("token",)
    windows: bool = False


def _timm(name: str, **options) -> Callable:
    return lambda: timm.create_model(name, num_classes=CLASSES, **options)


def _hf(name: str, config: str, **options) -> Callable:
    def build():
        transformers = pytest.importorskip("transformers")
        sizes = {}
        if "Swin" not in name:
            sizes["hidden_size"] = 24
            sizes["num_hidden_layers"] = 2
            sizes["num_attention_heads"] = 3
            sizes["intermediate_size"] = 48
        configuration = getattr(transformers, config)(num_labels=CLASSES, **sizes, **options)
        return getattr(transformers, name)(configuration)

    return build


def _tv_swin(**options):
    return tv.SwinTransformer([4, 4], 24, [2, 2], [2, 3], [3, 3], num_classes=CLASSES, **options)


def _tv_vit():
    model = tv.VisionTransformer(48, 16, 2, 3, 24, 48, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # starts at zero, which would leave nothing to explain
    return model


def _tv_maxvit():
    return tv.MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 4, 0.0, num_classes=CLASSES)


def _mvit():
    sizes = MultiScaleVitCfg(depths=(1, 1, 1), embed_dim=24, num_heads=1)
    return MultiScaleVit(sizes, 64, num_classes=CLASSES)


_SWIN = dict(window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 3))

FAMILIES = [
    Family(
        "timm_vit",
        _timm("vit_tiny_patch16_224", img_size=(48, 80), depth=2),
        (48, 80),
        ("blocks.0.attn", 3, (3, 5), 1),
        ("blocks.1.attn", 3, (3, 5), 1),
        2,
    ),
    Family(
        "timm_vit_other_size",
        _timm("vit_tiny_patch16_224", depth=2, dynamic_img_size=True),
        (80, 112),
        ("blocks.0.attn", 3, (5, 7), 1),
        ("blocks.1.attn", 3, (5, 7), 1),
        2,
    ),
    Family(
        "timm_deit3",
        _timm("deit3_small_patch16_224", img_size=(48, 80), depth=2, embed_dim=48, num_heads=3),
        (48, 80),
        ("blocks.0.attn", 3, (3, 5), 1),
        ("blocks.1.attn", 3, (3, 5), 1),
        2,
    ),
    Family(
        "timm_beit",
        _timm("beit_base_patch16_224", img_size=(48, 80), depth=2, embed_dim=48, num_heads=3),
        (48, 80),
        ("blocks.0.attn", 3, (3, 5), 1),
        ("blocks.1.attn", 3, (3, 5), 1),
        2,
    ),
    Family(
        "timm_eva02",
        _timm("eva02_tiny_patch14_224", img_size=(42, 70), depth=2),
        (42, 70),
        ("blocks.0.attn", 3, (3, 5), 1),
        ("blocks.1.attn", 3, (3, 5), 1),
        2,
    ),
    Family(
        "timm_dinov2_registers",
        _timm(
            "vit_small_patch14_reg4_dinov2",
            depth=2,
            embed_dim=48,
            num_heads=3,
            dynamic_img_size=True,
        ),
        (42, 98),
        ("blocks.0.attn", 3, (3, 7), 5),
        ("blocks.1.attn", 3, (3, 7), 5),
        2,
    ),
    Family(
        "timm_dinov3",
        _timm("vit_small_patch16_dinov3", depth=2, embed_dim=48, num_heads=3),
        (48, 80),
        ("blocks.0.attn", 3, (3, 5), 5),
        ("blocks.1.attn", 3, (3, 5), 5),
        2,
    ),
    Family(
        "timm_siglip",
        _timm("vit_base_patch16_siglip_224", img_size=(48, 80), depth=2, embed_dim=48, num_heads=3),
        (48, 80),
        ("blocks.0.attn", 3, (3, 5), 0),
        ("attn_pool", 3, (3, 5), 0),
        3,
    ),
    Family(
        "timm_cait",
        _timm("cait_xxs24_224", img_size=(48, 80), depth=2, embed_dim=48, num_heads=3),
        (48, 80),
        ("blocks.0.attn", 3, (3, 5), 0),
        ("blocks_token_only.1.attn", 3, (3, 5), 1),
        4,
    ),
    Family(
        "timm_xcit",
        _timm("xcit_nano_12_p16_224", depth=2, embed_dim=66, num_heads=3),
        (48, 80),
        ("blocks.0.attn", 3, None, 0),
        ("cls_attn_blocks.1.attn", 3, (3, 5), 1),
        4,
        ("channel", "token"),
    ),
    Family(
        "timm_swin",
        _timm("swin_tiny_patch4_window7_224", img_size=(64, 96), **_SWIN),
        (64, 96),
        ("layers.0.blocks.0.attn", 2, (16, 24), 0),
        ("layers.1.blocks.1.attn", 3, (8, 12), 0),
        4,
        windows=True,
    ),
    Family(
        "timm_swin_padded",
        _timm("swin_tiny_patch4_window7_224", img_size=(56, 88), **_SWIN),
        (56, 88),
        ("layers.0.blocks.0.attn", 2, (14, 22), 0),
        ("layers.1.blocks.1.attn", 3, (7, 11), 0),
        4,
        windows=True,
    ),
    Family(
        "timm_swinv2",
        _timm("swinv2_tiny_window8_256", img_size=(64, 96), **_SWIN),
        (64, 96),
        ("layers.0.blocks.0.attn", 2, (16, 24), 0),
        ("layers.1.blocks.1.attn", 3, (8, 12), 0),
        4,
        windows=True,
    ),
    Family(
        "timm_maxvit",
        _timm("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1, 1), embed_dim=(32, 64)),
        (64, 64),
        ("stages.0.blocks.0.attn_block.attn", 1, (16, 16), 0),
        ("stages.1.blocks.0.attn_grid.attn", 2, (8, 8), 0),
        4,
        windows=True,
    ),
    Family(
        "timm_pvtv2",
        _timm("pvt_v2_b0", depths=(1, 1, 1, 1)),
        (64, 96),
        ("stages.0.blocks.0.attn", 1, (2, 3), 0),
        ("stages.3.blocks.0.attn", 8, (2, 3), 0),
        4,
    ),
    Family(
        "timm_mvitv2",
        _mvit,
        (64, 64),
        ("stages.0.blocks.0.attn", 1, (4, 4), 0),
        ("stages.2.blocks.0.attn", 4, (8, 8), 0),
        3,
    ),
    Family(
        "torchvision_vit",
        _tv_vit,
        (48, 48),
        ("encoder.layers.encoder_layer_0.self_attention", 3, (3, 3), 1),
        ("encoder.layers.encoder_layer_1.self_attention", 3, (3, 3), 1),
        2,
    ),
    Family(
        "torchvision_swin",
        _tv_swin,
        (44, 56),
        ("features.1.0.attn", 2, (11, 14), 0),
        ("features.3.1.attn", 3, (6, 7), 0),
        4,
        windows=True,
    ),
    Family(
        "torchvision_swinv2",
        lambda: _tv_swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
        (48, 72),
        ("features.1.0.attn", 2, (12, 18), 0),
        ("features.3.1.attn", 3, (6, 9), 0),
        4,
        windows=True,
    ),
    Family(
        "torchvision_maxvit",
        _tv_maxvit,
        (64, 64),
        ("blocks.0.layers.0.layers.window_attention.attn_layer.1", 2, (16, 16), 0),
        ("blocks.1.layers.0.layers.grid_attention.attn_layer.1", 4, (8, 8), 0),
        4,
        windows=True,
    ),
    Family(
        "hf_vit",
        _hf("ViTForImageClassification", "ViTConfig", image_size=(48, 80), patch_size=16),
        (48, 80),
        ("vit.layers.0.attention", 3, (3, 5), 1),
        ("vit.layers.1.attention", 3, (3, 5), 1),
        2,
    ),
    Family(
        "hf_dinov2",
        _hf("Dinov2ForImageClassification", "Dinov2Config", image_size=42, patch_size=14),
        (42, 70),
        ("dinov2.encoder.layer.0.attention", 3, (3, 5), 1),
        ("dinov2.encoder.layer.1.attention", 3, (3, 5), 1),
        2,
    ),
    Family(
        "hf_dinov2_registers",
        _hf(
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersConfig",
            image_size=42,
            patch_size=14,
        ),
        (42, 70),
        ("dinov2_with_registers.encoder.layer.0.attention", 3, (3, 5), 5),
        ("dinov2_with_registers.encoder.layer.1.attention", 3, (3, 5), 5),
        2,
    ),
    Family(
        "hf_clip_vision",
        _hf("CLIPVisionModel", "CLIPVisionConfig", image_size=48, patch_size=16),
        (48, 48),
        ("encoder.layers.0.self_attn", 3, (3, 3), 1),
        ("encoder.layers.1.self_attn", 3, (3, 3), 1),
        2,
    ),
    Family(
        "hf_swin",
        _hf(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=64,
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 3],
            window_size=4,
        ),
        (64, 80),
        ("swin.encoder.layers.0.blocks.0.attention", 2, (16, 20), 0),
        ("swin.encoder.layers.1.blocks.1.attention", 3, (8, 10), 0),
        4,
        windows=True,
    ),
]
# names of parameters that make queries and keys, in the three libraries
_QUERY_AND_KEY = ("qkv", "q_proj", "k_proj", "query", "key", ".q.")

NAMED = {family.name: family for family in FAMILIES}


def built(family: Family) -> tuple[nn.Module, Tensor]:
    """Return a network in evaluation mode, of weights so large that maps vary, and two images."""
    torch.manual_seed(0)
    model = family.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            makes_scores = any(part in name for part in _QUERY_AND_KEY)
            if makes_scores and parameter.ndim == 2:
                parameter.mul_(4)
            is_scale = name.endswith("weight") and "norm" in name
            if is_scale and not parameter.any():
                parameter.fill_(1)  # Swin V2 starts with blocks that add nothing
    return model, torch.randn(2, 3, *family.size)


def output_of(output) -> Tensor:
    """Return the tensor in what a network returned."""
    return output if isinstance(output, Tensor) else output[0]


def set_fused(model: nn.Module, fused: bool):
    """Choose fused or eager attention in the ways the three libraries offer."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa" if fused else "eager")


@contextmanager
def eager_weights(model: nn.Module):
    """Collect the model's own softmax weights by replacing Tensor.softmax, which all call."""
    weights = []
    handles = []
    original = Tensor.softmax

    def softmax(x, dim=None, *args, **kwargs):
        output = original(x, dim, *args, **kwargs)
        if dim in (-1, x.ndim - 1) and x.ndim > 2:
            weights.append(output.detach())
        return output

    def request_weights(module, args, kwargs):
        return args, kwargs | {"need_weights": True, "average_attn_weights": False}

    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            handle = module.register_forward_pre_hook(request_weights, with_kwargs=True)
            handles.append(handle)
    with patch.object(Tensor, "softmax", softmax):
        yield weights
    for handle in handles:
        handle.remove()


def exact(name: str):
    """Return a network in double precision, its eager copy, two images and a class for each."""
    model, images = built(NAMED[name])
    model.double()
    eager = copy.deepcopy(model)
    set_fused(eager, False)
    return model, eager, images.double(), torch.tensor([3, 5])


class ChannelBrightness(nn.Module):
    """The score of class c is the brightness of channel c: no other channel is evidence for it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        nn.init.eye_(self.conv.weight.data[:, :, 0, 0])

    def forward(self, images):
        return self.conv(images).mean((2, 3))


class SmallCNN(nn.Module):
    """Two convolutions, the mean, one linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, 2, 1)
        self.body = nn.Conv2d(5, 7, 3, 2, 1)
        self.head = nn.Linear(7, 4)

    def forward(self, images):
        x = F.relu(self.stem(images))
        x = F.relu(self.body(x))
        return self.head(x.mean((2, 3)))


class TinyNet(nn.Module):
    """A patch embedding, one nn.MultiheadAttention, a mean and a linear layer."""

    def __init__(self, need_weights: bool):
        super().__init__()
        self.need_weights = need_weights
        self.embed = nn.Conv2d(3, 12, 4, 4)
        self.mix = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        y, self.weights = self.mix(
            x, x, x, need_weights=self.need_weights, average_attn_weights=False
        )
        return self.head((x + y).mean(1))


def tiny() -> tuple[TinyNet, Tensor]:
    torch.manual_seed(0)
    return TinyNet(False).eval(), torch.randn(2, 3, 12, 20)
