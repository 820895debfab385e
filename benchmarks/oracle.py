"""What is right, in float64: a few rows of a long sequence, or all of a short one.

Nothing here is of size `n * n`: the gradient of a key needs only the queries that attend to it.
"""

import numpy as np

from benchmarks import inputs
from sparse_attn import parse_pattern
from sparse_attn.reference import dense_attention

SHORT = 512  # up to here, everything is compared
MOST_QUERIES = 4096  # a key that more queries attend to is compared at a short length only
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}
NAMES = ("out", "gradient by query", "gradient by key", "gradient by value")
LAYER_NAMES = ("out", "gradient by input")


def check(job, kind, outputs):
    """Compare a contender's outputs with the oracle.

    Args:
        job: a `Job`.
        kind: "attention", "layer" or "gemm".
        outputs: arrays `(n, features)`: `out`, and in training the gradients of the inputs. Those
            of a layer's weights are sums over all positions and are not compared.

    Returns:
        A dict: for each output the largest error of a row, in units of a typical row.

    Raises:
        ArithmeticError: if an error exceeds the tolerance of the dtype.
    """
    errors = {}
    names = LAYER_NAMES if kind == "layer" else NAMES
    for name, found, (at, rows) in zip(names, outputs, expected(job, kind), strict=False):
        if len(at) == 0:
            continue
        norms = np.linalg.norm(rows, axis=-1)
        typical = max(float(np.sqrt(np.mean(norms**2))), 1e-6)
        distances = np.linalg.norm(found[at] - rows, axis=-1)
        errors[name] = float(np.max(distances)) / typical
        if not errors[name] <= TOLERANCE[job.dtype]:  # NaN too
            raise ArithmeticError(
                f"{name} of {job.contender} must be within {TOLERANCE[job.dtype]:g} of the oracle. "
                f"Received: an error of {errors[name]:.2g} in {job}"
            )
    return errors


def expected(job, kind):
    """Pairs of positions and the rows `(positions, features)` there, one for each output."""
    arrays = list(inputs.arrays(kind, job.n))
    if kind == "gemm":
        at = _sample(job.n, 16)
        return [(at, arrays[0][at].astype("float64") @ arrays[1])]
    training = job.task == "training"
    grad = inputs.upstream(kind, job.n) if training else np.broadcast_to(0.0, arrays[0].shape)
    pattern = parse_pattern(job.expression)
    if kind == "attention":
        found = _attention(pattern, *arrays, grad, training)
    else:
        w = [x.astype("float64") for x in inputs.weights()]
        heads = (1, job.n, inputs.HEADS, inputs.DIM)
        q, k, v = ((arrays[0] @ w[i] + w[i + 1]).reshape(heads) for i in (0, 2, 4))
        found = _attention(pattern, q, k, v, (grad @ w[6].T).reshape(heads), training)
        (rows, out), (_, by_query), (keys, by_key), (_, by_value) = found
        by_query = by_query[np.searchsorted(rows, keys)]
        by_input = by_query @ w[0].T + by_key @ w[2].T + by_value @ w[4].T
        found = [(rows, out @ w[6] + w[7]), (keys, by_input)]
    return found if training else found[:1]


def _attention(pattern, q, k, v, grad, training):
    """`expected` of attention on `(1, n, h, d)`: out and the gradients of q, k and v."""
    n = q.shape[1]
    if n <= SHORT:
        out, _, gradients = dense_attention(q, k, v, pattern, out_grad=grad)
        return [(np.arange(n), x.reshape(n, -1)) for x in (out, *gradients.values())]
    queries, keys = _sample(n, 16), _sample(n, 3)
    asking = np.broadcast_to(pattern(np.arange(n)[:, None], keys[None]), (n, len(keys))).any(1)
    if not training or asking.sum() > MOST_QUERIES:
        keys = keys[:0]
    else:
        queries = np.union1d(queries, np.union1d(keys, np.flatnonzero(asking)))
    rows, columns = attention_rows(pattern, q[0], k[0], v[0], grad[0], queries, keys)
    return [*[(queries, x) for x in rows], *[(keys, x) for x in columns]]


def _sample(n, count):
    """Both ends, and some in between, in order."""
    return np.union1d([0, n - 1], np.random.default_rng(n).integers(n, size=count - 2))


def attention_rows(pattern, q, k, v, grad, queries, keys):
    """Attention and its gradients for some queries and keys.

    Args:
        pattern: a `Pattern`.
        q, k, v, grad: `(n, h, d)`; `grad` is the gradient of a loss by the output.
        queries: `(r,)` positions, with at least those that attend to `keys`.
        keys: `(c,)` positions.

    Returns:
        `(out, by_query), (by_key, by_value)`: `(r, h * d)` twice and `(c, h * d)` twice.
    """
    n, h, d = q.shape
    rows, columns = np.empty((2, len(queries), h, d)), np.zeros((2, len(keys), h, d))
    for start in range(0, len(queries), 128):
        part = queries[start : start + 128]
        allowed = pattern(part[:, None], np.arange(n)[None])
        allowed = np.broadcast_to(allowed, (len(part), n))
        near = np.union1d(np.flatnonzero(allowed.any(0)), keys)
        dense = _dense(q[part], k[near], v[near], grad[part], allowed[:, near])
        rows[:, start : start + 128] = dense[:2]
        columns += np.stack(dense[2:])[:, np.searchsorted(near, keys)]
    return rows.reshape(2, -1, h * d), columns.reshape(2, -1, h * d)


def _dense(q, k, v, grad, allowed):
    """Dense attention of `(i, h, d)` over `(j, h, d)`: out and the gradients by q, k and v."""
    q, k, v, grad = (np.swapaxes(x, 0, 1).astype("float64") for x in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    scores = np.where(allowed, scale * (q @ k.mT), -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(axis=-1, keepdims=True)
    weights /= np.where(total > 0, total, 1)
    by_weight = grad @ v.mT
    mean = (weights * by_weight).sum(axis=-1, keepdims=True)
    by_score = scale * weights * (by_weight - mean)
    found = weights @ v, by_score @ k, by_score.mT @ q, weights.mT @ grad
    return [np.swapaxes(x, 0, 1) for x in found]
