"""The normalizers as row functions on the chip.

A row has two numbers, origin and shift, that make its weights functions of single scores: alpha =
exp(e - origin) for softmax, sigmoid(e - shift), max(e, 0) shift for relu, and, with x = (e -
origin) / p, [x - shift]+ ^ p for entmax.
"""

import triton
import triton.language as tl

TINY = tl.constexpr(1e-37)


@triton.jit
def exponent(problem, h, KIND: tl.constexpr):
    """Return p = 1 / (alpha - 1)."""
    p = 1.0
    if KIND == "entmax15":
        p = 2.0
    if KIND == "entmax":
        p = tl.load(problem.p + h)
    return p


@triton.jit
def powers(r, p, KIND: tl.constexpr):
    """Return r^p and r^(p - 1) of numbers that are not negative; both are zero at zero."""
    if KIND == "sparsemax":
        power, slope = r, (r > 0).to(tl.float32)
    elif KIND == "entmax15":
        power, slope = r * r, r
    else:
        slope = tl.where(r > 0, tl.exp2((p - 1) * tl.log2(tl.maximum(r, TINY))), 0.0)
        power = slope * r
    return power, slope


@triton.jit
def weigh(e, origin, shift, p, KIND: tl.constexpr):
    """Return the weights, and their derivatives by the scores while origin and shift stand still."""
    if KIND == "softmax":
        alpha = tl.exp(e - origin)
        slope = alpha
    elif KIND == "sigmoid":
        alpha = 1 / (1 + tl.exp(shift - e))
        slope = alpha * (1 - alpha)
    elif KIND == "relu":
        alpha = tl.maximum(e, 0.0) * shift
        slope = tl.where(e > 0, shift, 0.0)
    else:
        alpha, slope = powers(tl.maximum((e - origin) * (1 / p) - shift, 0.0), p, KIND)
    return alpha, slope


@triton.jit
def start(top, total, count, p):
    """Return two bounds from the left, joined: the largest x alone, and Jensen's over all count of them."""
    count = tl.maximum(count, 1.0)
    return tl.maximum((total / count - top) / p - tl.exp2(-tl.log2(count) / p), -1.0)


@triton.jit
def newton(power, slope, p, KIND: tl.constexpr):
    """Return the step of Newton's method on the p-norm minus one, from its sums over a row."""
    if KIND == "sparsemax":
        step = power - 1
    elif KIND == "entmax15":
        step = power - tl.sqrt(power)
    else:
        step = power - tl.exp2((1 - 1 / p) * tl.log2(tl.maximum(power, TINY)))
    return tl.where(slope > 0, step / tl.maximum(slope, TINY), 0.0)


@triton.jit
def finite(top):
    """Return zero for the largest score of a row without any key."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def tally(e):
    """Return maximum, sum and number of the scores of every row that may be attended."""
    # e: (rows, keys) -> three numbers per row
    allowed = e > float("-inf")
    total = tl.sum(tl.where(allowed, e, 0.0), 1)
    count = tl.sum(allowed.to(tl.float32), 1)
    return tl.max(e, 1), total, count
