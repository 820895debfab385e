"""Attention within tiles, and the merge of parts by log-sum-exp."""

import functools

import keras
from keras import ops

from sparse_attn.checks import check_tensor, received
from sparse_attn.masking import (
    MASKED,
    at_least_lowest,
    is_not_masked,
    larger,
    wide,
    zero_masked,
)
from sparse_attn.tensors import to_tensor
from sparse_attn.tracing import custom_gradient, product


def score(query, key, dtype):
    """The scores `(b, h, t, i, j)` of each tile's queries with its keys.

    Args:
        query: `(b, h, t, i, d)`, already scaled and finite.
        key: `(b, h, t, j, d)`, finite.
        dtype: that of the scores.
    """
    return ops.cast(product(query, key, "b h t i d, b h t j d -> b h t i j"), dtype)


def log_sum_exp(scores, weights):
    """`(b, h, t, i)` of the scores and their softmax.

    The largest weight is `exp(largest score - lse)`. XLA may work out a score anew, a bit other
    than the largest of them: its gradient, shared out to all that equal it, would be 0 / 0.
    """

    def found(scores, weights):
        def gradient(upstream):
            by_score = ops.cast(weights * ops.expand_dims(upstream, -1), scores.dtype)
            return by_score, ops.zeros_like(weights)

        return ops.max(scores, axis=-1) - ops.log(ops.max(weights, axis=-1)), gradient

    if keras.backend.backend() == "torch":  # which has no XLA, and exports no such gradient
        return found(scores, weights)[0]
    return custom_gradient(found)(scores, weights)


def average(weights, value):
    """`(b, h, t, i, e)`: the values `(b, h, t, j, e)` under weights of their dtype."""
    return product(weights, value, "b h t i j, b h t j e -> b h t i e")


def weight_gradients(value, weights, kept, d_out, delta, d_lse=None):
    """The backward pass of a tile, down to its scores: `ds = p * (dp - delta + dlse)`.

    Args:
        value, weights: as in the forward pass.
        kept: a function from weights to those that dropout keeps, scaled up.
        d_out: `(b, h, t, i, e)`, the gradient of the output.
        delta: `(b, h, t, i, 1)`: `sum(out * d_out)`, which is the sum of `p * dp` over the keys.
        d_lse: `(b, h, t, i, 1)`, the gradient of the log-sum-exp, or `None`.

    Returns:
        `(d_value, d_scores)`.
    """
    d_value = product(kept(weights), d_out, "b h t i j, b h t i e -> b h t j e")
    d_weights = kept(product(d_out, value, "b h t i e, b h t j e -> b h t i j"))
    dtype = weights.dtype
    if delta.dtype == dtype:
        return d_value, weights * (d_weights - (delta if d_lse is None else delta - d_lse))
    # In half precision `delta` is rounded, once more than `out` was. What it is off by is the sum
    # of what comes of it, which would be 0: without it the errors of all keys of a query add up.
    d_weights = d_weights - ops.cast(delta, dtype)
    rest = ops.sum(weights * d_weights, axis=-1, keepdims=True)
    rest = rest if d_lse is None else rest - ops.cast(d_lse, rest.dtype)
    return d_value, weights * (d_weights - ops.cast(rest, dtype))


def score_gradients(query, key, d_scores):
    """The rest of it: `(d_query, d_key)`."""
    d_query = product(d_scores, key, "b h t i j, b h t j d -> b h t i d")
    d_key = product(d_scores, query, "b h t i j, b h t i d -> b h t j d")
    return d_query, d_key


def merge_attention(parts):
    """Join attention over disjoint sets of keys into attention over their union, exactly.

    `lse = log(sum_p exp(lse_p))` and `out = sum_p exp(lse_p - lse) out_p`: the
    same as one softmax over all the keys.

    Args:
        parts: a list of pairs `(out, lse)`, of shapes `(b, n, h, e)` and
            `(b, n, h)`. No key may be in more than one of them. A query that
            has no keys in a part has `lse` `-inf` there, and its `out` does
            not matter.

    Returns:
        The pair `(out, lse)` for the union of the keys; `lse` in float32 or
        wider. A query with no keys in any part has `out` 0 and `lse` `-inf`.

    Raises:
        TypeError: if `parts` does not hold pairs of float tensors.
        ValueError: if `parts` is empty, or the shapes do not go together.

    References:
        - [FlashAttention-2, Dao, 2023](https://arxiv.org/abs/2307.08691)
    """
    requirement = "a non-empty list of pairs (out, lse)"
    if not isinstance(parts, (list, tuple)):
        raise TypeError(received("parts", requirement, parts))
    if not parts:
        raise ValueError(received("parts", requirement, parts))
    checked, shape = [], (None,) * 4
    for number, part in enumerate(parts):
        if not isinstance(part, (list, tuple)) or len(part) != 2:
            raise TypeError(received(f"parts[{number}]", "a pair (out, lse)", part))
        out, lse = (to_tensor(f"parts[{number}][{place}]", x) for place, x in enumerate(part))
        check_tensor(f"parts[{number}][0]", out, "float", shape)
        shape = tuple(out.shape)
        check_tensor(f"parts[{number}][1]", lse, "float", shape[:3])
        lse = at_least_lowest(ops.cast(lse, wide(lse.dtype)))
        checked.append((zero_masked(out, is_not_masked(lse)), lse))
    out, lse = merge(checked)
    return out, public_lse(lse)


def merge(parts):
    """`merge_attention` where every `lse` is finite, as inside of the package."""
    if len(parts) == 1:
        return parts[0]
    highest = ops.stop_gradient(functools.reduce(larger, [lse for _, lse in parts]))
    weights = [ops.exp(lse - highest) for _, lse in parts]
    total = sum(weights[1:], weights[0])
    # In float32 or wider: what is rounded here would not cancel in the gradients.
    outs = [
        ops.expand_dims(weight / total, -1) * ops.cast(out, total.dtype)
        for weight, (out, _) in zip(weights, parts, strict=True)
    ]
    return ops.cast(sum(outs[1:], outs[0]), parts[0][0].dtype), highest + ops.log(total)


def join_apart(parts):
    """`merge` where a query has keys in one part at most, and 0 in others; `lse` may be `None`."""
    outs, lses = zip(*parts, strict=True)
    lse = None if None in lses else functools.reduce(larger, lses)
    return sum(outs[1:], outs[0]), lse


def public_lse(lse):
    """`-inf` for queries with no key, which inside of the package is a finite number."""
    return ops.where(lse < MASKED, ops.full((), -float("inf"), lse.dtype), lse)
