"""Slow twins of the gates over channels, alone or with positions."""

import numpy as np

from block_twins.arithmetic import batch_norm, convolve, sigmoid


def squeeze_excite(state, x, channels, reduction=16):
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        mean = np.array([x[b, c].mean() for c in range(channels)])
        hidden = np.maximum(state["fc1.weight"] @ mean + state["fc1.bias"], 0)
        gate = sigmoid(state["fc2.weight"] @ hidden + state["fc2.bias"])
        for c in range(channels):
            y[b, c] = gate[c] * x[b, c]
    return y


def gather_excite(state, x, channels, extent=0, parameters="none", reduction=16):
    height, width = x.shape[2:]
    if parameters == "none":
        gathered = np.zeros((x.shape[0], channels, -(-height // extent), -(-width // extent)))
        for _, _, i, j in np.ndindex(*gathered.shape):
            rows = slice(max(0, i * extent - extent + 1), i * extent + extent)
            columns = slice(max(0, j * extent - extent + 1), j * extent + extent)
            gathered[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    else:
        gathered, steps = x, int(np.log2(extent))
        for step in range(steps):
            weight = state[f"gather.{3 * step}.weight"]
            gathered = convolve(gathered, weight, stride=2, padding=1, groups=channels)
            gathered = batch_norm(gathered, state, f"gather.{3 * step + 1}")
            gathered = np.maximum(gathered, 0) if step < steps - 1 else gathered
    if parameters == "both":
        hidden = convolve(gathered, state["excite.0.weight"], state["excite.0.bias"])
        gathered = convolve(np.maximum(hidden, 0), state["excite.2.weight"], state["excite.2.bias"])
    y = np.empty_like(x)
    for i, j in np.ndindex(height, width):
        near = gathered[:, :, i * gathered.shape[2] // height, j * gathered.shape[3] // width]
        y[:, :, i, j] = x[:, :, i, j] * sigmoid(near)
    return y


def style_recalibration(state, x, channels, unbiased=False):
    style = np.empty(x.shape[:2])
    for b, c in np.ndindex(*style.shape):
        std = np.sqrt(x[b, c].var(ddof=int(unbiased)) + 1e-5)
        style[b, c] = state["weight"][c] @ np.array([x[b, c].mean(), std])
    return x * sigmoid(batch_norm(style[:, :, None, None], state, "norm"))


def linear_context_transform(state, x, channels, groups=16):
    y = np.empty_like(x)
    size = channels // groups
    for b, c in np.ndindex(*x.shape[:2]):
        group = [x[b, d].mean() for d in range(c // size * size, c // size * size + size)]
        z = (x[b, c].mean() - np.mean(group)) / np.sqrt(np.var(group) + 1e-5)
        y[b, c] = sigmoid(state["weight"][c] * z + state["bias"][c]) * x[b, c]
    return y


def gaussian_context_transformer(state, x, channels, width=2.0, bounds=None):
    c = width if bounds is None else bounds[0] + (bounds[1] - bounds[0]) * sigmoid(state["theta"])
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        means = np.array([x[b, k].mean() for k in range(channels)])
        for k in range(channels):
            z = (means[k] - means.mean()) / np.sqrt(means.var() + 1e-5)
            y[b, k] = np.exp(-(z**2) / (2 * c**2)) * x[b, k]
    return y


def second_order_pooling(state, x, channels, hidden=128):
    z = np.maximum(
        batch_norm(convolve(x, state["conv.weight"], state["conv.bias"]), state, "norm"), 0
    )
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        covariance = np.cov(z[b].reshape(hidden, -1), ddof=0)[None, :, :, None]
        rows = batch_norm(covariance, state, "row_norm")[0, :, :, 0]
        weight = state["rows.weight"].reshape(hidden, 4, hidden)
        values = np.concatenate([weight[d] @ rows[d] for d in range(hidden)]) + state["rows.bias"]
        gate = sigmoid(state["fc.weight"] @ values + state["fc.bias"])
        y[b] = gate[:, None, None] * x[b]
    return y


def cbam_channel(state, x, channels, pools, reduction=16, spatial=False):
    pooled = {
        "avg": lambda v: v.mean(),
        "max": lambda v: v.max(),
        "lp": lambda v: np.sqrt((v**2).sum()),
        "lse": lambda v: np.log(np.exp(v).sum()),
    }
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        z = 0
        for pool in pools:
            vector = np.array([pooled[pool](x[b, c]) for c in range(channels)])
            hidden = np.maximum(state["fc1.weight"] @ vector + state["fc1.bias"], 0)
            z = z + state["fc2.weight"] @ hidden + state["fc2.bias"]
        y[b] = sigmoid(z)[:, None, None] * x[b]
    return y


def concurrent_squeeze_excite(state, x, channels, reduction=2):
    spatial = sigmoid(convolve(x, state["conv.weight"], state["conv.bias"]))
    return squeeze_excite(state, x, channels) + spatial * x


def frequency_channel_attention(state, x, channels, frequencies, size=7, reduction=16):
    """The first five of the best frequencies, typed again from the authors' table."""
    table = [(0, 0), (0, 1), (6, 0), (0, 5), (0, 2)][:frequencies]
    height, width = x.shape[2:]
    y, n = np.empty_like(x), size
    for b in range(x.shape[0]):
        f = np.zeros(channels)
        for c in range(channels):
            u, v = (n // 7 * t for t in table[c // (channels // frequencies)])
            for i, j in np.ndindex(n, n):
                rows = slice(int(np.floor(i * height / n)), int(np.ceil((i + 1) * height / n)))
                columns = slice(int(np.floor(j * width / n)), int(np.ceil((j + 1) * width / n)))
                wave = np.cos(np.pi * u * (i + 0.5) / n) * np.cos(np.pi * v * (j + 0.5) / n)
                scale = np.sqrt((1 if u == 0 else 2) / n) * np.sqrt((1 if v == 0 else 2) / n)
                f[c] += scale * wave * x[b, c, rows, columns].mean()
        gate = sigmoid(state["fc2.weight"] @ np.maximum(state["fc1.weight"] @ f, 0))
        y[b] = gate[:, None, None] * x[b]
    return y
