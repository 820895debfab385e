"""The numpy inputs of a job, the same in every process, and how much work it is."""

import math

import numpy as np

HEADS, DIM = 8, 64
FEATURES = HEADS * DIM


def shapes(kind, n):
    """Shapes of the inputs: of attention, of a layer with projections, or of one large product."""
    return {
        "attention": [(1, n, HEADS, DIM)] * 3,
        "layer": [(1, n, FEATURES)],
        "gemm": [(n, n)] * 2,
    }[kind]


def arrays(kind, n):
    """The inputs, one at a time: float32, normal."""
    for seed, shape in enumerate(shapes(kind, n)):
        yield np.random.default_rng(seed).standard_normal(shape, dtype="float32")


def upstream(kind, n):
    """The gradient of the loss by the output, of the shape of an input."""
    return np.random.default_rng(100).standard_normal(shapes(kind, n)[0], dtype="float32")


def weights():
    """Kernels `(features, features)` and biases `(features,)` of query, key, value and output."""
    rng = np.random.default_rng(200)
    found = []
    for _ in range(4):
        kernel = rng.standard_normal((FEATURES, FEATURES), dtype="float32")
        found += [kernel / math.sqrt(FEATURES), rng.standard_normal(FEATURES, dtype="float32") / 10]
    return found


def flops(kind, pattern, n, task):
    """Useful floating point operations: 4 for each allowed pair and feature, none for the masked.

    Training counts as 3.5 forward passes. `None` for a layer, whose projections are work too.
    """
    if kind == "layer":
        return None
    if kind == "gemm":
        return 2 * n**3
    return 4 * HEADS * DIM * pairs(pattern, n) * (3.5 if task == "training" else 1)


def pairs(pattern, n):
    """The number of allowed pairs of `n` positions, without `n * n` memory."""
    from sparse_attn.costs import count_pairs  # no part of the memory that is measured

    return count_pairs(pattern, n, n)
