"""Key maps of branches, context and token blocks: {class: {source: key map}}."""

from typing import Any

_QKV_CONV = {"query_conv": "query", "key_conv": "key", "value_conv": "value"}

TOKEN_KEYS: dict[str, dict[str, Any]] = {
    "SelectiveKernel": {
        "timm": {
            **{f"paths.{i}.conv": f"branches.{i}.0" for i in range(8)},
            **{f"paths.{i}.bn": f"branches.{i}.1" for i in range(8)},
            "attn.fc_reduce": "fc1",
            "attn.bn": "norm",
            "attn.fc_select": "fc2",
        },
    },
    "SplitAttention": {
        "paper": {"bn0": "norm", "bn1": "hidden_norm"},
        "timm": {"bn0": "norm", "bn1": "hidden_norm"},
    },
    "PyramidSqueezeAttention": {
        "paper": {
            **{f"conv_{i + 1}": f"convs.{i}" for i in range(8)},
            "se.fc1": "fc1",
            "se.fc2": "fc2",
        },
    },
    "ContextualTransformer": {
        "paper": {"key_embed": "key", "conv1x1": "value", "bn": "norm", "se": "fuse"},
    },
    "OutlookAttention": {
        "timm": {"v": "value", "attn": "weigh"},
    },
    "GlobalContext": {
        "paper": {"conv_mask": "score", "channel_add_conv": "add", "channel_mul_conv": "scale"},
        "timm": {
            "conv_attn": "score",
            "mlp_add.fc1": "add.0",
            "mlp_add.norm": "add.1",
            "mlp_add.fc2": "add.3",
            "mlp_scale.fc1": "scale.0",
            "mlp_scale.norm": "scale.1",
            "mlp_scale.fc2": "scale.3",
        },
    },
    "NonLocal": {
        "mmcv": {
            "theta.conv": "query",
            "phi.conv": "key",
            "g.conv": "value",
            "conv_out.conv": "proj",
        },
        "alexhex7": {
            "theta": "query",
            "phi.0": "key",
            "g.0": "value",
            "W.0": "proj",
            "W.1": "norm",
        },
        "timm": {"t": "query", "p": "key", "g": "value", "z": "proj"},
    },
    "DoubleAttention": {
        "paper": {
            "convA": "value",
            "convB": "gather",
            "convV": "distribute",
            "conv_reconstruct": "proj",
        },
    },
    "PositionAttention": {"paper": _QKV_CONV},
    "ChannelAttentionModule": {"paper": {}},
    "CrissCrossAttention2d": {"paper": _QKV_CONV},
    "EfficientAttention": {
        "paper": {"keys": "key", "queries": "query", "values": "value", "reprojection": "proj"},
    },
    "ExternalAttention": {
        "paper": {
            "conv1": "query",
            "linear_0.weight": "memory_key",
            "linear_1.weight": ("memory_value", lambda weight: weight.flatten(1).T),
            "conv2.0": "proj",
            "conv2.1": "norm",
        },
    },
    "BottleneckAttention": {
        # Their offsets run from the key to the query.
        "timm": {
            "pos_embed.height_rel": ("position.rows", lambda rows: rows.flip(0)),
            "pos_embed.width_rel": ("position.columns", lambda columns: columns.flip(0)),
        },
    },
    "CrossCovarianceAttention": {"timm": {}},
}
