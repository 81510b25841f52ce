"""Key maps of the gates over positions and strips: {class: {source: key map}}."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

StateDict = Mapping[str, Tensor]


def _fold_biases(
    *pairs: tuple[str, str],
) -> Callable[[StateDict], StateDict]:
    """Return a function that folds the bias of each (convolution, batch norm) into the norm.

    Subtracted from the running mean, it leaves the values as they are.
    """

    def fold(state_dict: StateDict) -> StateDict:
        folded = dict(state_dict)
        for conv, norm in pairs:
            bias = folded.pop(f"{conv}.bias")
            folded[f"{norm}.running_mean"] = folded[f"{norm}.running_mean"] - bias
        return folded

    return fold


def _copy_shared_strips(state_dict: StateDict) -> StateDict:
    """Copy the convolution and norm that rows and columns share; both have two spatial axes."""
    weight = state_dict["conv.weight"]  # (C, 1, k)
    copies = {"conv_h.weight": weight[..., None], "conv_w.weight": weight[:, :, None]}
    for axis in ("h", "w"):
        for key in ("weight", "bias"):
            copies[f"norm_{axis}.{key}"] = state_dict[f"gn.{key}"]
    return copies


def _swap_axes(weight: Tensor) -> Tensor:
    """Transpose a kernel to that of the plane with its two axes swapped."""
    return weight.transpose(2, 3)


def _pairs_below(
    prefix: str,
    *pairs: tuple[str, str],
) -> list[tuple[str, str]]:
    """Prepend a module's name to (convolution, batch norm) pairs."""
    return [(f"{prefix}.{conv}", f"{prefix}.{norm}") for conv, norm in pairs]


# (convolution, batch norm) in the two branches of MS-CAM, by their index in a Sequential.
_LOCAL_PAIRS = (("0", "1"), ("3", "4"))
_GLOBAL_PAIRS = (("1", "2"), ("4", "5"))
_AFF_PAIRS = [
    *_pairs_below("local_att", *_LOCAL_PAIRS),
    *_pairs_below("global_att", *_GLOBAL_PAIRS),
]
_IAFF_PAIRS = [*_AFF_PAIRS, *_pairs_below("local_att2", *_LOCAL_PAIRS)]


def _global_keys(
    source: str,
    target: str,
) -> dict[str, str]:
    """Map the global branch of MS-CAM; theirs pools in its first layer, so ours are one less."""
    return {f"{source}.{index}": f"{target}.{index - 1}" for index in (1, 2, 4, 5)}


_POLARIZED_CODE = {
    "conv_q_right": "channel.query",
    "conv_v_right": "channel.value",
    "conv_q_left": "spatial.query",
    "conv_v_left": "spatial.value",
    "conv_up": "channel.excite",
}

SPATIAL_KEYS: dict[str, dict[str, Any]] = {
    "ELA": {"timm": {}, "shared": (_copy_shared_strips, {})},
    "SimAM": {"paper": {}},
    "TripletAttention": {
        "paper": {
            "ChannelGateH.spatial.conv": "gate_cw.conv",
            "ChannelGateH.spatial.bn": "gate_cw.norm",
            "ChannelGateW.spatial.conv": ("gate_ch.conv", _swap_axes),
            "ChannelGateW.spatial.bn": "gate_ch.norm",
            "SpatialGate.spatial.conv": "gate_hw.conv",
            "SpatialGate.spatial.bn": "gate_hw.norm",
        },
    },
    "ShuffleAttention": {
        "paper": {
            "cweight": "channel_weight",
            "cbias": "channel_bias",
            "sweight": "spatial_weight",
            "sbias": "spatial_bias",
            "gn.weight": "norm_weight",
            "gn.bias": "norm_bias",
        },
    },
    "SpatialGroupEnhance": {"paper": {}},
    "PolarizedAttention": {
        "paper": _POLARIZED_CODE,
        "fightingcv": {
            "ch_wq.bias": None,
            "ch_wq": "channel.query",
            "ch_wv": "channel.value",
            "ch_wz": "channel.excite.0",
            "ln": "channel.excite.1",
            "sp_wq": "spatial.query",
            "sp_wv": "spatial.value",
        },
    },
    "EMA": {"paper": {"conv1x1": "conv_strip", "conv3x3": "conv_local", "gn": "norm"}},
    "MCA": {"paper": {"h_cw": "gate_h", "w_hc": "gate_w", "c_hw": "gate_c"}},
    "SCSA": {
        "paper": {
            "local_dwc": "convs.0",
            "global_dwc_s": "convs.1",
            "global_dwc_m": "convs.2",
            "global_dwc_l": "convs.3",
            "q.weight": "query",
            "k.weight": "key",
            "v.weight": "value",
        },
    },
    "AFF": {
        "paper": (
            _fold_biases(*_AFF_PAIRS),
            {"local_att": "local_gate", **_global_keys("global_att", "global_gate")},
        )
    },
    "IAFF": {
        "paper": (
            _fold_biases(*_IAFF_PAIRS),
            {
                "local_att": "local_gate1",
                "local_att2": "local_gate2",
                **_global_keys("global_att", "global_gate1"),
                "global_att2": None,
            },
        ),
    },
    "AttentionGate": {
        "paper": (
            _fold_biases(("W.0", "W.1")),
            {"theta": "project_x", "phi": "project_gate", "psi": "score", "W": "project"},
        ),
    },
    "LKA": {"paper": {"conv0": "local", "conv_spatial": "dilated", "conv1": "mix"}},
    "VANAttention": {
        "paper": {
            "proj_1": "proj1",
            "proj_2": "proj2",
            "spatial_gating_unit.conv0": "gate.local",
            "spatial_gating_unit.conv_spatial": "gate.dilated",
            "spatial_gating_unit.conv1": "gate.mix",
        },
    },
    "LSKA": {
        "paper": {
            "conv0h": "local_h",
            "conv0v": "local_v",
            "conv_spatial_h": "dilated_h",
            "conv_spatial_v": "dilated_v",
            "conv1": "mix",
        },
    },
    "MSCA": {
        "paper": {
            "conv0": "local",
            "conv3": "mix",
            **{f"conv{i}_{j + 1}": f"strips.{i}.{j}" for i in range(3) for j in range(2)},
        },
    },
    "LSK": {
        "paper": {
            "conv0": "local",
            "conv_spatial": "dilated",
            "conv1": "mix_local",
            "conv2": "mix_dilated",
            "conv_squeeze": "choose",
            "conv": "mix",
        },
    },
    "StripPooling": {
        "paper": {
            "conv1_1": "reduce_grid",
            "conv1_2": "reduce_strip",
            "conv2_0": "local",
            "conv2_1": "grids.0",
            "conv2_2": "grids.1",
            "conv2_3": "column",
            "conv2_4": "row",
            "conv2_5": "mix_grid",
            "conv2_6": "mix_strip",
            "conv3": "expand",
        },
    },
}
