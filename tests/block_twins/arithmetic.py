"""The operations of the twins, by loops."""

import numpy as np


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


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


def softmax(e):
    e = np.exp(e - e.max())
    return e / e.sum()
