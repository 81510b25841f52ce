"""Slow twins of branches, context and tokens."""

import numpy as np

from block_twins.arithmetic import softmax


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
        z = (z - state["norm.running_mean"][:, None]) / np.sqrt(
            state["norm.running_var"][:, None] + 1e-5
        )
        z = z * state["norm.weight"][:, None] + state["norm.bias"][:, None]
        y[b] = x[b] + z.reshape(x[b].shape)
    return y


def dual_attention(state, x, channels):
    y = np.empty_like(x)
    for b in range(x.shape[0]):
        features = x[b].reshape(channels, -1)
        q, k, v = (
            state[f"position.{name}.weight"][:, :, 0, 0] @ features
            + state[f"position.{name}.bias"][:, None]
            for name in ("query", "key", "value")
        )
        by_position = np.stack([v @ softmax(q[:, i] @ k) for i in range(features.shape[1])], 1)
        by_channel = np.stack(
            [softmax(features[c] @ features.T) @ features for c in range(channels)]
        )
        total = (
            2 * features
            + state["position.gamma"] * by_position
            + state["channel.gamma"] * by_channel
        )
        y[b] = total.reshape(x[b].shape)
    return y


def criss_cross_twice(state, x, channels):
    batch, _, height, width = x.shape
    for _ in range(2):
        q, k, v = (
            np.einsum("dc,bchw->bdhw", state[f"{name}.weight"][:, :, 0, 0], x)
            + state[f"{name}.bias"][:, None, None]
            for name in ("query", "key", "value")
        )
        m = np.empty_like(v)
        for b, i, j in np.ndindex(batch, height, width):
            cross = [(i, w) for w in range(width)] + [(h, j) for h in range(height) if h != i]
            weights = softmax(
                np.array([q[b, :, i, j] @ k[b, :, row, column] for row, column in cross])
            )
            m[b, :, i, j] = sum(
                w * v[b, :, row, column] for w, (row, column) in zip(weights, cross, strict=True)
            )
        x = x + state["gamma"] * m
    return x


def axial_attention(state, x, channels, num_heads=4):
    y, width = np.zeros_like(x), channels // num_heads
    for b in range(x.shape[0]):
        for axis, lines in (
            ("height", x[b].transpose(2, 1, 0)),
            ("width", x[b].transpose(1, 2, 0)),
        ):
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
