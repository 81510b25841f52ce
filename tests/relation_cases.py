"""The cases of the relations: how to build and call each, and who meets whom, said once more without the library."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from visattn.core.attention import RELATIONS

DIM, HEADS, GRID = 12, 3, (5, 7)
TOKENS = GRID[0] * GRID[1]


def near(shift: int, size: int):
    """Windows as stretches of the line: cell numbers, where what lies before the shift is a cell of its own."""
    return lambda a, b, n: size >= n or (a - shift) // size == (b - shift) // size


def in_window(size: int, shift: int = 0):
    same = near(shift, size)
    return lambda a, b: same(a[0], b[0], GRID[0]) and same(a[1], b[1], GRID[1])


def in_coarse_grid(size: int):
    steps = [-(-n // min(size, n)) for n in GRID]
    return lambda a, b: all(a[i] % steps[i] == b[i] % steps[i] for i in (0, 1))


def in_neighborhood(size: int):
    def start(at, n):
        first = at - size // 2
        while first < 0:
            first += 1
        while first + size > n:
            first -= 1
        return first

    return lambda a, b: all(
        start(a[i], GRID[i]) <= b[i] < start(a[i], GRID[i]) + size for i in (0, 1)
    )


def everyone(a, b):
    return True


@dataclass(frozen=True)
class RelationCase:
    """meets(place of the query, place of the key) for tokens of the grid; None where the twin is of another kind."""

    options: dict = field(default_factory=dict)
    meets: Callable | None = None
    tokens_out: int = TOKENS
    grid: bool = False
    maps: int = 1
    takes_context: bool = False
    refused: dict = field(default_factory=dict)


RELATION_CASES = {
    "self": RelationCase(
        meets=everyone, refused={"num_heads": (5, "num_heads must divide dim; got num_heads=5")}
    ),
    "cross": RelationCase(
        takes_context=True, refused={"num_heads": (0, "num_heads must divide dim")}
    ),
    "class": RelationCase(tokens_out=1, refused={"num_heads": (5, "num_heads must divide dim")}),
    "pool": RelationCase(
        {"num_queries": 2},
        tokens_out=2,
        takes_context=True,
        refused={"num_queries": (0, "num_queries must be at least 1; got 0")},
    ),
    "memory": RelationCase(
        {"num_slots": 5}, refused={"num_slots": (0, "num_slots must be at least 1; got 0")}
    ),
    "window": RelationCase(
        {"window_size": 3},
        in_window(3),
        grid=True,
        refused={"window_size": (0, "window_size must be a positive number, or two; got 0")},
    ),
    "shifted_window": RelationCase({"window_size": 3}, in_window(3, 1), grid=True),
    "grid": RelationCase({"window_size": 3}, in_coarse_grid(3), grid=True),
    "axial": RelationCase(grid=True, maps=2),
    "criss_cross": RelationCase(meets=lambda a, b: a[0] == b[0] or a[1] == b[1], grid=True),
    "neighborhood": RelationCase(
        {"kernel_size": 3},
        in_neighborhood(3),
        grid=True,
        refused={"kernel_size": (4, "kernel_size must be odd, so that it has a middle; got 4")},
    ),
    "channel": RelationCase(refused={"num_heads": (5, "num_heads must divide dim")}),
}


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(name: str, similarity=None, normalize=None, **options) -> torch.nn.Module:
    """Return the case's relation in float64 with seeded parameters, in evaluation mode."""
    options = {**RELATION_CASES[name].options, **options}
    module = (
        RELATIONS[name](DIM, HEADS, similarity=similarity, normalize=normalize, **options)
        .double()
        .eval()
    )
    with torch.no_grad():
        for i, (key, parameter) in enumerate(module.named_parameters()):
            if ".similarity." not in key and ".normalize." not in key:
                parameter.copy_(numbers(*parameter.shape, seed=i) * parameter.shape[-1] ** -0.5)
    return module


def call(name: str, module: torch.nn.Module, x: torch.Tensor, **more) -> torch.Tensor:
    return module(x, grid=GRID, **more) if RELATION_CASES[name].grid else module(x, **more)


def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def attend_slowly(q, k, v, meets):
    """Attend token by token; meets(i, j) says who meets. q (N, D), k and v (M, D)."""
    out = np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        js = [j for j in range(len(k)) if meets(i, j)]
        weights = softmax(np.array([q[i] @ k[j] / q.shape[1] ** 0.5 for j in js]))
        for weight, j in zip(weights, js, strict=True):
            out[i] += weight * v[j]
    return out


def relation_slowly(module, x, meets):
    """Self-attention of one image x (N, dim) in plain numpy, over the tokens that meet."""
    place = [(y, x) for y in range(GRID[0]) for x in range(GRID[1])]
    weight = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    qkv = x @ weight["qkv.weight"].T + weight["qkv.bias"]
    width, out = DIM // HEADS, []
    for head in range(HEADS):
        q, k, v = (qkv[:, part * DIM + head * width :][:, :width] for part in range(3))
        out.append(attend_slowly(q, k, v, lambda i, j: meets(place[i], place[j])))
    return np.concatenate(out, 1) @ weight["proj.weight"].T + weight["proj.bias"]
