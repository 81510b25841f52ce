"""What the block contract needs to know about each block; the checks themselves are in test_blocks.py."""

from collections.abc import Callable
from dataclasses import dataclass, field


def one_map(batch: int, channels: int, height: int, width: int):
    """The input shapes of most blocks."""
    return [(batch, channels, height, width)]


def two_maps(batch: int, channels: int, height: int, width: int):
    """The input shapes of a fusion."""
    return [(batch, channels, height, width)] * 2


def map_and_gate(gate_channels: int):
    """The input shapes of a map and its coarser gate."""
    return lambda b, c, h, w: [(b, c, h, w), (b, gate_channels, (h + 1) // 2, (w + 1) // 2)]


@dataclass(frozen=True)
class Case:
    """One way to build a block: the whole contract runs on each."""

    name: str
    channels: int = 12
    options: dict = field(default_factory=dict)
    maps: tuple = (
        "channel",
    )  # kinds of the taps and attention seams, in the order in which they fire
    shapes: Callable = one_map
    sums: tuple = ()  # (index into maps, axis or axes over which that map sums to one)
    batch_one: str = ""  # the message with which training on one image is refused
    refused_sizes: tuple = ()  # (H, W) refused by a documented ValueError
    only_size: tuple = ()  # the one (H, W) that is not refused
    pixels: bool = False  # commutes with any shuffle of the positions
    smooth: bool = True  # its gradient is that of its values, so that gradcheck applies

    def __str__(self):
        return "-".join([self.name, *(f"{k}_{v}" for k, v in self.options.items())])


CASES = [
    # Gates over channels, and over channels and positions.
    Case("se", pixels=True),
    Case(
        "se",
        channels=7,
        options={"reduction": 3, "bias": False, "gate": "hard_sigmoid"},
        pixels=True,
    ),
    Case("ese", pixels=True),
    Case("eca", pixels=True),
    Case("eca", options={"kernel_size": 7}, pixels=True),
    Case("ge", maps=("spatial",), pixels=True),
    Case("ge", options={"extent": 4}, maps=("spatial",)),
    Case("ge", options={"extent": 4, "parameters": "gather"}, maps=("spatial",)),
    Case(
        "ge",
        options={"extent": 2, "parameters": "both", "reduction": 5, "norm": "layer"},
        maps=("spatial",),
    ),
    Case(
        "ge",
        options={"parameters": "gather", "size": (7, 11)},
        maps=("spatial",),
        only_size=(7, 11),
        batch_one="batch norm cannot train on one value per channel.*norm='layer'",
    ),
    Case(
        "srm",
        pixels=True,
        batch_one="batch norm cannot train on one value per channel.*norm='layer'",
    ),
    Case("srm", options={"norm": "layer", "unbiased": True}, pixels=True, refused_sizes=((1, 1),)),
    Case("gct", pixels=True),
    Case("gct", options={"p": 1}, pixels=True),
    Case("lct", options={"groups": 3}, pixels=True),
    Case("gaussian_gct", pixels=True),
    Case("gaussian_gct", options={"bounds": (1.0, 3.0)}, pixels=True),
    Case("fca", channels=32),
    Case("fca", channels=10, options={"frequencies": 5, "reduction": 3, "size": 14}),
    Case("nam", maps=("spatial",), pixels=True),
    Case(
        "nam", options={"detach": True}, maps=("spatial",), pixels=True, smooth=False
    ),  # cut on purpose
    Case("gsop", options={"hidden": 7}, pixels=True),
    Case("gsop", options={"hidden": 5, "norm": "layer"}, pixels=True),
    Case("cbam", maps=("channel", "spatial")),
    Case(
        "cbam",
        options={"pools": ("avg", "max", "lp", "lse"), "spatial": False, "reduction": 5},
        pixels=True,
    ),
    Case(
        "cbam",
        options={"norm": "none", "kernel_size": 3, "bias": False},
        maps=("channel", "spatial"),
    ),
    Case(
        "bam",
        maps=("spatial",),
        batch_one="batch norm cannot train on one value per channel.*norm='layer'",
    ),
    Case(
        "bam", options={"combine": "multiply", "norm": "none", "num_layers": 1}, maps=("spatial",)
    ),
    Case("bam", options={"norm": "layer", "dilation": 2, "reduction": 4}, maps=("spatial",)),
    Case("scse", maps=("channel", "spatial"), pixels=True),
    Case(
        "scse", options={"merge": "max", "reduction": 5}, maps=("channel", "spatial"), pixels=True
    ),
    Case("coord", maps=("spatial", "spatial")),
    Case(
        "coord",
        options={"norm": "layer", "bias": False, "reduction": 1},
        maps=("spatial", "spatial"),
    ),
    # Gates over positions and over strips.
    Case("ela", options={"groups": 4}, maps=("spatial", "spatial")),
    Case(
        "ela",
        options={"groups": 1, "kernel_size": 5, "conv_groups": 3, "silu": True},
        maps=("spatial", "spatial"),
    ),
    Case("simam", maps=("spatial",), pixels=True),
    Case("triplet", maps=("spatial",) * 3),
    Case(
        "triplet",
        options={"kernel_size": 3, "spatial": False, "norm": "layer"},
        maps=("spatial",) * 2,
    ),
    Case("shuffle", options={"groups": 3}, maps=("spatial",), pixels=True),
    Case("sge", options={"groups": 4}, maps=("spatial",), pixels=True),
    Case("polarized", maps=("channel", "spatial"), pixels=True),
    Case("polarized", options={"mode": "sequential"}, maps=("channel", "spatial"), pixels=True),
    Case("polarized", options={"form": "code"}, maps=("channel", "spatial"), pixels=True),
    Case(
        "polarized",
        24,
        {"mode": "sequential", "form": "code"},
        maps=("channel", "spatial"),
        pixels=True,
    ),
    Case("ema", options={"groups": 3}, maps=("spatial",)),
    Case("mca", maps=("spatial", "spatial", "channel")),
    Case(
        "mca",
        options={"channel_gate": False, "spatial_kernel_size": 5},
        maps=("spatial", "spatial"),
    ),
    Case(
        "scsa",
        options={"num_heads": 2, "window_size": 3, "kernel_sizes": (3, 5, 1)},
        maps=("spatial", "spatial", "channel", "channel"),
    ),
    Case("scsa", options={"num_heads": 3}, maps=("spatial", "spatial", "channel", "channel")),
    Case("ms_cam", maps=("spatial",), pixels=True, batch_one="batch norm cannot train"),
    Case("ms_cam", options={"norm": "layer", "reduction": 2}, maps=("spatial",), pixels=True),
    Case("aff", maps=("spatial",), shapes=two_maps, batch_one="batch norm cannot train"),
    Case("aff", options={"norm": "layer", "factor": 2.0}, maps=("spatial",), shapes=two_maps),
    Case("iaff", maps=("spatial", "spatial"), shapes=two_maps, batch_one="batch norm cannot train"),
    Case(
        "iaff",
        options={"norm": "none", "shared_global": True},
        maps=("spatial", "spatial"),
        shapes=two_maps,
    ),
    Case(
        "attention_gate",
        maps=("spatial",),
        shapes=map_and_gate(12),
        refused_sizes=((1, 1), (1, 13)),
    ),
    Case(
        "attention_gate",
        options={"gate_channels": 5, "subsample": 1, "project": True},
        maps=("spatial",),
        shapes=map_and_gate(5),
    ),
    Case("lka", maps=("spatial",)),
    Case("lka", options={"kernel_size": 10, "dilation": 2}, maps=("spatial",)),
    Case("lka_attention", maps=("spatial",)),
    Case("lska", maps=("spatial",)),
    Case("lska", options={"kernel_size": 7}, maps=("spatial",)),
    Case("msca", maps=("spatial",)),
    Case("msca", options={"kernel_size": 3, "strip_sizes": (5, 9)}, maps=("spatial",)),
    Case("lsk", maps=("spatial",)),
    Case("strip_pooling", maps=("spatial", "spatial")),
    Case(
        "strip_pooling",
        options={"pool_sizes": (5, 3), "reduction": 2, "norm": "layer"},
        maps=("spatial", "spatial"),
    ),
    # Branches, context and tokens.
    Case(
        "sk",
        options={"groups": 4, "reduction": 2},
        maps=("branch",),
        sums=((0, 1),),
        batch_one="norm='layer'",
    ),
    Case(
        "sk",
        channels=7,
        options={"groups": 7, "num_branches": 3, "norm": "layer"},
        maps=("branch",),
        sums=((0, 1),),
    ),
    Case("split", maps=("branch",), sums=((0, 1),), batch_one="norm='layer'"),
    Case(
        "split",
        options={"radix": 3, "groups": 2, "kernel_size": 5, "norm": "layer"},
        maps=("branch",),
        sums=((0, 1),),
    ),
    Case("epsa", channels=64, maps=("branch",), sums=((0, 1),)),
    Case(
        "epsa",
        options={"kernel_sizes": (1, 3, 5), "groups": (1, 2, 4), "descending": True},
        maps=("branch",),
        sums=((0, 1),),
    ),
    Case("cot", channels=16, maps=("token", "branch"), sums=((1, 1),), batch_one="norm='layer'"),
    Case(
        "cot",
        options={"kernel_size": 5, "share": 3, "norm": "none"},
        maps=("token", "branch"),
        sums=((1, 1),),
    ),
    Case(
        "involution",
        options={"kernel_size": 3, "group_channels": 4, "norm": "none"},
        maps=("token",),
    ),
    Case("involution", channels=16, maps=("token",)),
    Case("outlook", options={"num_heads": 6}, maps=("token",), sums=((0, -1),)),
    Case(
        "outlook",
        channels=7,
        options={"kernel_size": 5, "num_heads": 7},
        maps=("token",),
        sums=((0, -1),),
    ),
    Case(
        "gc",
        options={"reduction": 3},
        maps=("spatial", "channel"),
        sums=((0, (2, 3)),),
        pixels=True,
    ),
    Case(
        "gc",
        options={"reduction": 3, "fusion": "both"},
        maps=("spatial", "channel", "channel"),
        sums=((0, (2, 3)),),
        pixels=True,
    ),
    Case("gc", options={"pooling": "average", "fusion": "scale"}, maps=("channel",), pixels=True),
    Case("non_local", maps=("token",), pixels=True),
    Case("non_local", options={"mode": "gaussian", "norm": "none"}, maps=("token",), pixels=True),
    Case("non_local", options={"mode": "dot_product", "scale": 0.3}, maps=("token",), pixels=True),
    Case(
        "non_local", options={"mode": "concatenation", "reduction": 4}, maps=("token",), pixels=True
    ),
    Case("non_local", options={"subsample": True, "norm": "layer"}, maps=("token",)),
    Case("a2", maps=("spatial", "spatial"), sums=((0, 1), (1, (2, 3))), pixels=True),
    Case(
        "a2",
        options={"num_descriptors": 5},
        maps=("spatial", "spatial"),
        sums=((0, 1), (1, (2, 3))),
        pixels=True,
    ),
    Case("pam", maps=("token",), pixels=True),
    Case("cam", maps=("channel",), pixels=True),
    Case("cam", options={"inverted": True}, maps=("channel",), pixels=True),
    Case("danet", maps=("token", "channel"), pixels=True),
    Case("criss_cross", maps=("token", "token")),
    Case("criss_cross", options={"recurrence": 1, "reduction": 3}, maps=("token",)),
    Case("efficient", maps=("token",), pixels=True),
    Case("efficient", options={"reduction": 1, "num_heads": 3}, maps=("token",), pixels=True),
    Case("external", maps=("token",), pixels=True),
    Case("external", options={"memory": 5, "norm": "layer"}, maps=("token",), pixels=True),
    Case("bot", options={"grid": (7, 11)}, maps=("token",)),
    Case("axial", maps=("token", "token")),
    Case("xca", maps=("channel",), pixels=True),
    Case("xca", options={"num_heads": 3, "qkv_bias": True}, maps=("channel",), pixels=True),
]

REFUSALS = [  # block, channels, options, what the message must say
    # Gates over channels, and over channels and positions.
    ("se", 12, {"reduction": 0}, "reduction must be 1 or more; got 0"),
    ("se", 0, {}, "channels must be 1 or more; got 0"),
    ("se", 12, {"gate": "step"}, "gate must be one of sigmoid.*'step'"),
    ("ese", 0, {}, "channels must be 1 or more; got 0"),
    ("eca", 12, {"kernel_size": 4}, "kernel_size must be odd and positive; got 4"),
    ("ge", 12, {"extent": 3}, "extent must be one of 0, 2, 4, 8; got 3"),
    (
        "ge",
        12,
        {"parameters": "theta"},
        "parameters must be one of none, gather, both; got 'theta'",
    ),
    (
        "ge",
        12,
        {"parameters": "gather"},
        "size goes with a learned gather over the whole map.*got None",
    ),
    ("ge", 12, {"size": (7, 7)}, r"size goes with a learned gather.*got \(7, 7\)"),
    ("srm", 12, {"norm": "instance"}, "norm must be one of batch, layer, none; got 'instance'"),
    ("gct", 12, {"p": 3}, "p must be one of 1, 2; got 3"),
    ("lct", 12, {"groups": 5}, "channels must be a multiple of groups; got 12 and 5"),
    ("gaussian_gct", 12, {"width": 0}, "width must be positive; got 0"),
    ("gaussian_gct", 12, {"bounds": (3, 1)}, r"bounds must be \(low, high\).*got \(3, 1\)"),
    ("fca", 12, {}, "channels must be a multiple of frequencies; got 12 and 16"),
    ("fca", 66, {"frequencies": 33}, "frequencies must be 1 to 32; got 33"),
    ("fca", 32, {"size": 6}, "size must be 7 or more.*got 6"),
    ("nam", 0, {}, "channels must be 1 or more; got 0"),
    ("gsop", 12, {"hidden": 0}, "hidden must be 1 or more; got 0"),
    ("cbam", 12, {"kernel_size": 6}, "kernel_size must be odd and positive; got 6"),
    ("cbam", 12, {"pools": ()}, "pools must name one of avg, max, lp, lse at least"),
    ("cbam", 12, {"pools": ("avg", "min")}, "pools must be one of avg, max, lp, lse; got 'min'"),
    ("bam", 12, {"combine": "max"}, "combine must be one of add, multiply; got 'max'"),
    ("bam", 12, {"dilation": 0}, "dilation must be 1 or more; got 0"),
    ("scse", 12, {"merge": "mean"}, "merge must be one of add, max; got 'mean'"),
    ("coord", 12, {"reduction": -1}, "reduction must be 1 or more; got -1"),
    # Gates over positions and over strips.
    ("ela", 12, {}, "channels must be a multiple of groups; got 12 and 16"),
    ("ela", 12, {"groups": 4, "kernel_size": 4}, "kernel_size must be odd and positive; got 4"),
    ("ela", 12, {"groups": 4, "conv_groups": 5}, "multiple of conv_groups; got 12 and 5"),
    ("simam", 12, {"regularizer": 0.0}, "regularizer must be positive; got 0.0"),
    ("triplet", 12, {"kernel_size": 6}, "kernel_size must be odd and positive; got 6"),
    ("triplet", 12, {"norm": "instance"}, "norm must be one of batch.*'instance'"),
    ("shuffle", 12, {"groups": 4}, r"channels must be a multiple of 2 \* groups; got 12 and 8"),
    ("shuffle", 12, {"groups": 0}, "groups must be 1 or more; got 0"),
    ("sge", 12, {}, "channels must be a multiple of groups; got 12 and 64"),
    ("polarized", 1, {}, "channels must be 2 or more; got 1"),
    ("polarized", 12, {"mode": "serial"}, "mode must be one of parallel, sequential; got 'serial'"),
    ("polarized", 12, {"form": "official"}, "form must be one of paper, code; got 'official'"),
    ("ema", 12, {}, "channels must be a multiple of groups; got 12 and 32"),
    ("mca", 12, {"kernel_size": 2}, "kernel_size must be odd and positive; got 2"),
    ("scsa", 12, {}, "channels must be a multiple of num_heads; got 12 and 8"),
    (
        "scsa",
        6,
        {"num_heads": 2},
        r"channels must be a multiple of len\(kernel_sizes\); got 6 and 4",
    ),
    (
        "scsa",
        12,
        {"num_heads": 3, "kernel_sizes": (3, 4)},
        r"kernel_sizes\[1\] must be odd and positive; got 4",
    ),
    ("ms_cam", 12, {"reduction": 0}, "reduction must be 1 or more; got 0"),
    ("attention_gate", 12, {"subsample": 0}, "subsample must be 1 or more; got 0"),
    (
        "lka",
        12,
        {"kernel_size": 20, "dilation": 2},
        "kernel_size / dilation, rounded up, must be odd.*got 10",
    ),
    (
        "lska",
        12,
        {"kernel_size": 21, "dilation": 5},
        "kernel_size / dilation, rounded down, must be odd.*got 4",
    ),
    ("msca", 12, {"strip_sizes": (7, 12)}, r"strip_sizes\[1\] must be odd and positive; got 12"),
    ("lsk", 1, {}, "channels must be 2 or more; got 1"),
    ("strip_pooling", 12, {"pool_sizes": (0, 3)}, r"pool_sizes\[0\] must be 1 or more; got 0"),
    # Branches, context and tokens.
    ("sk", 12, {}, "channels must be a multiple of groups; got 12 and 32"),
    ("sk", 12, {"groups": 4, "num_branches": 0}, "num_branches must be 1 or more; got 0"),
    ("split", 12, {"radix": 1}, "radix must be 2 or more; got 1"),
    ("split", 12, {"groups": 4}, r"channels must be a multiple of groups \* radix; got 12 and 8"),
    (
        "split",
        15,
        {"groups": 3, "radix": 5, "min_width": 32},
        "hidden width must be a multiple of groups; got 32 and 3",
    ),
    ("split", 12, {"kernel_size": 4}, "kernel_size must be odd and positive; got 4"),
    ("epsa", 12, {}, "channels must be a multiple of kernels times groups; got 12 and 16"),
    ("epsa", 64, {"groups": (1, 2)}, "one number per kernel; got 2 for 4 kernels"),
    ("cot", 12, {}, "channels must be a multiple of share; got 12 and 8"),
    ("involution", 12, {}, "channels must be a multiple of group_channels; got 12 and 16"),
    ("involution", 16, {"kernel_size": 2}, "kernel_size must be odd and positive; got 2"),
    ("outlook", 16, {"num_heads": 6}, "channels must be a multiple of num_heads; got 16 and 6"),
    ("gc", 12, {"fusion": "multiply"}, "fusion must be one of add, scale, both; got 'multiply'"),
    ("non_local", 12, {"mode": "dot"}, "mode must be one of gaussian.*'dot'"),
    ("a2", 12, {"num_descriptors": 0}, "num_descriptors must be 1 or more; got 0"),
    ("cam", 0, {}, "channels must be 1 or more; got 0"),
    ("criss_cross", 12, {"recurrence": 0}, "recurrence must be 1 or more; got 0"),
    (
        "efficient",
        12,
        {"num_heads": 5},
        r"channels must be a multiple of reduction \* num_heads; got 12 and 10",
    ),
    ("external", 12, {"memory": 0}, "memory must be 1 or more; got 0"),
    ("bot", 13, {}, "channels must be a multiple of num_heads; got 13 and 4"),
    ("axial", 13, {}, "channels must be a multiple of num_heads; got 13 and 4"),
    ("xca", 13, {}, "channels must be a multiple of num_heads; got 13 and 4"),
]
