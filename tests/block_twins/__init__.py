"""Slow twins: each block again, from its paper's equation with numpy and loops in float64, independent of the library.

`twin(state, x, channels, **options)`; state maps our parameter names to arrays.
"""

from block_twins.channel import (
    cbam_channel,
    concurrent_squeeze_excite,
    frequency_channel_attention,
    gather_excite,
    gaussian_context_transformer,
    linear_context_transform,
    second_order_pooling,
    squeeze_excite,
    style_recalibration,
)
from block_twins.spatial import (
    attention_gate,
    attentional_fusion,
    iterative_fusion,
    local_attention,
    multi_scale_channel,
    multidimensional_collaborative,
    separable_kernel,
    spatial_group_enhance,
    strip_pooling,
)
from block_twins.token import (
    axial_attention,
    criss_cross_twice,
    dual_attention,
    involution,
    non_local_concatenation,
)

TWINS = {  # block: (twin, [(channels, options), ...])
    # Gates over channels, and over channels and positions.
    "se": (squeeze_excite, [(12, {"reduction": 3})]),
    "ge": (
        gather_excite,
        [
            (3, {"extent": 2}),
            (3, {"extent": 8, "parameters": "gather"}),
            (6, {"extent": 4, "parameters": "both", "reduction": 2}),
        ],
    ),
    "srm": (style_recalibration, [(5, {}), (5, {"unbiased": True})]),
    "lct": (linear_context_transform, [(12, {"groups": 3})]),
    "gaussian_gct": (
        gaussian_context_transformer,
        [(11, {}), (11, {"width": 0.7}), (11, {"bounds": (0.5, 3.0)})],
    ),
    "fca": (frequency_channel_attention, [(10, {"frequencies": 5, "reduction": 3, "size": 14})]),
    "gsop": (second_order_pooling, [(6, {"hidden": 5})]),
    "cbam": (
        cbam_channel,
        [(7, {"pools": ("avg", "max", "lp", "lse"), "reduction": 2, "spatial": False})],
    ),
    "scse": (concurrent_squeeze_excite, [(6, {})]),
    # Gates over positions and over strips.
    "ela": (
        local_attention,
        [(12, {"groups": 4}), (12, {"groups": 3, "kernel_size": 5, "conv_groups": 2})],
    ),
    "sge": (spatial_group_enhance, [(12, {"groups": 4})]),
    "mca": (
        multidimensional_collaborative,
        [(12, {}), (24, {"kernel_size": 5}), (12, {"channel_gate": False})],
    ),
    "ms_cam": (multi_scale_channel, [(12, {})]),
    "aff": (attentional_fusion, [(12, {})]),
    "iaff": (iterative_fusion, [(12, {})]),
    "attention_gate": (attention_gate, [(12, {})]),
    "lska": (separable_kernel, [(5, {}), (5, {"kernel_size": 7}), (5, {"kernel_size": 35})]),
    "strip_pooling": (strip_pooling, [(6, {}), (7, {"pool_sizes": (3, 2), "reduction": 2})]),
    # Branches, context and tokens.
    "involution": (involution, [(32, {}), (12, {"kernel_size": 3, "group_channels": 4})]),
    "non_local": (non_local_concatenation, [(12, {"mode": "concatenation", "reduction": 4})]),
    "danet": (dual_attention, [(12, {})]),
    "criss_cross": (criss_cross_twice, [(12, {})]),
    "axial": (axial_attention, [(12, {}), (7, {"num_heads": 1})]),
}
