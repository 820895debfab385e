"""The oracle: dense attention in plain numpy and float64, `n x m` on purpose.

It shares nothing with the fast paths but the predicate, and says what is
right: values by definition, gradients by the textbook formulas.
"""

import numpy as np


def dense_attention(
    query,
    key,
    value,
    pattern,
    *,
    query_mask=None,
    key_mask=None,
    segment_ids=None,
    attention_mask=None,
    bias=None,
    score_mod=None,
    scale=None,
    query_positions=None,
    out_grad=None,
    lse_grad=None,
):
    """Scaled dot-product attention over the pairs that a pattern allows.

    `out[i] = sum_j softmax_j(scale * q[i] . k[j] + bias[i, j]) v[j]`, where `j`
    runs over the allowed keys; 0 where there are none.

    Args:
        query: `(b, n, h, d)` array.
        key: `(b, m, g, d)` array; each of its heads serves `h / g` heads of queries.
        value: `(b, m, g, e)` array.
        pattern: a `Pattern`, a `PerHead`, or any predicate `(q_pos, k_pos) -> bool`.
        query_mask: `(b, n)` bools, True = valid, or `None`.
        key_mask: `(b, m)` bools, True = valid, or `None`.
        segment_ids: `(b, n)` ints, or a pair of them for queries and keys, or `None`.
        attention_mask: bools that broadcast to `(b, h, n, m)`, or `(b, n, m)`, or `None`.
        bias: numbers of the same shapes, added to the scaled scores, or `None`; less
            than -1e29, such as `-inf`, forbids a pair.
        score_mod: a numpy function `(scores, q_pos, k_pos, head)` that is applied to
            the scaled scores of the allowed pairs, each by itself, before the bias; or
            `None`. It gets and returns arrays of one axis. Its derivative is taken
            from central differences.
        scale: a number, `d ** -0.5` by default.
        query_positions: an int, the first query's position, or `(n,)` ints.
        out_grad: `(b, n, h, e)`, the gradient of a loss by `out`, or `None`.
        lse_grad: `(b, n, h)`, the gradient of a loss by `lse`, or `None`.

    Returns:
        `(out, lse)`, float64: `(b, n, h, e)` and `(b, n, h)`, the natural
        logarithm of the sum of exponentials, `-inf` where no key is allowed.
        If a gradient was given, `(out, lse, gradients)`, a dict of the loss's
        gradients by `query`, `key`, `value` and, if there is one, `bias`.
    """
    q, k, v = (np.asarray(x, "float64") for x in (query, key, value))
    b, n, h, d = q.shape
    m = k.shape[1]
    scale = d**-0.5 if scale is None else scale
    repeats = h // k.shape[2]
    k, v = np.repeat(k, repeats, axis=2), np.repeat(v, repeats, axis=2)

    q_pos = np.arange(n)
    if query_positions is not None:
        first = np.asarray(query_positions)
        q_pos = first if first.ndim else first + q_pos
    patterns = getattr(pattern, "patterns", [pattern])  # those of a `PerHead`
    allowed = [
        np.broadcast_to(np.asarray(each(q_pos[:, None], np.arange(m)[None, :])), (n, m))
        for each in patterns
        for _ in range(h // len(patterns))
    ]
    allowed = np.broadcast_to(np.stack(allowed), (b, h, n, m))
    if attention_mask is not None:
        allowed = allowed & _heads(attention_mask)
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, (tuple, list)) else (segment_ids,) * 2
        of_queries, of_keys = map(np.asarray, pair)
        allowed = allowed & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
    if bias is not None:
        allowed = allowed & ~(_heads(bias) < -1e29)
    valid_query = np.ones((b, n), bool) if query_mask is None else np.asarray(query_mask)
    valid_key = np.ones((b, m), bool) if key_mask is None else np.asarray(key_mask)
    allowed = allowed & valid_query[:, None, :, None] & valid_key[:, None, None, :]
    q = np.where(valid_query[:, :, None, None], q, 0)
    seen = np.moveaxis(allowed.any(axis=2), 1, 2)[..., None]  # what others hold must not matter
    k, v = np.where(seen, k, 0), np.where(seen, v, 0)

    scores = scale * np.einsum("bihd,bjhd->bhij", q, k)
    slope = 1.0
    if score_mod is not None:
        where = (q_pos[:, None], np.arange(m), np.arange(h)[:, None, None])
        scores, slope = _modify(score_mod, scores, where, allowed)
        allowed = allowed & ~np.isneginf(scores)
    if bias is not None:
        scores = scores + _heads(bias)
    scores = np.where(allowed, scores, -np.inf)
    highest = np.max(scores, axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, highest + np.log(total), -np.inf)[..., 0]
    out = np.einsum("bhij,bjhe->bihe", weights, v)
    lse = np.moveaxis(lse, 1, 2)
    if out_grad is None and lse_grad is None:
        return out, lse

    g = np.zeros_like(out) if out_grad is None else np.asarray(out_grad, "float64")
    l_grad = np.zeros_like(lse) if lse_grad is None else np.asarray(lse_grad, "float64")
    by_weight = np.einsum("bihe,bjhe->bhij", g, v)
    mean = (weights * by_weight).sum(axis=-1, keepdims=True)
    by_score = weights * (by_weight - mean + np.moveaxis(l_grad, 1, 2)[..., None])
    by_product = scale * slope * by_score
    gradients = {
        "query": np.einsum("bhij,bjhd->bihd", by_product, k),
        "key": _sum_heads(np.einsum("bhij,bihd->bjhd", by_product, q), repeats),
        "value": _sum_heads(np.einsum("bhij,bihe->bjhe", weights, g), repeats),
    }
    gradients["query"] *= valid_query[:, :, None, None]
    gradients["key"] *= valid_key[:, :, None, None]
    gradients["value"] *= valid_key[:, :, None, None]
    if bias is not None:
        full = _heads(bias)
        axes = tuple(axis for axis in range(4) if full.shape[axis] == 1)
        gradients["bias"] = by_score.sum(axis=axes, keepdims=True).reshape(np.shape(bias))
    return out, lse, gradients


def _modify(score_mod, scores, where, allowed):
    """`score_mod` at the allowed pairs, and its derivative, 0 at others and where it is `-inf`."""
    where = [np.broadcast_to(x, scores.shape)[allowed] for x in where]
    step, slope = 1e-5, np.zeros_like(scores)
    low, found, high = (score_mod(scores[allowed] + x, *where) for x in (-step, 0, step))
    kept = np.isfinite(found)
    scores, slope[allowed] = scores.copy(), np.where(kept, high, 0) - np.where(kept, low, 0)
    scores[allowed] = found
    return scores, slope / (2 * step)


def _sum_heads(x, repeats):
    """The gradients by repeated heads, `(b, m, h, d)`, added up: `(b, m, g, d)`."""
    b, m, h, d = x.shape
    return x.reshape(b, m, h // repeats, repeats, d).sum(axis=3)


def _heads(x):
    """`(n, m)`, `(b, n, m)` or `(b, h, n, m)` as the last."""
    x = np.asarray(x)
    return x[:, None] if x.ndim == 3 else np.broadcast_to(x, (1,) * (4 - x.ndim) + x.shape)
