"""Attention within tiles, and the merge of parts by log-sum-exp."""

import functools

from einops import einsum, rearrange
from keras import ops

from sparse_attn.checks import check_tensor, received
from sparse_attn.masking import LOWEST, MASKED, additive_mask, softmax, wide, zero_masked


def attend(query, key, value, mask=None, bias=None, *, keep=None, rate=0.0, return_lse=False):
    """Scaled dot-product attention of each tile's queries over its keys.

    The backward pass is written out, `ds = p * (dp - delta + dlse)`: of all the
    tensors the size of the scores only the weights are kept for it.

    Args:
        query: `(b, h, t, i, d)`, already scaled and finite.
        key: `(b, h, t, j, d)`, finite.
        value: `(b, h, t, j, e)`, finite.
        mask: bools that broadcast to `(b, h, t, i, j)`, or `None`.
        bias: finite numbers that broadcast so, added to the scores, or `None`.
        keep: bools `(b, h, t, i, j)`, the weights that dropout keeps, or `None`.
        rate: the share of weights that dropout drops.
        return_lse: whether `lse` is wanted.

    Returns:
        `(out, lse)`: `(b, h, t, i, e)`, 0 where no key is allowed, and
        `(b, h, t, i)` in float32 or wider, before dropout, below `MASKED`
        where no key is allowed; `None` unless it was wanted.
    """
    dtype, score_dtype = query.dtype, wide(query.dtype)
    table = None if mask is None else additive_mask(mask, score_dtype)
    extras = {"bias": bias, "table": table, "keep": keep}
    extras = {name: x for name, x in extras.items() if x is not None}

    def drop(weights, keep):
        if keep is None:
            return weights
        return ops.where(keep, weights / (1 - rate), ops.zeros((), weights.dtype))

    @ops.custom_gradient
    def core(query, key, value, *tensors):
        # All tensors are arguments: JAX cannot recompute a function that closes over one.
        given = dict(zip(extras, tensors, strict=True))
        keep = given.get("keep")
        scores = einsum(query, key, "b h t i d, b h t j d -> b h t i j")
        scores = ops.cast(scores, score_dtype)
        for name in ("bias", "table"):  # in one order, or the last bits would vary
            if name in given:
                scores = scores + ops.cast(given[name], score_dtype)
        weights = softmax(scores)
        lse = None
        if return_lse:  # the largest weight is exp(largest score - lse)
            lse = ops.max(scores, axis=-1) - ops.log(ops.max(weights, axis=-1))
        weights = ops.cast(weights, dtype)
        out = einsum(drop(weights, keep), value, "b h t i j, b h t j e -> b h t i e")

        def grad(*inputs, upstream=None):
            # TensorFlow and JAX pass the gradient alone, PyTorch the inputs and `upstream`.
            d_out, d_lse = _unpack(inputs[0] if upstream is None else upstream, return_lse)
            d_out = ops.cast(d_out, dtype)
            d_value = einsum(drop(weights, keep), d_out, "b h t i j, b h t i e -> b h t j e")
            d_weights = einsum(d_out, value, "b h t i e, b h t j e -> b h t i j")
            d_weights = drop(d_weights, keep)
            # delta = sum(p * dp), which is the product of out and its gradient
            delta = ops.sum(ops.cast(out * d_out, score_dtype), axis=-1)
            if d_lse is not None:
                delta = delta - d_lse
            d_scores = weights * (d_weights - ops.cast(delta[..., None], dtype))
            d_query = einsum(d_scores, key, "b h t i j, b h t j d -> b h t i d")
            d_key = einsum(d_scores, query, "b h t i j, b h t i d -> b h t j d")
            d_extras = [
                _sum_to(d_scores, x) if name == "bias" else None for name, x in given.items()
            ]
            return d_query, d_key, d_value, *d_extras

        return _pack(out, lse), grad

    out, lse = _unpack(core(query, key, value, *extras.values()), return_lse)
    out = ops.cast(out, dtype)
    if mask is not None:
        any_key = ops.broadcast_to(ops.any(mask, axis=-1), ops.shape(out)[:-1])
        out = zero_masked(out, any_key)
    return out, lse


def _pack(out, lse):
    """One tensor for both: a custom gradient has one output on every backend."""
    if lse is None:
        return out
    return ops.concatenate([ops.cast(out, lse.dtype), lse[..., None]], axis=-1)


def _unpack(packed, has_lse):
    if not has_lse:
        return packed, None
    out, lse = ops.split(packed, [packed.shape[-1] - 1], axis=-1)
    return out, rearrange(lse, "... 1 -> ...")


def _sum_to(x, like):
    """Sum `x` over the axes along which `like` was broadcast."""
    axes = tuple(axis for axis in range(len(x.shape)) if like.shape[axis] == 1)
    return ops.cast(ops.sum(x, axis=axes, keepdims=True) if axes else x, like.dtype)


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
        out, lse = (ops.convert_to_tensor(x) for x in part)
        check_tensor(f"parts[{number}][0]", out, "float", shape)
        shape = tuple(out.shape)
        check_tensor(f"parts[{number}][1]", lse, "float", shape[:3])
        lse = ops.maximum(ops.cast(lse, wide(lse.dtype)), LOWEST)
        checked.append((zero_masked(out, lse > MASKED), lse))
    out, lse = merge(checked)
    return out, public_lse(lse)


def merge(parts):
    """`merge_attention` where every `lse` is finite, as inside of the package."""
    if len(parts) == 1:
        return parts[0]
    highest = ops.stop_gradient(functools.reduce(ops.maximum, [lse for _, lse in parts]))
    weights = [ops.exp(lse - highest) for _, lse in parts]
    total = sum(weights[1:], weights[0])
    out = sum(
        ops.cast((weight / total)[..., None], out.dtype) * out
        for weight, (out, _) in zip(weights, parts, strict=True)
    )
    return out, highest + ops.log(total)


def public_lse(lse):
    """`-inf` for queries with no key, which inside of the package is a finite number."""
    return ops.where(lse < MASKED, ops.full((), -float("inf"), lse.dtype), lse)
