"""Slow twins of the gates over positions and strips."""

import numpy as np

from block_twins.arithmetic import batch_norm, convolve, group_norm, resize, sigmoid


def local_attention(state, x, channels, kernel_size=7, groups=16, conv_groups=None):
    pad = kernel_size // 2
    options = {"groups": conv_groups or channels}
    rows = convolve(x.mean(3, keepdims=True), state["conv_h.weight"], padding=(pad, 0), **options)
    columns = convolve(
        x.mean(2, keepdims=True), state["conv_w.weight"], padding=(0, pad), **options
    )
    rows = sigmoid(group_norm(rows, groups, state["norm_h.weight"], state["norm_h.bias"]))
    columns = sigmoid(group_norm(columns, groups, state["norm_w.weight"], state["norm_w.bias"]))
    return x * rows * columns


def spatial_group_enhance(state, x, channels, groups=64):
    y = np.empty_like(x)
    width = channels // groups
    for b, g in np.ndindex(x.shape[0], groups):
        part = x[b, g * width : (g + 1) * width]
        average = part.mean((1, 2))
        t = np.array(
            [[average @ part[:, i, j] for j in range(x.shape[3])] for i in range(x.shape[2])]
        )
        t = (t - t.mean()) / (t.std(ddof=1) + 1e-5)
        y[b, g * width : (g + 1) * width] = part * sigmoid(
            state["weight"][g] * t + state["bias"][g]
        )
    return y


def multidimensional_collaborative(
    state, x, channels, kernel_size=None, spatial_kernel_size=3, channel_gate=True
):
    gates = []
    for name, axis in (("gate_c", 1), ("gate_h", 2), ("gate_w", 3))[0 if channel_gate else 1 :]:
        a, b = sigmoid(state[f"{name}.weight"])
        kernel = state[f"{name}.conv.weight"][0, 0]
        gate = np.empty((x.shape[0], x.shape[axis]))
        for image in range(x.shape[0]):
            slices = np.moveaxis(x[image], axis - 1, 0)
            means = np.array([s.mean() for s in slices])
            deviations = np.array([s.std(ddof=1) for s in slices])
            squeezed = np.pad(
                (means + deviations) / 2 + a * means + b * deviations, len(kernel) // 2
            )
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
    for (c, t), i, j in (
        (ct, i, j) for ct in np.ndindex(*taps.shape) for i, j in np.ndindex(*x.shape[2:])
    ):
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
            y[:, :, i, j] = z[:, :, rows, j * width // bins : -(-(j + 1) * width // bins)].mean(
                (2, 3)
            )
        return y

    narrow, strip = layer("reduce_grid", x, act=True), layer("reduce_strip", x, act=True)
    pyramid = layer("local", narrow, 1)
    for index, bins in enumerate(pool_sizes):
        pyramid = pyramid + resize(
            layer(f"grids.{index}", grid(narrow, bins), 1), *x.shape[2:], aligned=True
        )
    rows = layer("row", strip.mean(3, keepdims=True), (1, 0))
    columns = layer("column", strip.mean(2, keepdims=True), (0, 1))
    left = layer("mix_grid", np.maximum(pyramid, 0), 1, act=True)
    right = layer("mix_strip", np.maximum(rows + columns, 0), 1, act=True)
    return np.maximum(x + layer("expand", np.concatenate((left, right), 1)), 0)
