"""The normalizers as functions of single scores, for use in a kernel.

KERNEL is the name that a normalizer gives as its ``kernel``. A row has two numbers, origin and
shift, that make its weights functions of single scores: alpha = exp(e - origin) for softmax,
sigmoid(e - shift), max(e, 0) shift for relu, and, with x = (e - origin) / p, [x - shift]+ ^ p for
the entmax family.
"""

import triton
import triton.language as tl

TINY = tl.constexpr(1e-37)


@triton.jit
def exponent(problem, h, KERNEL: tl.constexpr):
    """Return p = 1 / (alpha - 1)."""
    p = 1.0
    if KERNEL == "entmax15":
        p = 2.0
    if KERNEL == "entmax":
        p = tl.load(problem.p + h)
    return p


@triton.jit
def powers(r, p, KERNEL: tl.constexpr):
    """Return r^p and r^(p - 1) of numbers that are not negative; both are zero at zero."""
    if KERNEL == "sparsemax":
        power = r
        slope = (r > 0).to(tl.float32)
    elif KERNEL == "entmax15":
        power = r * r
        slope = r
    else:
        # r^(p - 1) by exp2 and log2, the fast instructions of a GPU
        log_r = tl.log2(tl.maximum(r, TINY))
        slope = tl.where(r > 0, tl.exp2((p - 1) * log_r), 0.0)
        power = slope * r
    return power, slope


@triton.jit
def weigh(e, origin, shift, p, KERNEL: tl.constexpr):
    """Return the weights, and their derivatives by the scores at constant origin and shift."""
    if KERNEL == "softmax":
        alpha = tl.exp(e - origin)
        slope = alpha
    elif KERNEL == "sigmoid":
        alpha = 1 / (1 + tl.exp(shift - e))
        # d sigmoid(x) / dx
        slope = alpha * (1 - alpha)
    elif KERNEL == "relu":
        alpha = tl.maximum(e, 0.0) * shift
        slope = tl.where(e > 0, shift, 0.0)
    else:
        r = tl.maximum((e - origin) * (1 / p) - shift, 0.0)
        alpha, slope = powers(r, p, KERNEL)
    return alpha, slope


@triton.jit
def start(top, total, count, p):
    """Return where Newton's method starts: the larger of two lower bounds of the threshold.

    One is the largest x minus 1, the other Jensen's: mean x - count^(-1/p).
    """
    # x is measured from the largest score: its maximum is 0
    count = tl.maximum(count, 1.0)
    mean = (total / count - top) / p
    return tl.maximum(mean - tl.exp2(-tl.log2(count) / p), -1.0)


@triton.jit
def newton(power, slope, p, KERNEL: tl.constexpr):
    """Return the step of Newton's method on the p-norm minus one, from its sums over a row."""
    if KERNEL == "sparsemax":
        step = power - 1
    elif KERNEL == "entmax15":
        step = power - tl.sqrt(power)
    else:
        log_power = tl.log2(tl.maximum(power, TINY))
        step = power - tl.exp2((1 - 1 / p) * log_power)
    # A row without any key has no slope, and stays.
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
