"""The cases of the vision transformers: small ones that between them use every option."""

import torch

from visattn.models.build import build_vit

SIZE = (20, 28)
# Options of blocks whose defaults do not divide the 8 channels of the small networks in tests.
NARROW_BLOCK_OPTIONS = {
    "shuffle": {"groups": 2},
    "sge": {"groups": 2},
    "ema": {"groups": 2},
    "lct": {"groups": 2},
    "sk": {"groups": 4},
    "epsa": {"groups": (1, 2, 2, 2)},
    "involution": {"group_channels": 4},
    "outlook": {"num_heads": 4},
}
PATCHES_ALONE = {"class_token": False, "pool": "mean"}

MODEL_CASES = {
    "plain": {},
    "deit3": {"class_position": False, "layer_scale": 1e-2},
    "dinov2": {"class_position": False, "layer_scale": 1e-2, "num_registers": 2},
    "mean": {"pool": "mean", "class_token": False, "qk_norm": True},
    "attention_pool": {"pool": "attention", "class_token": False},
    "conv_stem": {"stem": "conv"},
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi", "pool": "mean"},
    # The class token has no place, so that a bias in the last block shows in the patches alone.
    "relative": {"position": "relative", "pool": "mean"},
    "log_cpb": {"position": "log_cpb", "similarity": "cosine", "pool": "mean"},
    "decomposed": {
        "position": "decomposed",
        "similarity": "additive",
        "normalize": "sigmoid",
        "pool": "mean",
    },
    "no_position": {"position": "none"},
    "swin": {
        "relation": ("window", "shifted_window"),
        "window_size": 3,
        "position": "relative",
        **PATCHES_ALONE,
    },
    "neighborhood": {"relation": "neighborhood", "kernel_size": 3, **PATCHES_ALONE},
}


def build(name: str, **more) -> torch.nn.Module:
    """Return a case's ViT in evaluation mode, with seeded weights large enough to matter."""
    torch.manual_seed(0)
    options = {
        "dim": 12,
        "depth": 2,
        "num_heads": 3,
        "patch_size": 4,
        "image_size": SIZE,
        "num_classes": 5,
    }
    model = build_vit(**{**options, **MODEL_CASES[name], **more}).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    return model
