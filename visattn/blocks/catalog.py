"""BLOCKS: every attention block by name."""

import inspect
from typing import Any, NamedTuple

from torch import nn

from visattn.blocks.a2 import DoubleAttention
from visattn.blocks.attention_gate import AttentionGate
from visattn.blocks.axial import AxialAttention2d
from visattn.blocks.bam import BAM
from visattn.blocks.bot import BottleneckAttention
from visattn.blocks.cbam import CBAM
from visattn.blocks.coordinate import CoordinateAttention
from visattn.blocks.cot import ContextualTransformer
from visattn.blocks.criss_cross import CrissCrossAttention2d
from visattn.blocks.danet import ChannelAttentionModule, DualAttention, PositionAttention
from visattn.blocks.eca import EfficientChannelAttention
from visattn.blocks.effective_se import EffectiveSqueezeExcite
from visattn.blocks.efficient import EfficientAttention
from visattn.blocks.ela import ELA
from visattn.blocks.ema import EMA
from visattn.blocks.epsa import PyramidSqueezeAttention
from visattn.blocks.external import ExternalAttention
from visattn.blocks.fca import FrequencyChannelAttention
from visattn.blocks.gather_excite import GatherExcite
from visattn.blocks.gaussian_gct import GaussianContextTransformer
from visattn.blocks.gc import GlobalContext
from visattn.blocks.gct import GatedChannelTransform
from visattn.blocks.gsop import SecondOrderPooling
from visattn.blocks.involution import Involution
from visattn.blocks.lct import LinearContextTransform
from visattn.blocks.lka import LKA, VANAttention
from visattn.blocks.lsk import LSK
from visattn.blocks.lska import LSKA
from visattn.blocks.mca import MCA
from visattn.blocks.ms_cam import AFF, IAFF, MSCAM
from visattn.blocks.msca import MSCA
from visattn.blocks.nam import NormalizationAttention
from visattn.blocks.non_local import NonLocal
from visattn.blocks.outlook import OutlookAttention
from visattn.blocks.polarized import PolarizedAttention
from visattn.blocks.scsa import SCSA
from visattn.blocks.scse import ConcurrentSqueezeExcite
from visattn.blocks.sge import SpatialGroupEnhance
from visattn.blocks.shuffle_attention import ShuffleAttention
from visattn.blocks.simam import SimAM
from visattn.blocks.sk import SelectiveKernel
from visattn.blocks.split import SplitAttention
from visattn.blocks.squeeze_excite import SqueezeExcite
from visattn.blocks.srm import StyleRecalibration
from visattn.blocks.strip_pooling import StripPooling
from visattn.blocks.triplet import TripletAttention
from visattn.blocks.xca import CrossCovarianceAttention
from visattn.names import NamedTable, lookup, suggest


class BlockEntry(NamedTuple):
    """One row of BLOCKS.

    ``family`` says what the block weighs: channels ("channel"), positions ("spatial"), both
    ("both"), branches ("branch"), tokens by self-attention ("token"), or a summary of the
    whole map ("context").
    """

    block: type[nn.Module]
    family: str
    paper: str
    year: int


_ENTRIES = {
    # Gates over channels, and over channels and positions.
    "se": BlockEntry(SqueezeExcite, "channel", "Squeeze-and-Excitation Networks", 2018),
    "ese": BlockEntry(
        EffectiveSqueezeExcite,
        "channel",
        "CenterMask: Real-Time Anchor-Free Instance Segmentation",
        2020,
    ),
    "eca": BlockEntry(
        EfficientChannelAttention,
        "channel",
        "ECA-Net: Efficient Channel Attention for Deep CNNs",
        2020,
    ),
    "ge": BlockEntry(
        GatherExcite, "both", "Gather-Excite: Exploiting Feature Context in CNNs", 2018
    ),
    "srm": BlockEntry(
        StyleRecalibration, "channel", "SRM: A Style-based Recalibration Module for CNNs", 2019
    ),
    "gct": BlockEntry(
        GatedChannelTransform,
        "channel",
        "Gated Channel Transformation for Visual Recognition",
        2020,
    ),
    "lct": BlockEntry(LinearContextTransform, "channel", "Linear Context Transform Block", 2020),
    "gaussian_gct": BlockEntry(
        GaussianContextTransformer, "channel", "Gaussian Context Transformer", 2021
    ),
    "fca": BlockEntry(
        FrequencyChannelAttention, "channel", "FcaNet: Frequency Channel Attention Networks", 2021
    ),
    "nam": BlockEntry(
        NormalizationAttention, "both", "NAM: Normalization-based Attention Module", 2021
    ),
    "gsop": BlockEntry(
        SecondOrderPooling, "channel", "Global Second-order Pooling Convolutional Networks", 2019
    ),
    "cbam": BlockEntry(CBAM, "both", "CBAM: Convolutional Block Attention Module", 2018),
    "bam": BlockEntry(BAM, "both", "BAM: Bottleneck Attention Module", 2018),
    "scse": BlockEntry(
        ConcurrentSqueezeExcite,
        "both",
        "Concurrent Spatial and Channel Squeeze & Excitation in FCNs",
        2018,
    ),
    "coord": BlockEntry(
        CoordinateAttention,
        "both",
        "Coordinate Attention for Efficient Mobile Network Design",
        2021,
    ),
    # Gates over positions and over strips.
    "ela": BlockEntry(
        ELA, "both", "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024
    ),
    "simam": BlockEntry(SimAM, "both", "SimAM: A Simple, Parameter-Free Attention Module", 2021),
    "triplet": BlockEntry(
        TripletAttention, "both", "Rotate to Attend: Convolutional Triplet Attention Module", 2021
    ),
    "shuffle": BlockEntry(ShuffleAttention, "both", "SA-Net: Shuffle Attention", 2021),
    "sge": BlockEntry(SpatialGroupEnhance, "both", "Spatial Group-wise Enhance", 2019),
    "polarized": BlockEntry(PolarizedAttention, "both", "Polarized Self-Attention", 2021),
    "ema": BlockEntry(
        EMA, "both", "Efficient Multi-Scale Attention Module with Cross-Spatial Learning", 2023
    ),
    "mca": BlockEntry(MCA, "both", "MCA: Multidimensional collaborative attention", 2023),
    "scsa": BlockEntry(
        SCSA, "both", "SCSA: Synergistic Effects Between Spatial and Channel Attention", 2024
    ),
    "ms_cam": BlockEntry(MSCAM, "both", "Attentional Feature Fusion", 2021),
    "aff": BlockEntry(AFF, "both", "Attentional Feature Fusion", 2021),
    "iaff": BlockEntry(IAFF, "both", "Attentional Feature Fusion", 2021),
    "attention_gate": BlockEntry(
        AttentionGate, "spatial", "Attention U-Net: Learning Where to Look for the Pancreas", 2018
    ),
    "lka": BlockEntry(LKA, "spatial", "Visual Attention Network", 2022),
    "lka_attention": BlockEntry(VANAttention, "spatial", "Visual Attention Network", 2022),
    "lska": BlockEntry(LSKA, "spatial", "Large Separable Kernel Attention", 2023),
    "msca": BlockEntry(MSCA, "spatial", "SegNeXt: Rethinking Convolutional Attention Design", 2022),
    "lsk": BlockEntry(
        LSK, "spatial", "Large Selective Kernel Network for Remote Sensing Object Detection", 2023
    ),
    "strip_pooling": BlockEntry(
        StripPooling, "spatial", "Strip Pooling: Rethinking Spatial Pooling", 2020
    ),
    # Branches, context and tokens.
    "sk": BlockEntry(SelectiveKernel, "branch", "Selective Kernel Networks", 2019),
    "split": BlockEntry(SplitAttention, "branch", "ResNeSt: Split-Attention Networks", 2020),
    "epsa": BlockEntry(
        PyramidSqueezeAttention, "branch", "EPSANet: Efficient Pyramid Squeeze Attention", 2021
    ),
    "cot": BlockEntry(
        ContextualTransformer,
        "token",
        "Contextual Transformer Networks for Visual Recognition",
        2021,
    ),
    "involution": BlockEntry(
        Involution, "token", "Involution: Inverting the Inherence of Convolution", 2021
    ),
    "outlook": BlockEntry(
        OutlookAttention, "token", "VOLO: Vision Outlooker for Visual Recognition", 2021
    ),
    "gc": BlockEntry(
        GlobalContext, "context", "GCNet: Non-local Networks Meet Squeeze-Excitation Networks", 2019
    ),
    "non_local": BlockEntry(NonLocal, "token", "Non-local Neural Networks", 2018),
    "a2": BlockEntry(DoubleAttention, "context", "A^2-Nets: Double Attention Networks", 2018),
    "pam": BlockEntry(
        PositionAttention, "token", "Dual Attention Network for Scene Segmentation", 2019
    ),
    "cam": BlockEntry(
        ChannelAttentionModule, "token", "Dual Attention Network for Scene Segmentation", 2019
    ),
    "danet": BlockEntry(
        DualAttention, "token", "Dual Attention Network for Scene Segmentation", 2019
    ),
    "criss_cross": BlockEntry(
        CrissCrossAttention2d,
        "token",
        "CCNet: Criss-Cross Attention for Semantic Segmentation",
        2019,
    ),
    "efficient": BlockEntry(
        EfficientAttention, "context", "Efficient Attention: Linear Complexities", 2021
    ),
    "external": BlockEntry(
        ExternalAttention, "context", "Beyond Self-attention: External Attention", 2021
    ),
    "bot": BlockEntry(
        BottleneckAttention, "token", "Bottleneck Transformers for Visual Recognition", 2021
    ),
    "axial": BlockEntry(
        AxialAttention2d, "token", "Axial Attention in Multidimensional Transformers", 2019
    ),
    "xca": BlockEntry(
        CrossCovarianceAttention, "token", "XCiT: Cross-Covariance Image Transformers", 2021
    ),
}

BLOCKS = NamedTable(
    _ENTRIES,
    columns={
        "class": lambda entry: entry.block.__name__,
        "family": lambda entry: entry.family,
        "year": lambda entry: entry.year,
        "paper": lambda entry: entry.paper,
    },
)


def create_block(
    name: str,
    channels: int,
    **options: Any,
) -> nn.Module:
    """Build the block `name` for maps of `channels` channels, with options of its constructor."""
    block = lookup(BLOCKS, name, "block").block
    known = list(inspect.signature(block).parameters)[1:]  # without `channels`
    for option in options:
        if option not in known:
            raise ValueError(f"block {name!r} has no option {option!r}; {suggest(option, known)}")
    return block(channels, **options)
