"""Sparse attention as a function: plan, split, attend, join, merge."""

import itertools

import keras
import numpy as np
from einops import einsum, rearrange
from keras import ops

from sparse_attn.attend import attend, merge, public_lse
from sparse_attn.checks import (
    check_bool,
    check_int,
    check_number,
    check_rate,
    check_tensor,
    received,
)
from sparse_attn.masking import (
    LOWEST,
    MASKED,
    check_mask,
    masked_softmax,
    wide,
    zero_masked,
)
from sparse_attn.patterns import Band, check_pattern
from sparse_attn.plan import Part, layout, plan, plan_at


def sparse_attention(
    query,
    key,
    value,
    pattern,
    *,
    query_mask=None,
    key_mask=None,
    attention_mask=None,
    bias=None,
    scale=None,
    query_positions=None,
    dropout=0.0,
    seed=None,
    return_lse=False,
):
    """Scaled dot-product attention over the pairs that a pattern allows.

    `out[i] = sum_j softmax_j(scale * query[i] . key[j] + bias[i, j]) value[j]`,
    where `j` runs over the keys that the pattern and the masks allow. The
    result is exact; time and memory follow the pattern. Query `i` and key `i`
    share a position.

    Args:
        query: `(b, n, h, d)` float tensor or array.
        key: `(b, m, h, d)`, of the same dtype.
        value: `(b, m, h, e)`, of the same dtype.
        pattern: a `Pattern`: which pairs of positions may attend.
        query_mask: `(b, n)` bools, True = valid. An invalid query gets `out` 0
            and `lse` `-inf`, and what it holds does not matter.
        key_mask: `(b, m)` bools, True = valid. What an invalid key or its
            value holds does not matter, be it NaN.
        attention_mask: `(n, m)`, `(b|1, n, m)` or `(b|1, h|1, n, m)` bools,
            True = may be attended. It is of size n * m by nature; prefer a
            pattern.
        bias: numbers of the same shapes, added to the scaled scores; less than
            -1e29, such as `-inf`, forbids a pair. Likewise of size n * m.
        scale: a number, `d ** -0.5` by default.
        query_positions: where the queries are not at `0, 1, 2, ...`: an int,
            the position of the first of them, or `(n,)` non-negative ints.
            For a decoder, whose few queries stand at the end of many keys.
            The keys of each query are gathered, or scored densely where that
            moves less memory.
        dropout: the share of weights to drop, in [0, 1).
        seed: an int or a `keras.random.SeedGenerator`, for dropout.
        return_lse: whether to return the log-sum-exp as well.

    Returns:
        `out`, of shape `(b, n, h, e)` and the dtype of `query`; a query with
        no key that it may attend gets 0. With `return_lse`, the pair
        `out, lse`: `lse` is `(b, n, h)`, the natural logarithm of the sum of
        the exponentials of the scores, before dropout, in float32 or wider,
        and `-inf` for a query with no key.

    Raises:
        TypeError: for a pattern, mask or tensor of the wrong type or dtype.
        ValueError: for shapes that do not go together, or lengths that the
            pattern cannot relate.

    Example:

    >>> import numpy as np
    >>> from sparse_attn import Causal, Local, sparse_attention
    >>> x = np.ones((1, 1000, 8, 64), "float32")
    >>> tuple(sparse_attention(x, x, x, Causal() & Local(100)).shape)
    (1, 1000, 8, 64)
    """
    query, key, value, n, m = _check_tensors(query, key, value)
    masks = _check_masks(query, key, query_mask, key_mask, attention_mask, bias)
    query_mask, key_mask, attention_mask, bias = masks
    check_bool("return_lse", return_lse)
    dropout = check_rate("dropout", dropout)
    if not (seed is None or isinstance(seed, keras.random.SeedGenerator)):
        seed = check_int("seed", seed)
    # Padding may hold anything: 0 * NaN would reach valid outputs and gradients.
    query = zero_masked(query, query_mask)
    key, value = zero_masked(key, key_mask), zero_masked(value, key_mask)
    query = query * _scale(query, scale)

    check_pattern("pattern", pattern)
    known = [size if isinstance(size, int) else None for size in (n, m)]
    if 0 in known:  # nothing asks, or nothing answers
        parts, q_pos = (), ops.arange(n, dtype="int32")
    elif query_positions is None:
        parts, q_pos = plan(pattern, *known).parts, ops.arange(n, dtype="int32")
    else:
        q_pos = _check_positions(query_positions, known[0], n)
        parts = plan_at(pattern, q_pos, n, m, query.shape[-1]).parts

    # No two tiles may drop alike: a number is counted on, a generator draws anew.
    seeds = itertools.count(seed) if isinstance(seed, int) else itertools.repeat(seed)

    need_lse = return_lse or len(parts) > 1
    found = []
    for part in parts:
        tiles = _Tiles(part, q_pos, m, key_mask, attention_mask, bias)
        found.append(tiles.attend(query, key, value, n, dropout, seeds, need_lse))
    if not found:  # the pattern allows nothing at these lengths
        shape = ops.shape(query)[:3]
        out = ops.zeros((*shape, value.shape[-1]), query.dtype)
        found = [(out, ops.full(shape, LOWEST, wide(query.dtype)))]
    out, lse = merge(found)

    out = zero_masked(out, query_mask)
    if not return_lse:
        return out
    if query_mask is not None:
        lse = ops.where(query_mask[..., None], lse, ops.full((), LOWEST, lse.dtype))
    return out, public_lse(lse)


class _Tiles:
    """The tiles of one part: where they lie, and what is masked in them."""

    def __init__(self, part, q_pos, m, key_mask=None, attention_mask=None, bias=None):
        n = ops.shape(q_pos)[0]
        self.layout = layout = part.layout.at(n, m)
        k_pos = ops.arange(m, dtype="int32")
        # Positions go through the same cut as the vectors they belong to.
        self.q_pos = [
            rearrange(x, "1 1 t i 1 -> t i 1") for x in layout.split_queries(_as_rows(q_pos))
        ]
        self.k_pos = [
            rearrange(x, "1 1 t j 1 -> t 1 j") for x in layout.split_keys(_as_rows(k_pos), n)
        ]
        positions = zip(self.q_pos, self.k_pos, strict=True)
        self.masks = [self._pattern_mask(part.pattern, *pos) for pos in positions]
        if key_mask is not None or part.layout.pads_keys:
            valid = _as_rows(k_pos) >= 0 if key_mask is None else key_mask[:, :, None, None]
            valid = layout.split_keys(valid, n)
            self._restrict([rearrange(x, "b 1 t j 1 -> b 1 t 1 j") for x in valid])
        self.bias = [None] * len(self.masks)
        if attention_mask is not None:
            self._restrict(self._at_pairs(attention_mask))
        if bias is not None:
            tiles = self._at_pairs(bias)
            self._restrict([x > MASKED for x in tiles])
            self.bias = [ops.maximum(x, LOWEST) for x in tiles]

    @staticmethod
    def _pattern_mask(pattern, q_pos, k_pos):
        return None if pattern == Band() else _evaluate(pattern, q_pos, k_pos)[None, None]

    def _restrict(self, masks):
        self.masks = [
            mask if known is None else known & mask
            for known, mask in zip(self.masks, masks, strict=True)
        ]

    def _at_pairs(self, x):
        """A table `(b|1, h|1, n, m)` at each tile's pairs of positions."""
        rows = self.layout.split_queries(rearrange(x, "b h n m -> b n h m"))
        return [
            ops.take_along_axis(tile, k_pos[None, None], axis=-1)
            for tile, k_pos in zip(rows, self.k_pos, strict=True)
        ]

    def attend(self, query, key, value, n, dropout, seeds, return_lse):
        """`(out, lse)` of shapes `(b, n, h, e)` and `(b, n, h)`."""
        outs, lses = [], []
        for q, k, v, mask, bias in zip(
            self.layout.split_queries(query),
            self.layout.split_keys(key, n),
            self.layout.split_keys(value, n),
            self.masks,
            self.bias,
            strict=True,
        ):
            keep = None
            if dropout:
                shape = (*ops.shape(q)[:4], ops.shape(k)[3])
                keep = keras.random.uniform(shape, dtype="float32", seed=next(seeds)) >= dropout
            out, lse = attend(q, k, v, mask, bias, keep=keep, rate=dropout, return_lse=return_lse)
            outs.append(out)
            lses.append(lse)
        out = self.layout.join(outs, n)
        if not return_lse:
            return out, None
        lse = self.layout.join([lse[..., None] for lse in lses], n)
        return out, rearrange(lse, "b n h 1 -> b n h")


def _as_rows(positions):
    return rearrange(positions, "n -> 1 n 1 1")


def _evaluate(pattern, q_pos, k_pos):
    """The predicate's answer as a bool tensor of the rank of the positions, checked."""
    answer = ops.convert_to_tensor(pattern(q_pos, k_pos))
    rank = len(q_pos.shape)
    answer = answer[(None,) * (rank - len(answer.shape))]
    sizes = [{1, a, b} for a, b in zip(q_pos.shape, k_pos.shape, strict=True)]
    shape = tuple(None if None in size else tuple(sorted(size)) for size in sizes)
    return check_tensor(f"{pattern!r}(q_pos, k_pos)", answer, "bool", shape)


def attention_weights(
    query,
    key,
    pattern,
    *,
    query_mask=None,
    key_mask=None,
    attention_mask=None,
    scale=None,
):
    """The softmax weights themselves, `(b, h, n, m)`: to look at, since they are n * m.

    Args are those of `sparse_attention`. A row with no allowed key is all 0.
    """
    query, key, _, n, m = _check_tensors(query, key, key)
    masks = _check_masks(query, key, query_mask, key_mask, attention_mask, None)
    query_mask, key_mask, attention_mask, _ = masks
    check_pattern("pattern", pattern).check_lengths(query.shape[1], key.shape[1])
    query, key = zero_masked(query, query_mask), zero_masked(key, key_mask)
    query = query * _scale(query, scale)
    part = Part(Band(), pattern, layout(Band()))  # one tile, of all pairs
    tiles = _Tiles(part, ops.arange(n, dtype="int32"), m, key_mask, attention_mask)
    (q,), (k,) = tiles.layout.split_queries(query), tiles.layout.split_keys(key, n)
    scores = einsum(q, k, "b h t i d, b h t j d -> b h t i j")
    weights = rearrange(masked_softmax(scores, *tiles.masks), "b h 1 i j -> b i h j")
    return rearrange(zero_masked(weights, query_mask), "b i h j -> b h i j")


def _scale(query, scale):
    scale = query.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    return ops.convert_to_tensor(scale, dtype=query.dtype)


def _check_tensors(query, key, value):
    tensors = []
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, keras.KerasTensor):
            raise TypeError(
                f"`{name}` must be a tensor or an array; in a functional model use a layer of "
                f"`sparse_attn.layers`, or call this inside of your own layer. Received: {x!r}"
            )
        x = ops.convert_to_tensor(x)
        tensors.append(check_tensor(name, x, "float", (None,) * 4))
    query, key, value = tensors
    b, _, h, d = query.shape
    check_tensor("key", key, "float", (b, None, h, d))
    check_tensor("value", value, "float", (b, key.shape[1], h, None))
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            dtypes = [keras.backend.standardize_dtype(y.dtype) for y in (query, x)]
            requirement = f"of the dtype of `query`, {dtypes[0]}"
            raise TypeError(f"`{name}` must be {requirement}. Received: {name}.dtype={dtypes[1]}")
    return query, key, value, ops.shape(query)[1], ops.shape(key)[1]


def _check_masks(query, key, query_mask, key_mask, attention_mask, bias):
    b, n, h, _ = query.shape
    m = key.shape[1]
    pairs = ((n, m), ((1, b), n, m), ((1, b), (1, h), n, m))
    query_mask = check_mask("query_mask", query_mask, (b, n))
    key_mask = check_mask("key_mask", key_mask, (b, m))
    attention_mask = _four_axes(check_mask("attention_mask", attention_mask, *pairs))
    if bias is not None:
        bias = ops.cast(ops.convert_to_tensor(bias), wide(query.dtype))
        bias = _four_axes(check_tensor("bias", bias, "float", *pairs))
    return query_mask, key_mask, attention_mask, bias


def _four_axes(x):
    if x is None or len(x.shape) == 4:
        return x
    return rearrange(x, "b n m -> b 1 n m" if len(x.shape) == 3 else "n m -> 1 1 n m")


def _check_positions(positions, known_n, n):
    if isinstance(positions, (int, float)):
        positions = check_int("query_positions", positions, minimum=0)
    if isinstance(positions, (int, list, tuple, np.ndarray)):  # its values are at hand
        values = np.asarray(positions)
        if values.size and not (values.min() >= 0 and values.max() < 2**31):
            raise ValueError(received("query_positions", "in [0, 2**31)", positions))
    positions = ops.convert_to_tensor(positions)
    check_tensor("query_positions", positions, "int", (), (known_n,))
    positions = ops.cast(positions, "int32")
    return positions if len(positions.shape) else positions + ops.arange(n, dtype="int32")
