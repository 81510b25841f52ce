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


def convolve(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """A cross-correlation by loops over images, output channels and positions, zeros beyond the border."""
    out, per_group, kh, kw = weight.shape
    ph, pw = padding if isinstance(padding, tuple) else (padding, padding)
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    height = (padded.shape[2] - dilation * (kh - 1) - 1) // stride + 1
    width = (padded.shape[3] - dilation * (kw - 1) - 1) // stride + 1
    y = np.zeros((x.shape[0], out, height, width))
    for b, o, i, j in np.ndindex(*y.shape):
        first = o // (out // groups) * per_group
        rows = slice(i * stride, i * stride + dilation * (kh - 1) + 1, dilation)
        columns = slice(j * stride, j * stride + dilation * (kw - 1) + 1, dilation)
        window = padded[b, first : first + per_group, rows, columns]
        y[b, o, i, j] = (window * weight[o]).sum() + (0 if bias is None else bias[o])
    return y


def batch_norm(x, state, name, eps=1e-5):
    """Batch normalization in evaluation mode; channels are axis 1."""
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        scale = state[f"{name}.weight"][c] / np.sqrt(state[f"{name}.running_var"][c] + eps)
        y[:, c] = (x[:, c] - state[f"{name}.running_mean"][c]) * scale + state[f"{name}.bias"][c]
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
    z = np.maximum(batch_norm(convolve(x, state["conv.weight"], state["conv.bias"]), state, "norm"), 0)
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


def group_norm(x, groups, weight, bias, eps=1e-5):
    """Group normalization of (B, C, ...) with biased variance."""
    y = np.empty_like(x)
    width = x.shape[1] // groups
    for b, g in np.ndindex(x.shape[0], groups):
        part = x[b, g * width : (g + 1) * width]
        y[b, g * width : (g + 1) * width] = (part - part.mean()) / np.sqrt(part.var() + eps)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return y * weight.reshape(shape) + bias.reshape(shape)


def resize(x, height, width, aligned):
    """Bilinear interpolation, with corners or with pixel edges aligned."""
    y = np.empty((*x.shape[:2], height, width))
    for i, j in np.ndindex(height, width):
        corners = []
        for place, size, old in ((i, height, x.shape[2]), (j, width, x.shape[3])):
            if aligned:
                at = place * (old - 1) / (size - 1) if size > 1 else 0.0
            else:
                at = max((place + 0.5) * old / size - 0.5, 0.0)
            low = min(int(at), old - 1)
            corners.append((low, min(low + 1, old - 1), at - low))
        (top, bottom, v), (left, right, h) = corners
        upper = (1 - h) * x[:, :, top, left] + h * x[:, :, top, right]
        lower = (1 - h) * x[:, :, bottom, left] + h * x[:, :, bottom, right]
        y[:, :, i, j] = (1 - v) * upper + v * lower
    return y


def local_attention(state, x, channels, kernel_size=7, groups=16, conv_groups=None):
    pad = kernel_size // 2
    options = {"groups": conv_groups or channels}
    rows = convolve(x.mean(3, keepdims=True), state["conv_h.weight"], padding=(pad, 0), **options)
    columns = convolve(x.mean(2, keepdims=True), state["conv_w.weight"], padding=(0, pad), **options)
    rows = sigmoid(group_norm(rows, groups, state["norm_h.weight"], state["norm_h.bias"]))
    columns = sigmoid(group_norm(columns, groups, state["norm_w.weight"], state["norm_w.bias"]))
    return x * rows * columns


def spatial_group_enhance(state, x, channels, groups=64):
    y = np.empty_like(x)
    width = channels // groups
    for b, g in np.ndindex(x.shape[0], groups):
        part = x[b, g * width : (g + 1) * width]
        average = part.mean((1, 2))
        t = np.array([[average @ part[:, i, j] for j in range(x.shape[3])] for i in range(x.shape[2])])
        t = (t - t.mean()) / (t.std(ddof=1) + 1e-5)
        y[b, g * width : (g + 1) * width] = part * sigmoid(state["weight"][g] * t + state["bias"][g])
    return y


def multidimensional_collaborative(state, x, channels, kernel_size=None, spatial_kernel_size=3, channel_gate=True):
    gates = []
    for name, axis in (("gate_c", 1), ("gate_h", 2), ("gate_w", 3))[0 if channel_gate else 1 :]:
        a, b = sigmoid(state[f"{name}.weight"])
        kernel = state[f"{name}.conv.weight"][0, 0]
        gate = np.empty((x.shape[0], x.shape[axis]))
        for image in range(x.shape[0]):
            slices = np.moveaxis(x[image], axis - 1, 0)
            means = np.array([s.mean() for s in slices])
            deviations = np.array([s.std(ddof=1) for s in slices])
            squeezed = np.pad((means + deviations) / 2 + a * means + b * deviations, len(kernel) // 2)
            gate[image] = [squeezed[i : i + len(kernel)] @ kernel for i in range(len(means))]
        gates.append(np.expand_dims(sigmoid(gate), tuple({1, 2, 3} - {axis})))
    return sum(x * gate for gate in gates) / len(gates)


def _multi_scale_gate(state, x, local, global_):
    """The gate of MS-CAM from its two branches."""

    def branch(name, z):
        z = batch_norm(convolve(z, state[f"{name}.0.weight"]), state, f"{name}.1")
        return batch_norm(convolve(np.maximum(z, 0), state[f"{name}.3.weight"]), state, f"{name}.4")

    return sigmoid(branch(local, x) + branch(global_, x.mean((2, 3), keepdims=True)))


def multi_scale_channel(state, x, channels, reduction=4):
    return x * _multi_scale_gate(state, x, "local_gate", "global_gate")


def attentional_fusion(state, x, y, channels, reduction=4):
    gate = _multi_scale_gate(state, x + y, "local_gate", "global_gate")
    return gate * x + (1 - gate) * y


def iterative_fusion(state, x, y, channels, reduction=4):
    gate = _multi_scale_gate(state, x + y, "local_gate1", "global_gate1")
    gate = _multi_scale_gate(state, gate * x + (1 - gate) * y, "local_gate2", "global_gate2")
    return gate * x + (1 - gate) * y


def attention_gate(state, x, g, channels, subsample=2):
    query = convolve(x, state["project_x.weight"], stride=subsample)
    key = convolve(g, state["project_gate.weight"], state["project_gate.bias"])
    hidden = np.maximum(query + resize(key, *query.shape[2:], aligned=False), 0)
    score = sigmoid(convolve(hidden, state["score.weight"], state["score.bias"]))
    return x * resize(score, *x.shape[2:], aligned=False)


def separable_kernel(state, x, channels, kernel_size=23):
    d = 2 if kernel_size < 23 else 3
    k = kernel_size // d
    gate = x
    for name, padding, dilation in (
        ("local_h", (0, d - 1), 1),
        ("local_v", (d - 1, 0), 1),
        ("dilated_h", (0, d * (k // 2)), d),
        ("dilated_v", (d * (k // 2), 0), d),
    ):
        gate = _depthwise(gate, state[f"{name}.weight"], state[f"{name}.bias"], padding, dilation)
    return x * convolve(gate, state["mix.weight"], state["mix.bias"])


def _depthwise(x, weight, bias, padding, dilation):
    """A one-dimensional convolution of each channel by itself, tap by tap."""
    y = np.zeros_like(x) + bias[:, None, None]
    taps = weight.reshape(len(weight), -1)
    for (c, t), i, j in ((ct, i, j) for ct in np.ndindex(*taps.shape) for i, j in np.ndindex(*x.shape[2:])):
        shift = (t - taps.shape[1] // 2) * dilation
        row, column = (i + shift, j) if padding[0] else (i, j + shift)
        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
            y[:, c, i, j] += taps[c, t] * x[:, c, row, column]
    return y


def strip_pooling(state, x, channels, pool_sizes=(20, 12), reduction=4):
    def layer(name, z, padding=0, act=False):
        z = batch_norm(convolve(z, state[f"{name}.0.weight"], padding=padding), state, f"{name}.1")
        return np.maximum(z, 0) if act else z

    def grid(z, bins):
        height, width = z.shape[2:]
        y = np.empty((*z.shape[:2], bins, bins))
        for i, j in np.ndindex(bins, bins):
            rows = slice(i * height // bins, -(-(i + 1) * height // bins))
            y[:, :, i, j] = z[:, :, rows, j * width // bins : -(-(j + 1) * width // bins)].mean((2, 3))
        return y

    narrow, strip = layer("reduce_grid", x, act=True), layer("reduce_strip", x, act=True)
    pyramid = layer("local", narrow, 1)
    for index, bins in enumerate(pool_sizes):
        pyramid = pyramid + resize(layer(f"grids.{index}", grid(narrow, bins), 1), *x.shape[2:], aligned=True)
    rows = layer("row", strip.mean(3, keepdims=True), (1, 0))
    columns = layer("column", strip.mean(2, keepdims=True), (0, 1))
    left = layer("mix_grid", np.maximum(pyramid, 0), 1, act=True)
    right = layer("mix_strip", np.maximum(rows + columns, 0), 1, act=True)
    return np.maximum(x + layer("expand", np.concatenate((left, right), 1)), 0)


def softmax(e):
    e = np.exp(e - e.max())
    return e / e.sum()


def involution(state, x, channels, kernel_size=7, group_channels=16):
    batch, _, height, width = x.shape
    y, half, area = np.zeros_like(x), kernel_size // 2, kernel_size**2
    mean, var = state["norm.running_mean"], state["norm.running_var"]
    for b, i, j in np.ndindex(batch, height, width):
        hidden = state["reduce.weight"][:, :, 0, 0] @ x[b, :, i, j]
        hidden = (hidden - mean) / np.sqrt(var + 1e-5) * state["norm.weight"] + state["norm.bias"]
        kernel = state["span.weight"][:, :, 0, 0] @ np.maximum(hidden, 0) + state["span.bias"]
        for c in range(channels):
            for k in range(area):
                row, column = i + k // kernel_size - half, j + k % kernel_size - half
                if 0 <= row < height and 0 <= column < width:
                    y[b, c, i, j] += kernel[c // group_channels * area + k] * x[b, c, row, column]
    return y


def non_local_concatenation(state, x, channels, mode, reduction):
    y = np.empty_like(x)

    def embed(name, features):
        return state[f"{name}.weight"][:, :, 0, 0] @ features + state[f"{name}.bias"][:, None]

    for b in range(x.shape[0]):
        features = x[b].reshape(channels, -1)
        query, key, value = (embed(name, features) for name in ("query", "key", "value"))
        positions = features.shape[1]
        own = state["attend.similarity.query_weight"][0, :, 0] @ query
        other = state["attend.similarity.key_weight"][0, :, 0] @ key
        m = np.zeros_like(value)
        for i, j in np.ndindex(positions, positions):
            m[:, i] += max(own[i] + other[j], 0) / positions * value[:, j]
        z = embed("proj", m)
        z = (z - state["norm.running_mean"][:, None]) / np.sqrt(state["norm.running_var"][:, None] + 1e-5)
        z = z * state["norm.weight"][:, None] + state["norm.bias"][:, None]
        y[b] = x[b] + z.reshape(x[b].shape)
    return y


def dual_attention(state, x, channels):
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        features = x[b].reshape(channels, -1)
        q, k, v = (
            state[f"position.{name}.weight"][:, :, 0, 0] @ features + state[f"position.{name}.bias"][:, None]
            for name in ("query", "key", "value")
        )
        by_position = np.stack([v @ softmax(q[:, i] @ k) for i in range(features.shape[1])], 1)
        by_channel = np.stack([softmax(features[c] @ features.T) @ features for c in range(channels)])
        total = 2 * features + state["position.gamma"] * by_position + state["channel.gamma"] * by_channel
        y[b] = total.reshape(x[b].shape)
    return y


def criss_cross_twice(state, x, channels):
    batch, _, height, width = x.shape
    for _ in range(2):
        q, k, v = (
            np.einsum("dc,bchw->bdhw", state[f"{name}.weight"][:, :, 0, 0], x) + state[f"{name}.bias"][:, None, None]
            for name in ("query", "key", "value")
        )
        m = np.empty_like(v)
        for b, i, j in np.ndindex(batch, height, width):
            cross = [(i, w) for w in range(width)] + [(h, j) for h in range(height) if h != i]
            weights = softmax(np.array([q[b, :, i, j] @ k[b, :, row, column] for row, column in cross]))
            m[b, :, i, j] = sum(w * v[b, :, row, column] for w, (row, column) in zip(weights, cross, strict=True))
        x = x + state["gamma"] * m
    return x


def axial_attention(state, x, channels, num_heads=4):
    y, width = np.zeros_like(x), channels // num_heads
    for b in range(x.shape[0]):
        for axis, lines in (("height", x[b].transpose(2, 1, 0)), ("width", x[b].transpose(1, 2, 0))):
            for n, line in enumerate(lines):  # (positions of the line, C)
                q, k, v = np.split(line @ state[f"{axis}.qkv.weight"].T, 3, 1)
                m = np.empty_like(line)
                for h in range(num_heads):
                    part = slice(h * width, (h + 1) * width)
                    for i in range(len(line)):
                        weights = softmax(k[:, part] @ q[i, part] / np.sqrt(width))
                        m[i, part] = weights @ v[:, part]
                m = m @ state[f"{axis}.proj.weight"].T + state[f"{axis}.proj.bias"]
                if axis == "height":
                    y[b, :, :, n] += m.T
                else:
                    y[b, :, n, :] += m.T
    return y


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
    "gaussian_gct": (gaussian_context_transformer, [(11, {}), (11, {"width": 0.7}), (11, {"bounds": (0.5, 3.0)})]),
    "fca": (frequency_channel_attention, [(10, {"frequencies": 5, "reduction": 3, "size": 14})]),
    "gsop": (second_order_pooling, [(6, {"hidden": 5})]),
    "cbam": (cbam_channel, [(7, {"pools": ("avg", "max", "lp", "lse"), "reduction": 2, "spatial": False})]),
    "scse": (concurrent_squeeze_excite, [(6, {})]),
    # Gates over positions and over strips.
    "ela": (local_attention, [(12, {"groups": 4}), (12, {"groups": 3, "kernel_size": 5, "conv_groups": 2})]),
    "sge": (spatial_group_enhance, [(12, {"groups": 4})]),
    "mca": (multidimensional_collaborative, [(12, {}), (24, {"kernel_size": 5}), (12, {"channel_gate": False})]),
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
