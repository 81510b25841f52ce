"""The cases of the formula: every similarity and normalizer, with an independent slow twin and what it declares."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from visattn.core.normalize import NORMALIZERS
from visattn.core.similarity import SIMILARITIES


@dataclass(frozen=True)
class SimilarityCase:
    """twin(q_i, k_j, parameters of the head, all keys) -> score, in plain numpy."""

    twin: Callable
    options: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)


@dataclass(frozen=True)
class NormalizerCase:
    """twin(scores of one head, (Nq, Nk)) -> weights, in plain numpy; None where training draws at random."""

    twin: Callable | None
    options: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)


def _norm(x):
    return math.sqrt(sum(value * value for value in x))


def _softmax(x):
    weights = [math.exp(value - max(x)) for value in x]
    return np.array([weight / sum(weights) for weight in weights])


def _efficient(q, k, p, keys):
    column = [
        _softmax(keys[:, d])[[tuple(key) for key in keys].index(tuple(k))] for d in range(len(q))
    ]
    return float(np.dot(_softmax(q), column))


def _phi(x):
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
    ordered, total, threshold = sorted(row, reverse=True), 0.0, 0.0
    for size, value in enumerate(ordered, 1):
        total += value
        if 1 + size * value > total:
            threshold = (total - 1) / size
    return np.maximum(row - threshold, 0)


def _entmax(alpha):
    def bisect(row):
        x = (alpha - 1) * row
        low, high = x.max() - 1, x.max()
        for _ in range(100):
            middle = (low + high) / 2
            mass = (np.maximum(x - middle, 0) ** (1 / (alpha - 1))).sum()
            low, high = (middle, high) if mass > 1 else (low, middle)
        return np.maximum(x - low, 0) ** (1 / (alpha - 1))

    return bisect


def _topk(row):
    chosen = sorted(range(len(row)), key=lambda j: -row[j])[:3]
    total = sum(math.exp(row[j]) for j in chosen)
    return np.array(
        [math.exp(value) / total if j in chosen else 0.0 for j, value in enumerate(row)]
    )


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
    "hard": NormalizerCase(
        _rows(lambda row: np.eye(len(row))[max(range(len(row)), key=lambda j: row[j])])
    ),
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
    """Return the case's normalizer in float64, in evaluation mode, with the parameters of its options."""
    module = NORMALIZERS[name](num_heads, **NORMALIZER_CASES[name].options).double().eval()
    with torch.no_grad():
        for (
            parameter
        ) in module.parameters():  # entmax is born in float32: give it its exponent in all digits
            parameter.fill_(math.log(0.25 / 0.75))
    return module


def _seed(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 2
            )
    return module
