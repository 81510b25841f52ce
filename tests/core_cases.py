"""The cases of the formula: every similarity and normalizer, with an independent slow twin.

Also the sizes, inputs and gradients that the tests of the formula share.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES

B, H, NQ, NK, D, DV = 2, 3, 7, 11, 5, 13
EXACT = {"rtol": 1e-10, "atol": 1e-10}
EXACT_GRADIENT = {"rtol": 1e-8, "atol": 1e-9}


def tokens(*shape, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=dtype)


def qkv(queries=NQ, keys=NK, dtype=torch.float64):
    q = tokens(B, H, queries, D, seed=0, dtype=dtype)
    k = tokens(B, H, keys, D, seed=1, dtype=dtype)
    v = tokens(B, H, keys, DV, seed=2, dtype=dtype)
    return [q, k, v]


def differentiate(function, inputs, modules):
    """Return the output and the gradients of inputs and parameters for one seeded cotangent."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    parameters = [p for module in modules for p in module.parameters()]
    output = function(*inputs)
    cotangent = tokens(*output.shape, seed=9, dtype=output.dtype)
    gradients = torch.autograd.grad(
        output, inputs + parameters, cotangent, allow_unused=True, materialize_grads=True
    )
    return output.detach(), gradients


def assert_same_gradients(actual, expected):
    """Compare (output, gradients) of :func:`differentiate`."""
    torch.testing.assert_close(actual[0], expected[0], **EXACT)
    for gradient, expected_gradient in zip(actual[1], expected[1], strict=True):
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient, expected_gradient, **EXACT_GRADIENT)


@dataclass(frozen=True)
class SimilarityCase:
    """twin(q_i, k_j, parameters of the head, all keys) -> score, in plain numpy."""

    twin: Callable
    options: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)


@dataclass(frozen=True)
class NormalizerCase:
    """twin(scores of one head, (Nq, Nk)) -> weights, in plain numpy."""

    twin: Callable
    options: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)


def _norm(x):
    return math.sqrt(sum(value * value for value in x))


def _softmax(x):
    weights = [math.exp(value - max(x)) for value in x]
    return np.array([weight / sum(weights) for weight in weights])


def _efficient(q, k, p, keys):
    index = [tuple(key) for key in keys].index(tuple(k))
    key_weights = [_softmax(keys[:, channel])[index] for channel in range(len(q))]
    return float(np.dot(_softmax(q), key_weights))


def _phi(x):
    """elu(x) + 1."""
    return np.array([value + 1 if value > 0 else math.exp(value) for value in x])


SIMILARITY_CASES = {
    "dot": SimilarityCase(lambda q, k, p, keys: sum(a * b for a, b in zip(q, k, strict=True))),
    "scaled_dot": SimilarityCase(
        lambda q, k, p, keys: (
            float(q @ k) / math.sqrt(len(q)) / math.exp(p["log_temperature"].item())
        ),
        {"learned_temperature": True},
    ),
    "cosine": SimilarityCase(
        lambda q, k, p, keys: (
            float(q @ k) / _norm(q) / _norm(k) * min(math.exp(p["logit_scale"].item()), 100.0)
        )
    ),
    "bilinear": SimilarityCase(
        lambda q, k, p, keys: float(q @ p["weight"] @ k),
        refused={"key_dim": (0, "key_dim must be at least 1; got 0")},
    ),
    "additive": SimilarityCase(
        lambda q, k, p, keys: float(
            np.tanh(q @ p["query_weight"] + k @ p["key_weight"]) @ p["score_weight"][:, 0]
        ),
        {"hidden_dim": 3},
        {"hidden_dim": (0, "hidden_dim must be at least 1; got 0")},
    ),
    "concat": SimilarityCase(
        lambda q, k, p, keys: max(
            0.0, float(q @ p["query_weight"][:, 0] + k @ p["key_weight"][:, 0])
        )
    ),
    "negative_l2": SimilarityCase(
        lambda q, k, p, keys: -math.exp(p["log_gamma"].item()) * _norm(q - k) ** 2
    ),
    "laplacian": SimilarityCase(
        lambda q, k, p, keys: (
            -math.exp(p["log_gamma"].item()) * sum(abs(a - b) for a, b in zip(q, k, strict=True))
        )
    ),
    "linear": SimilarityCase(lambda q, k, p, keys: float(_phi(q) @ _phi(k))),
    "efficient": SimilarityCase(_efficient),
}


def _rows(function):
    return lambda e: np.stack([function(row) for row in e])


def _sparsemax(row):
    """The sort of Martins and Astudillo."""
    total = 0.0
    threshold = 0.0
    for size, value in enumerate(sorted(row, reverse=True), 1):
        total += value
        if 1 + size * value > total:
            threshold = (total - 1) / size
    return np.maximum(row - threshold, 0)


def _entmax(alpha):
    def bisect(row):
        x = (alpha - 1) * row
        low = x.max() - 1
        high = x.max()
        for _ in range(100):
            middle = (low + high) / 2
            weights = np.maximum(x - middle, 0) ** (1 / (alpha - 1))
            if weights.sum() > 1:
                low = middle
            else:
                high = middle
        return np.maximum(x - low, 0) ** (1 / (alpha - 1))

    return bisect


def _topk(row):
    largest = sorted(range(len(row)), key=lambda j: -row[j])[:3]
    weights = np.zeros(len(row))
    weights[largest] = _softmax(row[largest])
    return weights


def _hard(row):
    weights = np.zeros(len(row))
    weights[np.argmax(row)] = 1
    return weights


def _double(e):
    columns = np.stack([_softmax(column) for column in e.T], 1)
    return columns / columns.sum(1, keepdims=True)


def _sinkhorn(e):
    a = np.exp(e)
    for _ in range(2):
        a = a / a.sum(0, keepdims=True)
        a = a / a.sum(1, keepdims=True)
    return a


NORMALIZER_CASES = {
    "softmax": NormalizerCase(_rows(_softmax)),
    "softmax1": NormalizerCase(_rows(lambda row: np.exp(row) / (1 + np.exp(row).sum()))),
    "sparsemax": NormalizerCase(_rows(_sparsemax)),
    "entmax15": NormalizerCase(_rows(_entmax(1.5))),
    "entmax": NormalizerCase(
        _rows(_entmax(1.25)),
        {"alpha": 1.25},
        {"alpha": (1.0, r"alpha must lie in \(1, 2\) to be learned; got 1.0")},
    ),
    "sigmoid": NormalizerCase(_rows(lambda row: 1 / (1 + len(row) * np.exp(-row)))),
    "relu": NormalizerCase(
        _rows(lambda row: np.array([max(value, 0) / len(row) for value in row]))
    ),
    "topk": NormalizerCase(_rows(_topk), {"k": 3}, {"k": (0, "k must be at least 1; got 0")}),
    "hard": NormalizerCase(_rows(_hard)),
    "gumbel": NormalizerCase(
        _rows(lambda row: _softmax(row / 0.5)),
        {"tau": 0.5},
        {"tau": (0.0, "tau must be positive; got 0.0")},
    ),
    "l1": NormalizerCase(_rows(lambda row: row / sum(abs(value) for value in row))),
    "none": NormalizerCase(_rows(lambda row: row / len(row))),
    "double": NormalizerCase(_double),
    "sinkhorn": NormalizerCase(
        _sinkhorn, {"iterations": 2}, {"iterations": (0, "iterations must be at least 1; got 0")}
    ),
}


def make_similarity(name: str, head_dim: int, num_heads: int) -> torch.nn.Module:
    """Return the case's similarity in float64 with seeded parameters."""
    module = SIMILARITIES[name](head_dim, num_heads, **SIMILARITY_CASES[name].options).double()
    return _seed(module)


def make_normalizer(name: str, num_heads: int) -> torch.nn.Module:
    """Return the case's normalizer in float64, in evaluation mode."""
    module = NORMALIZERS[name](num_heads, **NORMALIZER_CASES[name].options).double().eval()
    with torch.no_grad():
        # Only entmax has a parameter, its alpha made in float32: give it all digits of 1.25.
        for parameter in module.parameters():
            parameter.fill_(math.log(0.25 / 0.75))
    return module


def make_pair(similarity: str, normalizer: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return both for D channels and H heads."""
    return make_similarity(similarity, D, H), make_normalizer(normalizer, H)


def _seed(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(noise / 2)
    return module
