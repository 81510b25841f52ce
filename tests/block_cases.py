"""What the block contract needs to know about each block; the checks themselves are in test_blocks.py."""

from collections.abc import Callable
from dataclasses import dataclass, field


def one_map(batch: int, channels: int, height: int, width: int):
    """The input shapes of most blocks."""
    return [(batch, channels, height, width)]


@dataclass(frozen=True)
class Case:
    """One way to build a block: the whole contract runs on each."""

    name: str
    channels: int = 12
    options: dict = field(default_factory=dict)
    maps: tuple = ("channel",)  # kinds of the taps and attention seams, in the order in which they fire
    shapes: Callable = one_map
    sums: tuple = ()  # (index into maps, axis or axes over which that map sums to one)
    batch_one: str = ""  # the message with which training on one image is refused
    refused_sizes: tuple = ()  # (H, W) refused by a documented ValueError
    pixels: bool = False  # commutes with any shuffle of the positions
    smooth: bool = True  # differentiable almost everywhere, so that gradcheck applies

    def __str__(self):
        return "-".join([self.name, *(f"{k}_{v}" for k, v in self.options.items())])


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
    layer: str  # its name in timm.layers
    arguments: dict = field(default_factory=dict)
    channels: int = 32
    options: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.name}-{self.layer}"


CASES = [
    # Gates over channels, and over channels and positions.
    Case("se", pixels=True),
    Case("se", channels=7, options={"reduction": 3, "bias": False, "gate": "hard_sigmoid"}, pixels=True),
    # Gates over positions and over strips.
    # Branches, context and tokens.
]

REFUSALS = [  # block, channels, options, what the message must say
    # Gates over channels, and over channels and positions.
    ("se", 12, {"reduction": 0}, "reduction must be 1 or more; got 0"),
    ("se", 0, {}, "channels must be 1 or more; got 0"),
    ("se", 12, {"gate": "step"}, "gate must be one of sigmoid.*'step'"),
    # Gates over positions and over strips.
    # Branches, context and tokens.
]

PARITY = [
    # Gates over channels, and over channels and positions.
    Parity("se", "se.npz", options={"reduction": 8, "bias": False}, maps={"fc.3/0": 0}),
    Parity("se", "se_timm.npz", "timm", options={"reduction": 4}),
    # Gates over positions and over strips.
    # Branches, context and tokens.
]

TIMM = [
    # Gates over channels, and over channels and positions.
    Timm("se", "SEModule", {"channels": 32, "rd_ratio": 0.25}, options={"reduction": 4}),
    # Gates over positions and over strips.
    # Branches, context and tokens.
]
