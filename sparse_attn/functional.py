"""Sparse attention as a function: plan, split, attend, join, merge."""

import functools
import itertools
import math

import keras
import numpy as np
from einops import einsum, rearrange
from keras import ops

from sparse_attn.attend import join_apart, merge, public_lse
from sparse_attn.bounds import Lists, are_apart
from sparse_attn.checks import (
    check_bool,
    check_int,
    check_number,
    check_rate,
    check_tensor,
    received,
)
from sparse_attn.chosen import Chosen, bring_together, share_out
from sparse_attn.masking import (
    LOWEST,
    MASKED,
    at_least_lowest,
    check_mask,
    masked_softmax,
    wide,
    zero_masked,
)
from sparse_attn.patterns import Band, Grid, PerHead, check_pattern
from sparse_attn.plan import Part, axes_of, has_surplus, plan_at, plan_lengths
from sparse_attn.stream import (
    MAX_SCORE_BYTES,
    Mask,
    Schedule,
    allowed_by,
    attend_tiles,
    schedule,
    score_bytes,
)
from sparse_attn.terms import answers_all, period
from sparse_attn.tracing import unconverted


@unconverted
def sparse_attention(
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
    scale=None,
    query_positions=None,
    dropout=0.0,
    seed=None,
    return_lse=False,
    max_score_bytes=MAX_SCORE_BYTES,
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
        pattern: a `Pattern`: which pairs of positions may attend; or a
            `PerHead`, one for each head or group of heads.
        query_mask: `(b, n)` bools, True = valid. An invalid query gets `out` 0
            and `lse` `-inf`, and what it holds does not matter.
        key_mask: `(b, m)` bools, True = valid. What an invalid key or its
            value holds does not matter, be it NaN.
        segment_ids: `(b, n)` ints, where `m == n`; or a pair of them, `(b, n)`
            for the queries and `(b, m)` for the keys. Only what has the same
            number may attend: for several documents in one sequence. Positions
            run on through all of them.
        attention_mask: `(n, m)`, `(b|1, n, m)` or `(b|1, h|1, n, m)` bools,
            True = may be attended. It is of size n * m by nature; prefer a
            pattern.
        bias: numbers of the same shapes, added to the scaled scores; less than
            -1e29, such as `-inf`, forbids a pair. Likewise of size n * m.
        scale: a number, `d ** -0.5` by default.
        query_positions: where the queries are not at `0, 1, 2, ...`: an int,
            the position of the first of them, or `(n,)` non-negative ints.
            For a decoder, whose few queries stand at the end of many keys.
            The keys of each query are gathered, or scored densely where fewer
            numbers are moved so.
        dropout: the share of weights to drop, in [0, 1).
        seed: an int or a `keras.random.SeedGenerator`, for dropout.
        return_lse: whether to return the log-sum-exp as well.
        max_score_bytes: an int, 2**30 by default. Where the scores of this call
            take no more bytes than this in the softmax (4 for each scored pair
            and head, 8 in float64), its weights are kept for the backward
            pass. Otherwise a few tiles are worked off at a time, and in the
            backward pass once more: training takes about 1.4 times the time.
            Each call, so each layer of a model, has this much of its own. An
            unknown batch counts as 8: give less where it will be larger.
            Where a length is unknown, and with a `bias`, the weights are
            always kept.

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
    segment_ids = _check_segments(segment_ids, query, key)
    check_bool("return_lse", return_lse)
    dropout = check_rate("dropout", dropout)
    max_score_bytes = check_int("max_score_bytes", max_score_bytes, minimum=0)
    if not (seed is None or isinstance(seed, keras.random.SeedGenerator)):
        seed = check_int("seed", seed)
    # Padding may hold anything: 0 * NaN would reach valid outputs and gradients.
    query = zero_masked(query, query_mask)
    key, value = zero_masked(key, key_mask), zero_masked(value, key_mask)
    query = query * _scale(query, scale)

    check_pattern("pattern", pattern)
    if isinstance(pattern, PerHead):
        options = {"query_mask": query_mask, "key_mask": key_mask, "segment_ids": segment_ids}
        options |= {"query_positions": query_positions, "dropout": dropout, "scale": 1.0}
        options["return_lse"] = return_lse
        of_heads = (query, key, value, attention_mask, bias)
        return _per_head(pattern, of_heads, seed, max_score_bytes, options)
    known = [size if isinstance(size, int) else None for size in (n, m)]
    q_pos = None
    if query_positions is not None:
        q_pos = _check_positions(query_positions, known[0], n)
    if 0 in (*known, query.shape[0]):  # nothing asks, or nothing answers
        parts = ()
    elif q_pos is None:
        parts = plan_lengths(pattern, *known).parts
    else:
        parts = plan_at(pattern, q_pos, n, m, query.shape[-1]).parts

    chosen = [[Chosen(x, size) for x, size in ((p.queries, n), (p.keys, m))] for p in parts]
    apart = are_apart([part.queries for part in parts])
    need_lse = return_lse or not apart
    schedules = _schedules(parts, chosen, query, value, bias is not None, max_score_bytes)
    seeds = _seeds(schedules, query, seed) if dropout else [None] * len(parts)
    found = []
    for part, (queries, keys), schedule_, seed_ in zip(
        parts, chosen, schedules, seeds, strict=True
    ):
        pairs = (key_mask, segment_ids, attention_mask, bias)
        tiles = _Tiles(part, schedule_.layout, queries, keys, q_pos, *pairs)
        options = {"dropout": dropout, "seeds": seed_, "return_lse": need_lse}
        options["zero_unanswered"] = not (need_lse or tiles.answer_all)
        q, k, v = queries.pick(query), keys.pick(key), keys.pick(value)
        out, lse = attend_tiles(schedule_, q, k, v, tiles.masks, tiles.bias, **options)
        if lse is not None:
            lse = queries.place(rearrange(lse, "b n h 1 -> b n h"), LOWEST)
        found.append((queries.place(out, 0.0), lse))
    if not found:  # the pattern allows nothing at these lengths
        shape = ops.shape(query)[:3]
        out = ops.zeros((*shape, value.shape[-1]), query.dtype)
        out = out + _zero_of(query, key, value)
        found = [(out, ops.full(shape, LOWEST, wide(query.dtype)))]
    out, lse = join_apart(found) if apart else merge(found)
    if lse is not None:
        out = zero_masked(out, lse > MASKED)
    out = zero_masked(out, query_mask)
    if not return_lse:
        return out
    if query_mask is not None:
        lse = ops.where(query_mask[..., None], lse, ops.full((), LOWEST, lse.dtype))
    return out, public_lse(lse)


def _zero_of(*tensors):
    """The number 0, whose gradients by these tensors are 0: PyTorch asks for a link to them."""
    sums = [ops.sum(ops.where(False, x, ops.zeros((), x.dtype))) for x in tensors]
    return sum(sums[1:], sums[0])


def _per_head(pattern, of_heads, seed, max_score_bytes, options):
    """`sparse_attention` for the heads of each distinct pattern, put together again."""
    num_heads = of_heads[0].shape[2]
    groups = pattern.groups(num_heads)
    heads = list(groups.values())
    shares = [share_out(x, heads, axis) for x, axis in zip(of_heads, (2, 2, 2, 1, 1), strict=True)]
    found = []
    for number, (each, tensors) in enumerate(zip(groups, zip(*shares, strict=True), strict=True)):
        query, key, value, attention_mask, bias = tensors
        budget = max_score_bytes * len(heads[number]) // num_heads
        options |= {"attention_mask": attention_mask, "bias": bias, "max_score_bytes": budget}
        # No two groups drop alike.
        own_seed = seed + number if isinstance(seed, int) else seed
        found.append(sparse_attention(query, key, value, each, seed=own_seed, **options))
    if not options["return_lse"]:
        return bring_together(found, heads, axis=2)
    return tuple(bring_together(x, heads, axis=2) for x in zip(*found, strict=True))


def _schedules(parts, chosen, query, value, has_bias, max_score_bytes):
    """How each part is worked off: in small pieces, and streamed if all are too much to keep."""
    batch, _, heads, _ = query.shape
    if not all(isinstance(x.size, int) for pair in chosen for x in pair):  # not known yet
        layouts = [p.layout.at(q.count, k.count) for p, (q, k) in zip(parts, chosen, strict=True)]
        return [Schedule(layout, heads) for layout in layouts]
    if has_bias:  # its tiles are laid out anyway
        return [Schedule(part.layout, heads) for part in parts]
    pairs = sum(part.scored_pairs for part in parts)
    streamed = score_bytes(pairs, batch, heads, query.dtype) > max_score_bytes
    dim = max(query.shape[-1], value.shape[-1])
    return [schedule(part.layout, batch, heads, dim, query.dtype, streamed) for part in parts]


def _seeds(schedules, query, seed):
    """For each part, a seed for each piece: no two pieces drop alike."""
    batch, _, heads, _ = ops.shape(query)
    counts = [schedule.num_pieces(batch, heads) for schedule in schedules]
    seeds = keras.random.randint((sum(counts), 2), 0, 2**31 - 1, dtype="int32", seed=seed)
    starts = itertools.accumulate(counts, initial=0)
    return [
        ops.slice(seeds, (start, 0), (count, 2))
        for start, count in zip(starts, counts, strict=False)
    ]


class _Tiles:
    """What is masked in the tiles of a part, and what is added to their scores.

    Attributes:
        masks: for each run of the layout, a list of `Mask`: a pair is allowed
            if all of them say so.
        bias: for each run, float tiles; empty if there is no bias.
    """

    def __init__(
        self,
        part,
        layout,
        queries,
        keys,
        q_pos=None,
        key_mask=None,
        segment_ids=None,
        attention_mask=None,
        bias=None,
    ):
        self.part, self.layout, self.queries, self.keys = part, layout, queries, keys
        self.shifted = q_pos is not None
        self.q_pos = q_pos if self.shifted else queries.positions
        self.k_pos = keys.positions
        restrictions = (key_mask, segment_ids, attention_mask, bias)
        self.is_restricted = not all(x is None for x in restrictions)
        self.masks = self._pattern_masks()
        if key_mask is not None or layout.pads_keys or not keys.all_exist:
            valid = _as_rows(self.k_pos) < keys.size
            if key_mask is not None:
                valid = valid & keys.pick(key_mask[:, :, None, None])
            valid = layout.split_keys(valid, queries.count)
            self._restrict([rearrange(x, "b 1 t j 1 -> b 1 t 1 j") for x in valid])
        if segment_ids is not None:
            self._restrict(*self._segments(*segment_ids))
        self.bias = []
        if attention_mask is not None:
            self._restrict(self._at_pairs(attention_mask))
        if bias is not None:
            tiles = self._at_pairs(bias)
            self._restrict([x > MASKED for x in tiles])
            self.bias = [at_least_lowest(x) for x in tiles]

    def _pattern_masks(self):
        part, layout = self.part, self.layout
        runs = layout.runs()
        surplus = [True] * len(runs) if self.shifted else has_surplus(part, layout)
        if part.pattern == Band() or not any(surplus):
            return [[] for _ in runs]
        is_grid = isinstance(part.pattern, Grid) and part.pattern == part.bound
        if is_grid and not self.shifted and len(axes_of(layout)) == len(part.pattern.bands):
            masks = self._axis_masks()
        else:
            masks = self._position_masks()
        return [[mask] if needed else [] for needed, mask in zip(surplus, masks, strict=True)]

    def _position_masks(self):
        """For each run, the predicate at its tiles' positions, or at those of one for all."""
        pattern, positions = self.part.pattern, None
        if self._tiles_are_alike():
            positions = self.layout.sample(self.q_pos, self.k_pos)
        if positions is None:
            positions = self._positions

        partial = self._partial_keys()

        def evaluate(q_pos, k_pos):
            q_pos, k_pos = q_pos[0, 0], k_pos[0, 0]
            if partial is None:
                return _evaluate(pattern, q_pos, k_pos)[None, None]
            allowed = _evaluate(pattern, q_pos, k_pos[..., :partial])
            whole = k_pos.shape[-1] - partial
            return ops.pad(allowed, ((0, 0), (0, 0), (0, whole)), constant_values=True)[None, None]

        return [Mask(evaluate, tuple(x[None, None] for x in pair)) for pair in positions]

    def _partial_keys(self):
        """How many keys at the start of each tile the predicate must be asked about, or `None`."""
        bound = self.part.bound
        if self.shifted or not isinstance(bound, Lists):
            return None
        return bound.partial * bound.size or None

    def _tiles_are_alike(self):
        if self.shifted or self.part.queries is not None or self.part.keys is not None:
            return False
        repeats = period(self.part.pattern)
        return repeats == 1 or (repeats > 1 and self.layout.step % repeats == 0)

    def _axis_masks(self):
        """For each run, the bands of a grid at the coordinates of one tile: all are alike."""
        grid, row = self.part.pattern, 1
        axes = axes_of(self.layout)
        tables = []
        for axis, (layout, band) in enumerate(zip(axes, grid.bands, strict=True)):
            size = None if axis == 0 else grid.sizes[axis - 1]
            row = math.prod(grid.sizes[axis:])
            n, m = (-(-x.count // row) if axis == 0 else size for x in (self.queries, self.keys))
            pairs = layout.sample(ops.arange(n, dtype="int32"), ops.arange(m, dtype="int32"))
            tables.append([band(q_pos, k_pos)[0] for q_pos, k_pos in pairs])
        found = []
        for outer in tables[0]:
            for (inner,) in tables[1:]:
                both = outer[:, None, :, None] & inner[None, :, None, :]
                outer = rearrange(both, "i k j l -> (i k) (j l)")
            found.append(Mask(_as_it_is, (outer[None, None, None],)))
        return found

    @functools.cached_property
    def _positions(self):
        """`(t, i, 1)` and `(t, 1, j)`: positions are cut as the vectors they belong to are."""
        queries = self.layout.split_queries(_as_rows(self.q_pos))
        keys = self.layout.split_keys(_as_rows(self.k_pos), self.queries.count)
        return [
            (rearrange(q, "1 1 t i 1 -> t i 1"), rearrange(k, "1 1 t j 1 -> t 1 j"))
            for q, k in zip(queries, keys, strict=True)
        ]

    def _segments(self, of_queries, of_keys):
        """The numbers of the segments of each tile's queries, and of its keys."""
        rows = self.layout.split_queries(self.queries.pick(of_queries[:, :, None, None]))
        columns = self.layout.split_keys(
            self.keys.pick(of_keys[:, :, None, None]), self.queries.count
        )
        return rows, [rearrange(x, "b 1 t j 1 -> b 1 t 1 j") for x in columns]

    def _restrict(self, *tensors):
        """Allow what a mask does, or what is equal in two tensors."""
        function = _as_it_is if len(tensors) == 1 else ops.equal
        masks = [Mask(function, each) for each in zip(*tensors, strict=True)]
        self.masks = [[*terms, mask] for terms, mask in zip(self.masks, masks, strict=True)]

    def _at_pairs(self, x):
        """A table `(b|1, h|1, n, m)` at each tile's pairs of positions."""
        rows = self.queries.pick(rearrange(x, "b h n m -> b n h m"))
        rows = self.layout.split_queries(rows)
        return [
            ops.take_along_axis(tile, k_pos[None, None], axis=-1)
            for tile, (_, k_pos) in zip(rows, self._positions, strict=True)
        ]

    @property
    def answer_all(self):
        """Whether every query certainly has a key: its own."""
        n, m = self.queries.size, self.keys.size
        known = isinstance(n, int) and isinstance(m, int)
        if self.is_restricted or self.shifted or not known or n > m:
            return False
        return answers_all(self.part.pattern) is True


def _as_it_is(mask):
    return mask


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


@unconverted
def attention_weights(
    query,
    key,
    pattern,
    *,
    query_mask=None,
    key_mask=None,
    segment_ids=None,
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
    segment_ids = _check_segments(segment_ids, query, key)
    if isinstance(pattern, PerHead):
        groups = pattern.groups(query.shape[2])
        heads = list(groups.values())
        axes = ((query, 2), (key, 2), (attention_mask, 1))
        shares = [share_out(x, heads, axis) for x, axis in axes]
        options = {"query_mask": query_mask, "key_mask": key_mask, "segment_ids": segment_ids}
        found = [
            attention_weights(q, k, each, attention_mask=mask, scale=1.0, **options)
            for each, q, k, mask in zip(groups, *shares, strict=True)
        ]
        return bring_together(found, heads, axis=1)
    part = Part.of(Band(), pattern, None, None)  # one tile, of all pairs
    dense = part.layout
    tiles = _Tiles(
        part,
        dense,
        Chosen(None, n),
        Chosen(None, m),
        key_mask=key_mask,
        segment_ids=segment_ids,
        attention_mask=attention_mask,
    )
    (q,), (k,) = dense.split_queries(query), dense.split_keys(key, n)
    scores = einsum(q, k, "b h t i d, b h t j d -> b h t i j")
    mask = allowed_by(tiles.masks[0]) if tiles.masks[0] else None
    weights = rearrange(masked_softmax(scores, mask), "b h 1 i j -> b i h j")
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
        tensors.append(check_tensor(name, _to_tensor(name, x), "float", (None,) * 4))
    query, key, value = tensors
    b, _, h, d = query.shape
    if 0 in (h, d):
        requirement = "at least one head and one feature"
        raise ValueError(
            f"`query` must have {requirement}. Received: query.shape={tuple(query.shape)}"
        )
    check_tensor("key", key, "float", (b, None, h, d))
    check_tensor("value", value, "float", (b, key.shape[1], h, None))
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            dtypes = [keras.backend.standardize_dtype(y.dtype) for y in (query, x)]
            requirement = f"of the dtype of `query`, {dtypes[0]}"
            raise TypeError(f"`{name}` must be {requirement}. Received: {name}.dtype={dtypes[1]}")
    return query, key, value, ops.shape(query)[1], ops.shape(key)[1]


def _to_tensor(name, x):
    if x is None or isinstance(x, (str, bytes)):
        raise TypeError(received(name, "a tensor or an array of numbers", x))
    return ops.convert_to_tensor(x)


def _check_masks(query, key, query_mask, key_mask, attention_mask, bias):
    b, n, h, _ = query.shape
    m = key.shape[1]
    pairs = ((n, m), ((1, b), n, m), ((1, b), (1, h), n, m))
    query_mask = check_mask("query_mask", query_mask, (b, n))
    key_mask = check_mask("key_mask", key_mask, (b, m))
    attention_mask = _four_axes(check_mask("attention_mask", attention_mask, *pairs))
    if bias is not None:
        bias = _to_tensor("bias", bias)
        if "bool" in str(bias.dtype):
            requirement = "numbers; to forbid pairs give `attention_mask`"
            raise TypeError(f"`bias` must be {requirement}. Received: bias.dtype=bool")
        bias = ops.cast(bias, wide(query.dtype))
        bias = _four_axes(check_tensor("bias", bias, "float", *pairs))
    return query_mask, key_mask, attention_mask, bias


def _check_segments(segment_ids, query, key):
    """A pair of int tensors `(b, n)` and `(b, m)`, or `None`."""
    if segment_ids is None:
        return None
    (b, n), m = query.shape[:2], key.shape[1]
    if isinstance(segment_ids, (tuple, list)):
        requirement = "ints (b, n), or a pair of them for queries and keys"
        if len(segment_ids) != 2:
            raise ValueError(received("segment_ids", requirement, segment_ids))
        names, pair = ("segment_ids[0]", "segment_ids[1]"), segment_ids
    else:
        names, pair = ("segment_ids", "segment_ids"), (segment_ids, segment_ids)
    found = []
    for name, x, size in zip(names, pair, (n, m), strict=True):
        x = check_tensor(name, _to_tensor(name, x), "int", (b, size))
        found.append(ops.cast(x, "int32"))
    return found


def _four_axes(x):
    if x is None or len(x.shape) == 4:
        return x
    return rearrange(x, "b n m -> b 1 n m" if len(x.shape) == 3 else "n m -> 1 1 n m")


def _check_positions(positions, known_n, n):
    if isinstance(positions, (int, float, np.generic)):
        positions = check_int("query_positions", positions, minimum=0)
        if positions + (known_n or 1) > 2**31:
            requirement = "in [0, 2**31), up to the last query"
            raise ValueError(received("query_positions", requirement, positions))
    elif isinstance(positions, (list, tuple, np.ndarray)):  # its values are at hand
        values = np.asarray(positions)
        if values.dtype.kind not in "biuf":
            raise TypeError(received("query_positions", "an int or an array of ints", positions))
        if values.size and not (values.min() >= 0 and values.max() < 2**31):
            raise ValueError(received("query_positions", "in [0, 2**31)", positions))
    positions = ops.convert_to_tensor(positions)
    check_tensor("query_positions", positions, "int", (), (known_n,))
    positions = ops.cast(positions, "int32")
    return positions if len(positions.shape) else positions + ops.arange(n, dtype="int32")
