"""Key maps of the gates over channels, alone or with positions: {class: {source: key map}}."""

from typing import Any

from torch import Tensor


def swap_two(weight: Tensor) -> Tensor:
    """Swap the two input channels of a convolution: their [mean, max] is our [max, mean]."""
    return weight.flip(1)


CHANNEL_KEYS: dict[str, dict[str, Any]] = {
    "SqueezeExcite": {
        "paper": {"fc.0": "fc1", "fc.2": "fc2"},
        "timm": {},
    },
    "EffectiveSqueezeExcite": {
        "timm": {},
    },
    "EfficientChannelAttention": {
        "paper": {},
        "timm": {},
    },
    "GatherExcite": {
        "timm": {"mlp.fc1": "excite.0", "mlp.fc2": "excite.2"},
    },
    "StyleRecalibration": {
        "paper": {"cfc": "weight", "bn": "norm"},
    },
    "GatedChannelTransform": {
        "paper": {},
    },
    "LinearContextTransform": {
        "changzy00": {"w": "weight", "b": "bias"},
    },
    "FrequencyChannelAttention": {
        "paper": {"dct_layer": None, "fc.0": "fc1", "fc.2": "fc2"},
    },
    "NormalizationAttention": {
        "paper": {"bn2": "norm"},
    },
    "SecondOrderPooling": {
        "paper": {
            "conv_for_DR": "conv",
            "bn_for_DR": "norm",
            "row_bn": "row_norm",
            "row_conv_group": "rows",
            "fc_adapt_channels": "fc",
        },
    },
    "CBAM": {
        "paper": {
            "ChannelGate.mlp.1": "fc1",
            "ChannelGate.mlp.3": "fc2",
            "SpatialGate.spatial.conv": "conv",
            "SpatialGate.spatial.bn": "norm",
        },
        "timm": {
            "channel.fc1": "fc1",
            "channel.fc2": "fc2",
            "spatial.conv.conv.weight": ("conv.weight", swap_two),
            "spatial.conv.bn": "norm",
        },
    },
    "BAM": {
        "paper": {
            "channel_att.gate_c.gate_c_fc_0": "channel.0",
            "channel_att.gate_c.gate_c_bn_1": "channel.1",
            "channel_att.gate_c.gate_c_fc_final": "channel.3",
            "spatial_att.gate_s.gate_s_conv_reduce0": "spatial.0",
            "spatial_att.gate_s.gate_s_bn_reduce0": "spatial.1",
            "spatial_att.gate_s.gate_s_conv_di_0": "spatial.3",
            "spatial_att.gate_s.gate_s_bn_di_0": "spatial.4",
            "spatial_att.gate_s.gate_s_conv_di_1": "spatial.6",
            "spatial_att.gate_s.gate_s_bn_di_1": "spatial.7",
            "spatial_att.gate_s.gate_s_conv_final": "spatial.9",
        },
    },
    "ConcurrentSqueezeExcite": {
        "paper": {"cSE.fc1": "fc1", "cSE.fc2": "fc2", "sSE.conv": "conv"},
    },
    "CoordinateAttention": {
        "paper": {"conv1": "conv", "bn1": "norm"},
        "timm": {"conv1": "conv", "bn1": "norm"},
    },
}
