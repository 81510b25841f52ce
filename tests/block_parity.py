"""Where the numbers come from with which each block is compared; the comparison itself is in test_blocks.py."""

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Parity:
    """One file of tests/parity: numbers from another implementation, and the options that make ours the same."""

    name: str
    file: str
    source: str = "paper"
    channels: int = 32
    options: dict = field(default_factory=dict)
    maps: dict = field(default_factory=dict)  # name of their map in the file -> index of our tap
    layout: str = "map"  # of their tensors: map (B, C, H, W), last (B, H, W, C) or tokens (B, N, C)

    def __str__(self):
        return f"{self.name}-{self.file}"


@dataclass(frozen=True)
class Timm:
    """A layer of timm to compare with live, in training mode and at odd sizes."""

    name: str
    layer: str  # its module in timm.layers and its name
    arguments: dict = field(default_factory=dict)
    channels: int = 32
    options: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.name}-{self.layer}"


PARITY = [
    # Gates over channels, and over channels and positions.
    Parity("se", "se.npz", options={"reduction": 8, "bias": False}, maps={"fc.3/0": 0}),
    Parity("se", "se_timm.npz", "timm", options={"reduction": 4}),
    Parity("ese", "ese_timm.npz", "timm", maps={"gate/0": 0}),
    Parity("eca", "eca.npz", maps={"sigmoid/0": 0}),
    Parity("ge", "ge_timm_noparam.npz", "timm"),
    Parity("ge", "ge_timm_noparam_e4.npz", "timm", options={"extent": 4}),
    Parity("gct", "gct.npz"),
    Parity("gct", "gct_l1.npz", options={"p": 1}),
    Parity("lct", "lct.npz", "changzy00", options={"groups": 8}, maps={"sigmoid/0": 0}),
    Parity("fca", "fca.npz", options={"reduction": 8, "size": 14}, maps={"fc.3/0": 0}),
    Parity("nam", "nam_channel.npz", options={"detach": True}),
    Parity("cbam", "cbam.npz", options={"reduction": 8}),
    Parity("cbam", "cbam_timm.npz", "timm", options={"reduction": 4, "bias": False}),
    Parity("bam", "bam.npz", options={"combine": "multiply"}),
    Parity("bam", "bam_paper_sum.npz"),
    Parity(
        "scse", "scse.npz", options={"merge": "max"}, maps={"cSE.sigmoid/0": 0, "sSE.sigmoid/0": 1}
    ),
    Parity("coord", "coord.npz", options={"reduction": 4}),
    Parity("coord", "coord_timm.npz", "timm", options={"reduction": 4, "bias": False}),
    # Gates over positions and over strips.
    Parity("ela", "ela_timm.npz", "timm", options={"groups": 1, "silu": True}),
    Parity("simam", "simam.npz"),
    Parity("triplet", "triplet.npz"),
    Parity("shuffle", "shuffle_sa.npz", options={"groups": 4}),
    Parity(
        "polarized",
        "psa_parallel.npz",
        options={"form": "code"},
        maps={"sigmoid/0": 0, "sigmoid/1": 1},
    ),
    Parity(
        "polarized",
        "psa_sequential.npz",
        options={"mode": "sequential", "form": "code"},
        maps={"sigmoid/0": 0, "sigmoid/1": 1},
    ),
    Parity(
        "polarized", "psa_parallel_fcv.npz", "fightingcv", maps={"sigmoid/0": 0, "sigmoid/1": 1}
    ),
    Parity(
        "polarized",
        "psa_sequential_fcv.npz",
        "fightingcv",
        options={"mode": "sequential"},
        maps={"sigmoid/0": 0, "sigmoid/1": 1},
    ),
    Parity("ema", "ema_multiscale.npz", options={"groups": 4}),
    Parity(
        "scsa",
        "scsa.npz",
        options={"num_heads": 4, "window_size": 3},
        maps={"sa_gate/0": 0, "sa_gate/1": 1, "ca_gate/0": 3},
    ),
    Parity("aff", "aff.npz", options={"factor": 2.0}),
    Parity("iaff", "iaff.npz", options={"shared_global": True}),
    Parity(
        "attention_gate",
        "attention_gate.npz",
        channels=16,
        options={"gate_channels": 24, "project": True},
    ),
    Parity("lka", "lka.npz"),
    Parity("lka_attention", "lka_attention.npz"),
    Parity("lsk", "lsk.npz"),
    Parity("msca", "mscan.npz"),
    # Branches, context and tokens.
    Parity("sk", "sk.npz", "timm", options={"groups": 8, "reduction": 4, "min_width": 8}),
    Parity("split", "splat.npz", options={"groups": 2}),
    Parity("epsa", "epsa.npz", channels=64, options={"descending": True}, maps={"softmax/0": 0}),
    Parity("cot", "cot.npz"),
    Parity("outlook", "outlook_volo_timm.npz", "timm", options={"num_heads": 2}, layout="last"),
    Parity("gc", "gc.npz", options={"reduction": 4}, maps={"softmax/0": 0}),
    Parity("gc", "gc_avg.npz", options={"reduction": 4, "pooling": "average"}),
    Parity("gc", "gc_timm.npz", "timm", options={"reduction": 8, "fusion": "both"}),
    Parity("non_local", "nonlocal_alexhex7.npz", "alexhex7", options={"subsample": True}),
    Parity("non_local", "nonlocal_timm.npz", "timm", options={"reduction": 4, "scale": 32**-0.5}),
    Parity(
        "non_local",
        "nonlocal_mmcv_embedded_gaussian.npz",
        "mmcv",
        options={"scale": 0.25, "norm": "none"},
    ),
    Parity(
        "non_local",
        "nonlocal_mmcv_gaussian.npz",
        "mmcv",
        options={"mode": "gaussian", "norm": "none"},
    ),
    Parity(
        "non_local",
        "nonlocal_mmcv_dot_product.npz",
        "mmcv",
        options={"mode": "dot_product", "norm": "none"},
    ),
    Parity("a2", "a2_double.npz", options={"reduction": 2, "num_descriptors": 8}),
    Parity("pam", "danet_pam.npz"),
    Parity("cam", "danet_cam_paper.npz"),
    Parity("cam", "danet_cam.npz", options={"inverted": True}),
    Parity("criss_cross", "criss_cross.npz", options={"recurrence": 1}),
    Parity("efficient", "efficient_attention.npz", options={"num_heads": 4}),
    Parity("external", "external.npz"),
    Parity("bot", "bottleneck_botnet_timm.npz", "timm"),
    Parity("xca", "xca_timm.npz", "timm", options={"qkv_bias": True}, layout="tokens"),
]

TIMM = [
    # Gates over channels, and over channels and positions.
    Timm(
        "se",
        "squeeze_excite.SEModule",
        {"channels": 32, "rd_ratio": 0.25},
        options={"reduction": 4},
    ),
    Timm("ese", "squeeze_excite.EffectiveSEModule", {"channels": 32}),
    Timm("eca", "eca.EcaModule", {"channels": 128}, channels=128),
    Timm("ge", "gather_excite.GatherExcite", {"channels": 32, "use_mlp": False}),
    Timm(
        "ge",
        "gather_excite.GatherExcite",
        {"channels": 32, "extent": 2, "use_mlp": False},
        options={"extent": 2},
    ),
    Timm(
        "cbam",
        "cbam.CbamModule",
        {"channels": 32, "rd_ratio": 0.25},
        options={"reduction": 4, "bias": False},
    ),
    Timm(
        "coord", "coord_attn.CoordAttn", {"channels": 32}, options={"reduction": 4, "bias": False}
    ),
    # Gates over positions and over strips.
    Timm(
        "ela",
        "coord_attn.EfficientLocalAttn",
        {"channels": 32},
        options={"groups": 1, "silu": True},
    ),
    # Branches, context and tokens.
    Timm(
        "sk",
        "SelectiveKernel",
        {"in_channels": 32, "split_input": False, "groups": 8, "rd_ratio": 0.25},
        options={"groups": 8, "reduction": 4, "min_width": 8},
    ),
    Timm(
        "split",
        "SplitAttn",
        {"in_channels": 32, "groups": 2, "norm_layer": nn.BatchNorm2d},
        options={"groups": 2},
    ),
    Timm(
        "gc",
        "GlobalContext",
        {"channels": 32, "fuse_add": True, "fuse_scale": False},
        options={"reduction": 8},
    ),
    Timm(
        "non_local",
        "NonLocalAttn",
        {"in_channels": 32},
        options={"reduction": 4, "scale": 32**-0.5},
    ),
]
