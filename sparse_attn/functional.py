"""Sparse attention as a function: plan, split, attend, join, merge."""

import itertools
from dataclasses import replace

import keras
import numpy as np
from keras import ops

from sparse_attn.attend import join_apart, merge, public_lse
from sparse_attn.bounds import are_apart
from sparse_attn.checks import (
    LAST,
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
    check_mask,
    is_not_masked,
    masked_softmax,
    wide,
    zero_masked,
)
from sparse_attn.patterns import Band, PerHead, check_pattern
from sparse_attn.plan import Part, plan_at, plan_lengths
from sparse_attn.reshaping import rearrange
from sparse_attn.scores import apply_mods, is_differentiable, read_mods, tensors_of
from sparse_attn.stream import (
    MAX_SCORE_BYTES,
    Schedule,
    allowed_by,
    attend_tiles,
    schedule,
    score_bytes,
)
from sparse_attn.tensors import to_array, to_tensor
from sparse_attn.tiles import Given, Tiles
from sparse_attn.tracing import (
    is_symbolic,
    is_traced_to_export,
    known_size,
    length_of,
    product,
    refuse_longer,
    size_of,
    uncompiled,
    unconverted,
)


@uncompiled
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
    score_mod=None,
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
        key: `(b, m, g, d)`, of the same dtype. Where `g` is less than `h`, a
            divisor of it, each head of keys serves `h / g` neighbouring heads
            of queries: grouped-query attention. It is not copied for them.
        value: `(b, m, g, e)`, of the same dtype.
        pattern: a `Pattern`: which pairs of positions may attend; or a
            `PerHead`, one for each head or group of heads of queries.
        query_mask: `(b, n)` bools, True = valid. An invalid query gets `out` 0
            and `lse` `-inf`, and what it holds does not matter.
        key_mask: `(b, m)` bools, True = valid. What an invalid key or its
            value holds does not matter, be it NaN; neither does what a key holds
            that no valid query may attend to.
        segment_ids: `(b, n)` ints, where `m == n`; or a pair of them, `(b, n)`
            for the queries and `(b, m)` for the keys. Only what has the same
            number may attend: for several documents in one sequence. Positions
            run on through all of them.
        attention_mask: `(n, m)`, `(b|1, n, m)` or `(b|1, h|1, n, m)` bools, True =
            may be attended; `n` and `m` may be 1 as well. It is of size n * m by
            nature; prefer a pattern.
        bias: numbers of the same shapes, added to the scaled scores; less than
            -1e29, such as `-inf`, forbids a pair. Likewise of size n * m.
        score_mod: what is done to the scaled scores of the tiles before the
            softmax: a `ScoreMod`, such as `ALiBi(8)` or `SoftCap(50.0)`; a function
            `(scores, q_pos, k_pos, head) -> scores`; or a list of these, which
            are applied in turn, before `bias`. All four are tensors that
            broadcast with one another, the last three int32. A function must
            treat each score by itself, and may be undefined at pairs that are not
            allowed: there it gets the positions of an allowed pair. What it forbids
            by `-inf` stays forbidden. It may use other tensors, and is
            differentiated by the framework, so that its scores are kept for
            the backward pass whatever `max_score_bytes` says.
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
    query, key, value = _check_tensors(query, key, value)
    masks = _check_masks(query, key, query_mask, key_mask, attention_mask, bias)
    query_mask, key_mask, attention_mask, bias = masks
    segment_ids = check_segments(segment_ids, *query.shape[:2], key.shape[1])
    mods = read_mods(score_mod, query.shape[2])
    check_bool("return_lse", return_lse)
    dropout = check_rate("dropout", dropout)
    max_score_bytes = check_int("max_score_bytes", max_score_bytes, minimum=0)
    if not (seed is None or isinstance(seed, keras.random.SeedGenerator)):
        seed = check_int("seed", seed)
    check_pattern("pattern", pattern)
    q_pos = None
    if query_positions is not None:
        limit = pattern.max_length
        q_pos = check_positions(query_positions, query.shape[1], size_of(query, 1), limit)
    # Padding may hold anything: 0 * NaN would reach valid outputs and gradients.
    query = zero_masked(query, query_mask)
    key, value = zero_masked(key, key_mask), zero_masked(value, key_mask)
    query = query * _scale(query, scale)

    given = Given(
        tuple(range(query.shape[2])),
        query.shape[2] // key.shape[2],
        q_pos,
        key_mask,
        segment_ids,
        attention_mask,
        bias,
        mods,
        query_mask,
    )
    groups = head_groups(pattern, given)
    shares = _share_out(query, key, value, given, groups)
    found = []
    for number, ((each, heads, _), share) in enumerate(zip(groups, shares, strict=True)):
        own = {"max_score_bytes": max_score_bytes * len(heads) // query.shape[2]}
        # No two groups drop alike.
        own["seed"] = seed + number if isinstance(seed, int) else seed
        found.append(_attend(*share, each, dropout=dropout, return_lse=return_lse, **own))
    heads = [numbers for _, numbers, _ in groups]
    outs, lses = zip(*found, strict=True)
    out = zero_masked(bring_together(outs, heads, axis=2), query_mask)
    out = _refuse_longer(out, pattern, query, key, q_pos)
    if not return_lse:
        return out
    lse = bring_together(lses, heads, axis=2)
    m = size_of(key, 1)
    if not isinstance(m, int) and not is_symbolic(m):  # there is a row of padding if it is 0
        lse = ops.where(m > 0, lse, ops.full((), LOWEST, lse.dtype))
    if query_mask is not None:
        lse = ops.where(ops.expand_dims(query_mask, -1), lse, ops.full((), LOWEST, lse.dtype))
    return out, public_lse(lse)


def _refuse_longer(x, pattern, query, key, q_pos=None):
    """`x`, if the lengths that were not known before are such that the pattern has a meaning."""
    limit = pattern.max_length
    if limit is None or limit > LAST:
        return x
    last = size_of(query, 1) if q_pos is None else ops.max(q_pos, initial=-1) + 1
    told = f"{pattern!r} is made for lengths up to {limit}."
    return refuse_longer(x, (last, size_of(key, 1)), limit, told)


def head_groups(pattern, given):
    """Heads that are worked off together: those of one pattern, which share keys alike.

    Returns:
        A list of `(pattern, heads, key_heads)`, two lists of numbers.
    """
    num_heads, repeats = len(given.heads), given.repeats
    if not isinstance(pattern, PerHead):
        return [(pattern, list(range(num_heads)), list(range(num_heads // repeats)))]
    found = []
    for each, heads in pattern.groups(num_heads).items():
        served = [
            (key_head, list(own))
            for key_head, own in itertools.groupby(heads, lambda x: x // repeats)
        ]
        for count in dict.fromkeys(len(own) for _, own in served):
            alike = [(key_head, own) for key_head, own in served if len(own) == count]
            numbers = [number for _, own in alike for number in own]
            found.append((each, numbers, [key_head for key_head, _ in alike]))
    return found


def _share_out(query, key, value, given, groups):
    """For each of some groups of heads `(query, key, value, given)`."""
    heads, key_heads = ([group[place] for group in groups] for place in (1, 2))
    tensors = [share_out(query, heads, 2), *(share_out(x, key_heads, 2) for x in (key, value))]
    pairs = [share_out(x, heads, 1) for x in (given.attention_mask, given.bias)]
    for numbers, of_keys, *own, attention_mask, bias in zip(
        heads, key_heads, *tensors, *pairs, strict=True
    ):
        share = replace(
            given,
            heads=tuple(given.heads[number] for number in numbers),
            repeats=len(numbers) // len(of_keys),
            attention_mask=attention_mask,
            bias=bias,
        )
        yield *own, share


def _attend(query, key, value, given, pattern, *, dropout, seed, return_lse, max_score_bytes):
    """Attention of heads that have one pattern: `(out, lse)`, `lse` finite and perhaps `None`."""
    n, m = length_of(query), length_of(key)
    known = [known_size(size) for size in (n, m)]
    if 0 in (*known, query.shape[0]):  # nothing asks, or nothing answers
        parts = ()
    elif given.q_pos is None:
        parts = plan_lengths(pattern, *known).parts
    else:
        parts = plan_at(pattern, given.q_pos, n, m, query.shape[-1]).parts

    zero_unseen = not given.sees_all(pattern, n, m)
    chosen = [[Chosen(x, size) for x, size in ((p.queries, n), (p.keys, m))] for p in parts]
    apart = are_apart([part.queries for part in parts])
    need_lse = return_lse or not apart
    schedules = _schedules(parts, chosen, query, value, given, max_score_bytes)
    seeds = [None] * len(parts)
    if dropout:
        seeds = _seeds(schedules, size_of(query, 0), key.shape[2], seed)
    # Heads of queries that share keys stand side by side, as features of one head.
    grouped = rearrange(query, "b n (g r) d -> b n g (r d)", r=given.repeats)
    found = []
    for part, (queries, keys), own, own_seeds in zip(parts, chosen, schedules, seeds, strict=True):
        tiles = Tiles(part, own.layout, queries, keys, given, by_query=zero_unseen)
        out, lse = attend_tiles(
            own,
            queries.pick(grouped),
            keys.pick(key),
            keys.pick(value),
            tiles.masks,
            tiles.bias,
            tiles.mods(pattern),
            repeats=given.repeats,
            dropout=dropout,
            seeds=own_seeds,
            return_lse=need_lse,
            zero_unanswered=not (need_lse or tiles.answer_all),
            zero_unseen=zero_unseen,
        )
        out = rearrange(out, "b n g (r e) -> b n (g r) e", r=given.repeats)
        if lse is not None:
            lse = queries.place(rearrange(lse, "b n g r -> b n (g r)"), LOWEST)
        found.append((queries.place(out, 0.0), lse))
    if not found:  # the pattern allows nothing at these lengths
        shape = ops.shape(query)[:3]
        out = ops.zeros((*shape, value.shape[-1]), query.dtype)
        bias = [] if given.bias is None else [given.bias]
        linked = (query, key, value, *bias, *_idle(given.mods, wide(query.dtype)))
        out = out + _zero_of(linked, out.dtype)
        found = [(out, ops.full(shape, LOWEST, wide(query.dtype)))]
    out, lse = join_apart(found) if apart else merge(found)
    return out if lse is None else zero_masked(out, is_not_masked(lse)), lse


def _idle(mods, dtype):
    """What some mods return where there is no pair at all: empty, but linked to what they use."""
    if not mods:
        return []
    nothing = ops.zeros((1, 1, 1, 0, 0), "int32")
    positions = nothing, nothing, nothing
    return [apply_mods(mods, ops.cast(nothing, dtype), positions, tensors_of(mods))[0]]


def _zero_of(tensors, dtype):
    """The number 0, whose gradients by these tensors are 0: PyTorch asks for a link to them."""
    sums = [ops.cast(ops.sum(ops.where(False, x, ops.zeros((), x.dtype))), dtype) for x in tensors]
    return sum(sums[1:], sums[0])


def _schedules(parts, chosen, query, value, given, max_score_bytes):
    """How each part is worked off: in small pieces, and streamed if all are too much to keep."""
    batch, _, heads, _ = query.shape
    groups = heads // given.repeats
    if not all(isinstance(x.size, int) for pair in chosen for x in pair):  # not known yet
        layouts = [p.layout.at(q.count, k.count) for p, (q, k) in zip(parts, chosen, strict=True)]
        return [Schedule(layout, groups) for layout in layouts]
    if given.bias is not None:  # its tiles are laid out anyway
        return [Schedule(part.layout, groups) for part in parts]
    pairs = sum(part.scored_pairs for part in parts)
    streamed = score_bytes(pairs, batch, heads, query.dtype) > max_score_bytes
    streamed = streamed and not is_traced_to_export()  # where a loop has as many turns as now
    sizes = {"dim": max(query.shape[-1], value.shape[-1]), "repeats": given.repeats}
    sizes["streamed"] = streamed and is_differentiable(given.mods)
    return [schedule(part.layout, batch, groups, dtype=query.dtype, **sizes) for part in parts]


def _seeds(schedules, batch, groups, seed):
    """For each part, a seed for each piece: no two pieces drop alike."""
    counts = [schedule.num_pieces(batch, groups) for schedule in schedules]
    seeds = keras.random.randint((sum(counts), 2), 0, 2**31 - 1, dtype="int32", seed=seed)
    starts = itertools.accumulate(counts, initial=0)
    return [
        ops.slice(seeds, (start, 0), (count, 2))
        for start, count in zip(starts, counts, strict=False)
    ]


@uncompiled
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
    score_mod=None,
    scale=None,
    query_positions=None,
):
    """The softmax weights themselves, `(b, h, n, m)`: to look at, since they are n * m.

    Args are those of `sparse_attention`. A row with no allowed key is all 0.
    """
    query, key, _ = _check_tensors(query, key, key)
    masks = _check_masks(query, key, query_mask, key_mask, attention_mask, None)
    query_mask, key_mask, attention_mask, _ = masks
    check_pattern("pattern", pattern)
    q_pos, lengths = None, [known_size(x.shape[1]) for x in (query, key)]
    if query_positions is not None:
        limit, lengths[0] = pattern.max_length, None
        q_pos = check_positions(query_positions, query.shape[1], size_of(query, 1), limit)
    pattern.check_lengths(*lengths)
    query, key = zero_masked(query, query_mask), zero_masked(key, key_mask)
    query = query * _scale(query, scale)
    heads = query.shape[2]
    given = Given(
        tuple(range(heads)),
        heads // key.shape[2],
        q_pos,
        key_mask,
        segment_ids=check_segments(segment_ids, *query.shape[:2], key.shape[1]),
        attention_mask=attention_mask,
        mods=read_mods(score_mod, heads),
    )
    groups = head_groups(pattern, given)
    found = []
    for (each, *_), (q, k, _, share) in zip(
        groups, _share_out(query, key, key, given, groups), strict=True
    ):
        found.append(_dense_weights(q, k, share, each))
    weights = bring_together(found, [numbers for _, numbers, _ in groups], axis=1)
    weights = _refuse_longer(weights, pattern, query, key, q_pos)
    return rearrange(
        zero_masked(rearrange(weights, "b h i j -> b i h j"), query_mask), "b i h j -> b h i j"
    )


def _dense_weights(query, key, given, pattern):
    """The weights of heads that have one pattern, as one tile of all pairs."""
    n, m = size_of(query, 1), size_of(key, 1)
    part = Part.of(Band(), pattern, None, None)
    tiles = Tiles(part, part.layout, Chosen(None, n), Chosen(None, m), given)
    (q,), (k,) = part.layout.split_queries(query), part.layout.split_keys(key, n)
    q = rearrange(q, "b (g r) t i d -> b g t (i r) d", r=given.repeats)
    scores = product(q, k, "b g t i d, b g t j d -> b g t i j")
    if given.repeats > 1:
        scores = rearrange(scores, "b g t (i r) j -> b g t i r j", r=given.repeats)
    mask = allowed_by(tiles.masks[0]) if tiles.masks[0] else None
    mods = tiles.mods(pattern)
    if mods is not None:
        scores = ops.cast(scores, wide(scores.dtype))
        (positions,) = mods.positions
        scores, mask = apply_mods(mods.mods, scores, positions, mods.tensors, mask, mods.example)
    weights = ops.cast(masked_softmax(scores, mask), query.dtype)
    if given.repeats == 1:
        return rearrange(weights, "b g 1 i j -> b g i j")
    return rearrange(weights, "b g 1 i r j -> b (g r) i j")


def _scale(query, scale):
    scale = query.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    return ops.convert_to_tensor(scale, dtype=query.dtype)


def _check_tensors(query, key, value):
    query, key, value = (
        check_tensor(name, to_tensor(name, x), "float", (None,) * 4)
        for name, x in (("query", query), ("key", key), ("value", value))
    )
    b, _, h, d = query.shape
    if 0 in (h, d):
        requirement = "at least one head and one feature"
        raise ValueError(
            f"`query` must have {requirement}. Received: query.shape={tuple(query.shape)}"
        )
    groups = tuple(size for size in range(1, h + 1) if h % size == 0)
    check_tensor("key", key, "float", (b, None, groups, d))
    check_tensor("value", value, "float", (b, key.shape[1], key.shape[2], None))
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            dtypes = [keras.backend.standardize_dtype(y.dtype) for y in (query, x)]
            requirement = f"of the dtype of `query`, {dtypes[0]}"
            raise TypeError(f"`{name}` must be {requirement}. Received: {name}.dtype={dtypes[1]}")
    return query, key, value


def _check_masks(query, key, query_mask, key_mask, attention_mask, bias):
    b, n, h, _ = query.shape
    m = key.shape[1]
    sizes = ((1, b), (1, h), (1, n), (1, m))
    pairs = (sizes[2:], (sizes[0], *sizes[2:]), sizes)
    query_mask = check_mask("query_mask", query_mask, (b, n))
    key_mask = check_mask("key_mask", key_mask, (b, m))
    attention_mask = _four_axes(check_mask("attention_mask", attention_mask, *pairs))
    if attention_mask is not None and tuple(attention_mask.shape)[1:3] == (1, 1):
        mask = rearrange(attention_mask, "b 1 1 m -> b m")  # the same for all queries
        key_mask, attention_mask = _also(key_mask, mask, key), None
    attention_mask = _at_all_pairs(attention_mask, query, key)
    if bias is not None:
        bias = to_tensor("bias", bias)
        if "bool" in str(bias.dtype):
            requirement = "numbers; to forbid pairs give `attention_mask`"
            raise TypeError(f"`bias` must be {requirement}. Received: bias.dtype=bool")
        bias = ops.cast(bias, wide(query.dtype))
        bias = _four_axes(check_tensor("bias", bias, "float", *pairs))
        bias = _at_all_pairs(bias, query, key)
    return query_mask, key_mask, attention_mask, bias


def check_segments(segment_ids, b, n, m, symbols=False):
    """A pair of int tensors `(b, n)` and `(b, m)`, or `None`; perhaps `symbols` of Keras."""
    if segment_ids is None:
        return None
    requirement = "ints (b, n), or a pair of them for queries and keys"
    names, pair = ("segment_ids", "segment_ids"), (segment_ids, segment_ids)
    if isinstance(segment_ids, (tuple, list)) and not _is_table(segment_ids):
        if len(segment_ids) != 2:
            raise ValueError(received("segment_ids", requirement, segment_ids))
        names, pair = ("segment_ids[0]", "segment_ids[1]"), segment_ids
    requirement = "a tensor or an array of ints"
    arrays = [to_array(name, x, requirement) for name, x in zip(names, pair, strict=True)]
    arrays = arrays[:1] * 2 if pair[0] is pair[1] else arrays
    pair = _renumbered(arrays) or pair
    found = []
    for name, x, size in zip(names, pair, (n, m), strict=True):
        if found and x is pair[0]:
            x = found[0]
        elif not (symbols and isinstance(x, keras.KerasTensor)):
            x = to_tensor(name, x, requirement)
        found.append(check_tensor(name, x, "int", (b, size)))
    if found[0].dtype != found[1].dtype:
        found = [ops.cast(x, "int64") for x in found]
    return found


def _renumbered(pair):
    """Segments by small numbers, where they are at hand: then they may be any ints."""
    if not all(x is not None and x.dtype.kind in "iu" for x in pair):
        return None
    if pair[0] is pair[1]:
        numbers = np.unique(pair[0], return_inverse=True)[1].astype("int32")
        return (numbers.reshape(pair[0].shape),) * 2
    _, numbers = np.unique(np.concatenate(pair, axis=None), return_inverse=True)
    parts = np.split(numbers.astype("int32"), [pair[0].size])
    return [part.reshape(x.shape) for part, x in zip(parts, pair, strict=True)]


def _is_table(lists):
    """Whether these are rows of numbers, and not two tables of them."""
    return all(isinstance(row, (list, tuple)) and not any(map(np.ndim, row)) for row in lists)


def _four_axes(x):
    if x is None or len(x.shape) == 4:
        return x
    return rearrange(x, "b n m -> b 1 n m" if len(x.shape) == 3 else "n m -> 1 1 n m")


def _also(key_mask, mask, key):
    mask = ops.broadcast_to(mask, ops.shape(key)[:2])
    return mask if key_mask is None else key_mask & mask


def _at_all_pairs(x, query, key):
    """A table of pairs `(b|1, h|1, n, m)` of one whose sizes may be 1, or not be known."""
    if x is None:
        return None
    b, n, h = ops.shape(query)[:3]
    wanted = [
        1 if size == 1 else all_there for size, all_there in zip(x.shape, (b, h), strict=False)
    ]
    wanted += [n, size_of(key, 1)]
    if all(isinstance(size, int) for size in wanted) and tuple(wanted) == tuple(x.shape):
        return x
    return ops.broadcast_to(x, wanted)


def check_positions(positions, known_n, n, limit):
    """The positions of queries as an `(n,)` int32 tensor.

    Args:
        positions: the argument `query_positions`.
        known_n, n: the number of queries: an int or `None`, and an int or an int tensor.
        limit: an int that they are less than, or `None`.
    """
    limit = 2**31 if limit is None else limit
    bound = "2**31" if limit == 2**31 else limit
    requirement = "an int or an array of ints"
    if isinstance(positions, (int, float, np.generic)):
        positions = check_int("query_positions", positions, minimum=0)
        if positions + (known_size(known_n) or 1) > limit:
            told = f"in [0, {bound}), up to the last query"
            raise ValueError(received("query_positions", told, positions))
    else:
        values = to_array("query_positions", positions, requirement)
        is_known = values is not None and values.size
        if is_known and not (values.min() >= 0 and values.max() < limit):
            raise ValueError(received("query_positions", f"in [0, {bound})", positions))
    positions = to_tensor("query_positions", positions, requirement)
    check_tensor("query_positions", positions, "int", (), (known_n,))
    positions = ops.cast(positions, "int32")
    if not len(positions.shape):
        return positions + ops.arange(n, dtype="int32")
    return positions if None not in positions.shape else ops.reshape(positions, (n,))
