"""BLOCKS: every attention block by name."""

import inspect
from typing import NamedTuple

from torch import nn

from visattn.blocks.a2 import DoubleAttention
from visattn.blocks.attention_gate import AttentionGate
from visattn.blocks.axial import AxialAttention
from visattn.blocks.bam import BAM
from visattn.blocks.bot import BottleneckAttention
from visattn.blocks.cbam import CBAM
from visattn.blocks.coordinate import CoordinateAttention
from visattn.blocks.cot import ContextualTransformer
from visattn.blocks.criss_cross import CrissCrossAttention
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
from visattn.names import lookup, suggest


class Entry(NamedTuple):
    """One row of BLOCKS; `kind` is the family: channel, spatial, both, branch, token (self-attention) or context."""

    block: type[nn.Module]
    kind: str
    paper: str
    year: int


BLOCKS = {
    # Gates over channels, and over channels and positions.
    "se": Entry(SqueezeExcite, "channel", "Squeeze-and-Excitation Networks", 2018),
    "ese": Entry(
        EffectiveSqueezeExcite,
        "channel",
        "CenterMask: Real-Time Anchor-Free Instance Segmentation",
        2020,
    ),
    "eca": Entry(
        EfficientChannelAttention,
        "channel",
        "ECA-Net: Efficient Channel Attention for Deep CNNs",
        2020,
    ),
    "ge": Entry(GatherExcite, "both", "Gather-Excite: Exploiting Feature Context in CNNs", 2018),
    "srm": Entry(
        StyleRecalibration, "channel", "SRM: A Style-based Recalibration Module for CNNs", 2019
    ),
    "gct": Entry(
        GatedChannelTransform,
        "channel",
        "Gated Channel Transformation for Visual Recognition",
        2020,
    ),
    "lct": Entry(LinearContextTransform, "channel", "Linear Context Transform Block", 2020),
    "gaussian_gct": Entry(
        GaussianContextTransformer, "channel", "Gaussian Context Transformer", 2021
    ),
    "fca": Entry(
        FrequencyChannelAttention, "channel", "FcaNet: Frequency Channel Attention Networks", 2021
    ),
    "nam": Entry(NormalizationAttention, "both", "NAM: Normalization-based Attention Module", 2021),
    "gsop": Entry(
        SecondOrderPooling, "channel", "Global Second-order Pooling Convolutional Networks", 2019
    ),
    "cbam": Entry(CBAM, "both", "CBAM: Convolutional Block Attention Module", 2018),
    "bam": Entry(BAM, "both", "BAM: Bottleneck Attention Module", 2018),
    "scse": Entry(
        ConcurrentSqueezeExcite,
        "both",
        "Concurrent Spatial and Channel Squeeze & Excitation in FCNs",
        2018,
    ),
    "coord": Entry(
        CoordinateAttention,
        "both",
        "Coordinate Attention for Efficient Mobile Network Design",
        2021,
    ),
    # Gates over positions and over strips.
    "ela": Entry(
        ELA, "both", "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024
    ),
    "simam": Entry(SimAM, "both", "SimAM: A Simple, Parameter-Free Attention Module", 2021),
    "triplet": Entry(
        TripletAttention, "both", "Rotate to Attend: Convolutional Triplet Attention Module", 2021
    ),
    "shuffle": Entry(ShuffleAttention, "both", "SA-Net: Shuffle Attention", 2021),
    "sge": Entry(SpatialGroupEnhance, "both", "Spatial Group-wise Enhance", 2019),
    "polarized": Entry(PolarizedAttention, "both", "Polarized Self-Attention", 2021),
    "ema": Entry(
        EMA, "both", "Efficient Multi-Scale Attention Module with Cross-Spatial Learning", 2023
    ),
    "mca": Entry(MCA, "both", "MCA: Multidimensional collaborative attention", 2023),
    "scsa": Entry(
        SCSA, "both", "SCSA: Synergistic Effects Between Spatial and Channel Attention", 2024
    ),
    "ms_cam": Entry(MSCAM, "both", "Attentional Feature Fusion", 2021),
    "aff": Entry(AFF, "both", "Attentional Feature Fusion", 2021),
    "iaff": Entry(IAFF, "both", "Attentional Feature Fusion", 2021),
    "attention_gate": Entry(
        AttentionGate, "spatial", "Attention U-Net: Learning Where to Look for the Pancreas", 2018
    ),
    "lka": Entry(LKA, "spatial", "Visual Attention Network", 2022),
    "lka_attention": Entry(VANAttention, "spatial", "Visual Attention Network", 2022),
    "lska": Entry(LSKA, "spatial", "Large Separable Kernel Attention", 2023),
    "msca": Entry(MSCA, "spatial", "SegNeXt: Rethinking Convolutional Attention Design", 2022),
    "lsk": Entry(
        LSK, "spatial", "Large Selective Kernel Network for Remote Sensing Object Detection", 2023
    ),
    "strip_pooling": Entry(
        StripPooling, "spatial", "Strip Pooling: Rethinking Spatial Pooling", 2020
    ),
    # Branches, context and tokens.
    "sk": Entry(SelectiveKernel, "branch", "Selective Kernel Networks", 2019),
    "split": Entry(SplitAttention, "branch", "ResNeSt: Split-Attention Networks", 2020),
    "epsa": Entry(
        PyramidSqueezeAttention, "branch", "EPSANet: Efficient Pyramid Squeeze Attention", 2021
    ),
    "cot": Entry(
        ContextualTransformer,
        "token",
        "Contextual Transformer Networks for Visual Recognition",
        2021,
    ),
    "involution": Entry(
        Involution, "token", "Involution: Inverting the Inherence of Convolution", 2021
    ),
    "outlook": Entry(
        OutlookAttention, "token", "VOLO: Vision Outlooker for Visual Recognition", 2021
    ),
    "gc": Entry(
        GlobalContext, "context", "GCNet: Non-local Networks Meet Squeeze-Excitation Networks", 2019
    ),
    "non_local": Entry(NonLocal, "token", "Non-local Neural Networks", 2018),
    "a2": Entry(DoubleAttention, "context", "A^2-Nets: Double Attention Networks", 2018),
    "pam": Entry(PositionAttention, "token", "Dual Attention Network for Scene Segmentation", 2019),
    "cam": Entry(
        ChannelAttentionModule, "token", "Dual Attention Network for Scene Segmentation", 2019
    ),
    "danet": Entry(DualAttention, "token", "Dual Attention Network for Scene Segmentation", 2019),
    "criss_cross": Entry(
        CrissCrossAttention, "token", "CCNet: Criss-Cross Attention for Semantic Segmentation", 2019
    ),
    "efficient": Entry(
        EfficientAttention, "context", "Efficient Attention: Linear Complexities", 2021
    ),
    "external": Entry(
        ExternalAttention, "context", "Beyond Self-attention: External Attention", 2021
    ),
    "bot": Entry(
        BottleneckAttention, "token", "Bottleneck Transformers for Visual Recognition", 2021
    ),
    "axial": Entry(
        AxialAttention, "token", "Axial Attention in Multidimensional Transformers", 2019
    ),
    "xca": Entry(
        CrossCovarianceAttention, "token", "XCiT: Cross-Covariance Image Transformers", 2021
    ),
}


def create_block(name: str, channels: int, **options) -> nn.Module:
    """Build the block called `name` for maps of `channels` channels; `options` are its constructor's."""
    block = lookup(BLOCKS, name, "block").block
    known = list(inspect.signature(block).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(f"block {name!r} has no option {option!r}; {suggest(option, known)}")
    return block(channels, **options)
