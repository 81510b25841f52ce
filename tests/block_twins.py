"""Slow twins: each block again, from its paper's equation with numpy and loops in float64, independent of the library.

`twin(state, x, channels, **options)`; state maps our parameter names to arrays. TWINS names them at the end.
"""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def squeeze_excite(state, x, channels, reduction=16):
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        mean = np.array([x[b, c].mean() for c in range(channels)])
        hidden = np.maximum(state["fc1.weight"] @ mean + state["fc1.bias"], 0)
        gate = sigmoid(state["fc2.weight"] @ hidden + state["fc2.bias"])
        for c in range(channels):
            y[b, c] = gate[c] * x[b, c]
    return y


TWINS = {  # block: (twin, [(channels, options), ...])
    # Gates over channels, and over channels and positions.
    "se": (squeeze_excite, [(12, {"reduction": 3})]),
    # Gates over positions and over strips.
    # Branches, context and tokens.
}
