"""What is right: dense attention and its gradients in float64, for one case.

With a `dtype` it rounds where a plain dense attention in that dtype would, with products that
are summed up in float32 or wider and a softmax in float32: how far that is off is the measure of
how far the package may be.
"""

import numpy as np

from tests.campaign.patterns import allowed


def attention(case, given, dtype="float64"):
    """Output, log-sum-exp and gradients of `sum(out * d_out) + sum(lse * d_lse)`, by name.

    And by the name of a gradient that is a sum over pairs, the norm of what is summed up.
    """
    wide = "float64" if dtype == "float64" else "float32"

    def product(formula, *factors, to=dtype):
        return np.einsum(formula, *factors).astype(to).astype("float64")

    def rounded(x):
        return x.astype(wide).astype("float64")

    q, k, v, d_out, d_lse, table = (
        None if given.get(name) is None else np.asarray(given[name], "float64")
        for name in ("query", "key", "value", "d_out", "d_lse", "table")
    )
    repeats = case.heads // case.key_heads
    may = pairs(case, given)
    seen = np.moveaxis(may.any(axis=2), 1, 2)  # (b, m, h): keys that some query may see
    k, v = (np.where(seen[..., None], np.repeat(x, repeats, axis=2), 0) for x in (k, v))
    if case.query_mask:
        q = np.where(given["query_mask"][:, :, None, None], q, 0)

    scale = case.dim**-0.5 if case.scale is None else case.scale
    # As Keras' layers do: before the product, by a scale that is rounded as well.
    scaled = (q * float(np.asarray(scale).astype(dtype))).astype(dtype).astype("float64")
    scores = product("bihd,bjhd->bhij", scaled, k)
    slope, read = np.full(may.shape, float(scale)), None
    q_pos, k_pos = positions(case, given)
    with np.errstate(all="ignore"):  # forbidden pairs may be anything
        for mod in case.mods:
            head = np.arange(case.heads)[:, None, None]
            scores, by_score, by_entry = mod.values(scores, q_pos, k_pos, head, table)
            may = may & ~np.isneginf(scores)
            slope = by_score * slope
            read = read and (read[0], read[1] * by_score)
            read = by_entry or read
        if case.bias:
            scores = scores + pair_axes(given["bias"]).astype("float64")
        scores = rounded(np.where(may, scores, -np.inf))
    highest = np.max(scores, axis=-1, keepdims=True, initial=-1e30)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    weights = rounded(weights / np.where(total > 0, total, 1))
    with np.errstate(divide="ignore"):
        lse = rounded(highest + np.log(total))[..., 0]
    cast = weights.astype(dtype).astype("float64")
    found = {"out": product("bhij,bjhe->bihe", cast, v), "lse": np.moveaxis(lse, 1, 2)}

    by_weight = product("bihe,bjhe->bhij", d_out, v)
    upstream = np.zeros(lse.shape) if d_lse is None else np.moveaxis(d_lse, 1, 2)
    upstream = np.where(np.isfinite(lse), upstream, 0)[..., None]
    mean = (weights * by_weight).sum(axis=-1, keepdims=True)
    by_score = rounded(weights * (by_weight - mean + upstream))
    by_product = (np.where(may, slope, 0) * by_score).astype(dtype).astype("float64")
    found["query"] = product("bhij,bjhd->bihd", by_product, k)
    if case.query_mask:
        found["query"] *= given["query_mask"][:, :, None, None]
    found["key"] = _per_key_head(product("bhij,bihd->bjhd", by_product, q), repeats)
    found["value"] = _per_key_head(product("bhij,bihe->bjhe", cast, d_out), repeats)
    norms = {}
    if case.bias:
        found["bias"] = _sum_to(by_score, given["bias"])
        norms["bias"] = np.sqrt(_sum_to(by_score**2, given["bias"]))
    if read is not None:
        rows, by_entry = (np.broadcast_to(x, may.shape)[may] for x in read)
        terms = by_score[may] * by_entry
        found["table"] = np.zeros(len(table), wide)
        np.add.at(found["table"], rows, terms.astype(wide))  # one after another, as frameworks do
        norms["table"] = np.sqrt(np.bincount(rows, terms**2, len(table)))
    return found, norms


def positions(case, given):
    """Of queries `(n, 1)` and of keys `(1, m)`, int64."""
    q_pos = np.arange(case.n)
    if case.positions:
        start = np.asarray(given["positions"], "int64")
        q_pos = start if start.ndim else start + q_pos
    return q_pos[:, None], np.arange(case.m)[None, :]


def pairs(case, given):
    """Which pairs the pattern and the masks allow: `(b, h, n, m)` bools."""
    q_pos, k_pos = positions(case, given)
    own = getattr(case.pattern, "patterns", [case.pattern])
    may = np.stack([allowed(x, q_pos, k_pos) for x in own])
    may = np.repeat(may, case.heads // len(own), axis=0)[None]
    may = np.repeat(may, case.batch, axis=0)
    return may & masks(case, given)


def masks(case, given):
    """Which pairs the masks alone allow."""
    may = np.ones((case.batch, 1, case.n, case.m), bool)
    if case.query_mask:
        may = may & given["query_mask"][:, None, :, None]
    if case.key_mask:
        may = may & given["key_mask"][:, None, None, :]
    if case.attention_mask:
        may = may & pair_axes(given["attention_mask"])
    if case.bias:
        may = may & (pair_axes(given["bias"]).astype("float64") > -1e29)
    if case.segments:
        of_queries = given["segments"]
        of_keys = given.get("key_segments", of_queries)
        may = may & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
    return may


def pair_axes(x):
    """`(n, m)`, `(b, n, m)` or `(b, h, n, m)` as the last."""
    return x[:, None] if x.ndim == 3 else x[(None,) * (4 - x.ndim)]


def _per_key_head(x, repeats):
    b, m, h, d = x.shape
    return x.reshape(b, m, h // repeats, repeats, d).sum(axis=3)


def _sum_to(x, like):
    axes = tuple(axis for axis, size in enumerate(pair_axes(like).shape) if size == 1)
    return x.sum(axis=axes, keepdims=True).reshape(like.shape)
