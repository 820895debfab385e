"""Attention over the tiles of a layout, piece by piece.

A piece is some heads of one chunk of a layout's run. Pieces are so small that
the memory of one serves the next. Where the scores of a call fit into
`max_score_bytes`, the softmax weights of all pieces are kept for the backward
pass. Otherwise the pieces run one after another, and the backward pass works
the weights of each out again, so that the scores of few pieces exist at a time.

The backward pass is written out: nothing of the size of the scores is kept but
the weights, and a framework differentiates through the pieces only for second
derivatives.
"""

from collections import deque
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import NamedTuple

import keras
from keras import ops

from sparse_attn.attend import average, log_sum_exp, score, score_gradients, weight_gradients
from sparse_attn.layouts import Run, crop, sum_rows
from sparse_attn.masking import additive_mask, is_not_masked, softmax, wide, zero_masked
from sparse_attn.reshaping import rearrange
from sparse_attn.scores import (
    add_biases,
    apply_mods,
    are_defined_everywhere,
    is_differentiable,
    only_add,
)
from sparse_attn.tracing import (
    AT_ONCE,
    after,
    both_true,
    custom_gradient,
    fold_range,
    is_traced_to_export,
    is_transformed,
    map_range,
    may_differentiate,
    pull_back,
    put,
    recomputed,
    size_of,
    split,
    sum_to,
    take,
    unconverted,
    unlinked,
)

MAX_SCORE_BYTES = 2**30
PIECE_BYTES = 2**24  # what a CPU's allocator recycles; larger tensors are mapped anew each time
NOMINAL_BATCH = 8  # an unknown batch counts as this many


@dataclass(frozen=True)
class Schedule:
    """How the tiles of a layout are worked off.

    Args:
        layout: a layout, cut into runs of chunks.
        heads: the heads of keys of a piece, a divisor of their number.
        streamed: whether the pieces run in a loop, one row of the batch each,
            and are worked out again in the backward pass; otherwise they stand
            in the graph one by one and keep their weights.
    """

    layout: object
    heads: int
    streamed: bool = False

    def num_pieces(self, batch, heads):
        chunks = sum(run.count for run in self.layout.runs())
        return (batch if self.streamed else 1) * chunks * (heads // self.heads)


def score_bytes(pairs, batch, heads, dtype):
    """Bytes that the scores of so many pairs of positions take in the softmax; an int."""
    batch = batch if isinstance(batch, int) else NOMINAL_BATCH
    return batch * heads * pairs * (8 if wide(dtype) == "float64" else 4)


def schedule(layout, batch, heads, dim, dtype, streamed=False, repeats=1):
    """A `Schedule` in pieces of about `PIECE_BYTES`, for a layout of known lengths.

    Args:
        layout: a layout.
        batch: int, or `None` while it is unknown.
        heads: int, those of keys.
        dim: features of a key or a value, whichever has more of them.
        dtype: that of the queries.
        streamed: whether the pieces run in a loop.
        repeats: how many heads of queries share a head of keys.
    """
    # What is largest in a piece: its scores, or the copies of its keys.
    pair = score_bytes(1, 1 if streamed else batch, 1, dtype) * max(repeats, layout.copies * dim)
    pair = max(1, int(pair))  # 0 if the batch is empty
    # To cut costs copies where chunks meet: a single head may take twice as much.
    layout = layout.cut(max(1, 2 * PIECE_BYTES // pair))
    largest = pair * max(run.scored_pairs for run in layout.runs())
    fitting = [x for x in range(1, heads + 1) if heads % x == 0 and x * largest <= PIECE_BYTES]
    return Schedule(layout, max(fitting, default=1), streamed)


@dataclass(frozen=True)
class Mask:
    """A mask of tiles: what `function` says of `tensors`, which broadcast to `(b, h, t, i, j)`."""

    function: object
    tensors: tuple


def allowed_by(masks, share=lambda tensor: tensor):
    """The pairs that all of some masks allow, at a share of their tensors."""
    return reduce(both_true, [mask.function(*map(share, mask.tensors)) for mask in masks])


@dataclass(frozen=True)
class Mods:
    """What is done to the scores of tiles.

    Args:
        mods: a tuple of `ScoreMod`.
        positions: for each run `(q_pos, k_pos, head)`, which broadcast to its tiles.
        tensors: for each mod its tensors.
        example: `(q_pos, k_pos, head)` of a pair that the pattern allows.
    """

    mods: tuple
    positions: list
    tensors: list
    example: tuple = (0, 0, 0)


def attend_tiles(
    schedule,
    query,
    key,
    value,
    masks,
    bias=(),
    mods=None,
    *,
    repeats=1,
    dropout=0.0,
    seeds=None,
    return_lse=False,
    zero_unanswered=False,
    zero_unseen=False,
):
    """Attention over the tiles of a layout.

    Scores lie in tiles `(b, h, t, i, j)`, or `(b, h, t, i, r, j)` where each
    head of keys serves `r` heads of queries; `h` is that of the keys.

    Args:
        schedule: a `Schedule`. With a bias, one of whole runs that is not streamed.
        query: `(b, n, h, (r d))`, already scaled and finite.
        key: `(b, m, h, d)`, finite.
        value: `(b, m, h, e)`, finite.
        masks: for each run, a list of `Mask`; a pair is allowed if all of them say so.
        bias: for each run, float tiles that broadcast to the scores; or nothing at all.
        mods: `Mods`, or `None`.
        repeats: `r`.
        dropout: the share of weights to drop.
        seeds: `(num_pieces, 2)` ints, for dropout.
        return_lse: whether `lse` is wanted.
        zero_unanswered: whether a query with no allowed key must get 0.
        zero_unseen: whether keys and values may hold NaN or infinite numbers where
            no query of their tile may attend to them.

    Returns:
        `(out, lse)` of shapes `(b, n, h, (r e))` and `(b, n, h, r)`. Where no key
        is allowed, `out` is 0 or any finite number and `lse` below `MASKED`.
        `lse` is float32 or wider, before dropout, and `None` unless it was wanted.
    """
    differentiable = [query, key, value, *bias, *(_flat(mods.tensors) if mods else [])]
    inputs = [*differentiable, *([] if seeds is None else [seeds])]
    inputs += [x for terms in masks for mask in terms for x in mask.tensors]
    inputs += _flat(mods.positions) if mods else []
    num_inputs = len(inputs)
    # Of a plain function it is not known what it needs a gradient for.
    written_out = mods is None or is_differentiable(mods.mods)
    written_out = written_out and not is_traced_to_export()
    # Of tensors of a transform nothing can be held: there autograd keeps what it needs.
    transformed = is_transformed()
    written_out = written_out and (schedule.streamed or not transformed)
    keep = written_out and not schedule.streamed and may_differentiate(differentiable)

    def pieces(inputs, keep):
        # All tensors are arguments: JAX cannot recompute a function that closes over one.
        inputs = iter(inputs)
        qkv = [next(inputs) for _ in range(3)]
        given_bias = [next(inputs) for _ in bias]
        tensors = _like(mods.tensors, inputs) if mods else []
        given_seeds = None if seeds is None else next(inputs)
        given_masks = [
            [Mask(mask.function, tuple(next(inputs) for _ in mask.tensors)) for mask in terms]
            for terms in masks
        ]
        given_mods = None
        if mods:
            given_mods = replace(mods, positions=_like(mods.positions, inputs), tensors=tensors)
        options = {"seeds": given_seeds, "dropout": dropout, "keep": keep, "repeats": repeats}
        options |= {"return_lse": return_lse, "zero_unanswered": zero_unanswered}
        options["zero_unseen"] = zero_unseen
        return _Pieces(schedule, qkv, given_masks, given_bias, given_mods, **options)

    def anew(*given):
        *given, upstream = given
        again = pieces(given, keep)
        return again.backward(again.forward(), upstream)

    @custom_gradient
    def core(*inputs):
        once = pieces(inputs, keep)
        packed = once.forward()
        held = [] if transformed else [(once, unlinked(packed))]

        @unconverted
        def grad(*given, upstream=None):
            if upstream is None:  # TensorFlow and JAX pass the gradient alone
                found = held[0][0].backward(held[0][1], *given)
            elif held and not may_differentiate(given):
                # PyTorch holds this function as long as the output; what it holds may go.
                once, packed = held.pop()
                found = once.backward(packed, upstream)
            else:  # a second time, or to be differentiated itself: then from the inputs
                found = (recomputed(anew) if schedule.streamed else anew)(*given, upstream)
            return *found, *[None] * (num_inputs - len(found))

        return packed, grad

    packed = core(*inputs) if written_out else pieces(inputs, keep).forward()
    out, lse = _unpack(packed, repeats, return_lse)
    return ops.cast(out, query.dtype), lse


def _flat(lists):
    return [x for each in lists for x in each]


def _like(lists, tensors):
    """The next of some tensors, in lists as long as these."""
    return [tuple(next(tensors) for _ in each) for each in lists]


def _pack(out, lse):
    """One tensor for both: a custom gradient has one output on every backend."""
    return out if lse is None else ops.concatenate([ops.cast(out, lse.dtype), lse], axis=-1)


def _unpack(packed, repeats, has_lse):
    """Of `(b, n, h, (r c))`, what was packed: `(b, n, h, (r e))` and `(b, n, h, r)` or `None`."""
    if not has_lse:
        return packed, None
    packed = rearrange(packed, "b n h (r c) -> b n h r c", r=repeats)
    out, lse = split(packed, [packed.shape[-1] - 1], axis=-1)
    return rearrange(out, "b n h r e -> b n h (r e)"), rearrange(lse, "b n h r 1 -> b n h r")


@dataclass(frozen=True)
class _Piece:
    """Where a piece lies; its numbers are ints, or int tensors within a loop.

    Args:
        run: its run, and `run_index` the number of that.
        row: its row of the batch, or `None` for all of them.
        chunk: its chunk in the run.
        group: its group of heads.
        number: its place among all pieces.
    """

    run: Run
    run_index: int
    row: object
    chunk: object
    group: object
    number: object

    @property
    def layout(self):
        return self.run.layout.of_chunk(self.chunk)


class _Found(NamedTuple):
    """What comes of a piece, or of some: lists of tensors.

    Args:
        queries: the one tensor `(b, i, h, d)` of its queries.
        keys: tensors `(b, j, h, d)` of its keys, any number of them.
        sums: tensors that are added up over all pieces, any number of them.
    """

    queries: list
    keys: list
    sums: list


class _Cut:
    """A schedule at the sizes of a call: from tensors to pieces, and back.

    A tensor of queries or keys `(b, n, h, d)` is made ready once, by
    `query_rows` or `key_rows`; `queries` and `keys` then take a piece's tiles.
    """

    def __init__(self, schedule, query, key):
        self.streamed, self.heads = schedule.streamed, schedule.heads
        self.runs = schedule.layout.runs()
        self.n, self.m = size_of(query, 1), size_of(key, 1)
        self.batch, self.groups = size_of(query, 0), query.shape[2] // self.heads
        # Chunks may reach beyond the ends: padding, so that they can be sliced.
        parts = [run for run in self.runs if run.queries is not None]
        self.q_rows = max((x.q_start + x.count * x.queries for x in parts), default=self.n)
        parts = [run for run in parts if run.keys is not None]
        self.k_start = min((x.k_start for x in parts), default=0)
        ends = [x.k_start + (x.count - 1) * x.key_step + x.keys for x in parts]
        self.k_rows = max(ends, default=self.m) - self.k_start

    # ---- Tensors ----

    def query_rows(self, x):
        return self._by_heads(crop(x, 0, self.q_rows))

    def key_rows(self, x):
        return self._by_heads(crop(x, self.k_start, self.k_rows))

    def queries(self, piece, x):
        run = piece.run
        start = None if run.queries is None else run.q_start + piece.chunk * run.queries
        return piece.layout.split_queries(self._slice(x, piece, start, run.queries))[0]

    def keys(self, piece, x):
        run = piece.run
        start = None
        if run.keys is not None:
            start = run.k_start - self.k_start + piece.chunk * run.key_step
        rows = self._slice(x, piece, start, run.keys)
        return piece.layout.split_keys(rows, run.queries or self.n)[0]

    def from_queries(self, piece, tile):
        """The inverse of `queries`, for one piece."""
        return piece.layout.join([tile], piece.run.queries or self.n)

    def from_keys(self, piece, tile):
        """The adjoint of `keys`, for one piece."""
        run = piece.run
        return piece.layout.sum_keys([tile], run.queries or self.n, run.keys or self.m)

    def tile(self, piece, x):
        """The piece's share of tiles `(b|1, h|1, t|1, i|1, ...)` that lie at all pieces."""
        if piece.row is not None and x.shape[0] != 1:
            x = take(x, piece.row, 1, axis=0)
        if self.groups > 1 and x.shape[1] != 1:
            x = take(x, piece.group * self.heads, self.heads, axis=1)
        return piece.run.tile(x, piece.chunk)

    def _is_whole(self):
        return self.groups == 1 and not self.streamed

    def _by_heads(self, x):
        """Heads first: to slice the first axis is no copy."""
        return x if self._is_whole() else rearrange(x, "b n h d -> h b n d")

    def _slice(self, x, piece, start, rows):
        """The heads of a piece, in `rows` from `start` on, or in all rows."""
        if self._is_whole():
            return x if rows is None else take(x, start, rows, axis=1)
        x = take(x, piece.group * self.heads, self.heads, axis=0)
        if piece.row is not None:
            x = take(x, piece.row, 1, axis=1)
        if rows is not None:
            x = take(x, start, rows, axis=2)
        return rearrange(x, "h b n d -> b n h d")

    # ---- Pieces ----

    def each(self, body):
        """Apply `body` to every piece.

        Args:
            body: a function of a `_Piece`. It returns `_Found`.

        Returns:
            `_Found` for all of them: `(b, n, h, d)` of the queries, `(b, m, h, d)`
            of the keys.
        """
        latest = deque([[]] * AT_ONCE, maxlen=AT_ONCE)
        before, found = 0, []
        for index, run in enumerate(self.runs):
            if self.streamed:
                with after(_flat(found[-1]) if found else []):
                    found.append(self._stream(body, index, before))
            else:
                found.append(self._unroll(body, index, before, latest))
            before += run.count * self.groups * (self.batch if self.streamed else 1)
        rows = [rearrange(x.queries[0], "b c i h d -> b (c i) h d") for x in found]
        keys = zip(*(x.keys for x in found), strict=True)
        sums = []
        for x in found:
            sums = _add(sums, x.sums)
        queries = crop(_join(rows, axis=1), 0, self.n)
        return _Found([queries], [self._sum(x) for x in keys], sums)

    def _unroll(self, body, index, before, latest):
        """The pieces of a run one by one: `_Found` of tensors `(b, c, i, h, d)`."""
        run = self.runs[index]
        rows, keys, key_sums, sums = [], [], [], []
        for chunk in range(run.count):
            found = []
            for group in range(self.groups):
                number = before + chunk * self.groups + group
                with after(latest[0]):
                    found.append(body(_Piece(run, index, None, chunk, group, number)))
                latest.append(_flat(found[-1]))
                sums = _add(sums, found[-1].sums)
            (of_queries,) = _join_each([x.queries for x in found], axis=2)
            of_keys = _join_each([x.keys for x in found], axis=2)
            rows.append(of_queries)
            if run.count > 1 and run.shares_keys:
                key_sums = _add(key_sums, of_keys)
            else:
                keys.append(of_keys)
        keys = [ops.stack(x, axis=1) for x in zip(*keys, strict=True)]
        keys += [ops.cast(x, rows[0].dtype)[:, None] for x in key_sums]
        return _Found([ops.stack(rows, axis=1)], keys, sums)

    def _stream(self, body, index, before):
        """The pieces of a run in a loop: `_Found` of tensors `(b, c, i, h, d)`."""
        run, groups = self.runs[index], self.groups
        sizes = {"c": run.count, "g": groups}
        shape = []  # how many tensors of each kind there are, once it is known

        def at(row, chunk, group):
            number = before + (row * run.count + chunk) * groups + group
            found = body(_Piece(run, index, row, chunk, group, number))
            shape[:] = [len(kind) for kind in found]
            return found

        @unconverted
        def piece(x):
            return _flat(at(x // (groups * run.count), x // groups % run.count, x % groups))

        @unconverted
        def chunks(x):
            """The chunks of a row and a group, one after the other: their keys are added up."""

            def add(chunk, so_far):
                (queries,), keys, sums = at(x // groups, chunk, x % groups)
                rows, *totals = so_far
                rows = put(rows, queries, (0, chunk * run.queries, 0, 0))
                return [rows, *_add(totals, [*keys, *sums])]

            (queries,), keys, sums = at(x // groups, 0, x % groups)
            rows = crop(queries, 0, run.count * run.queries)
            first = [rows, *_add([], [*keys, *sums])]
            rows, *totals = fold_range(unconverted(add), run.count, first)
            of_keys, sums = totals[: len(keys)], totals[len(keys) :]
            return [rows, *[ops.cast(total, rows.dtype) for total in of_keys], *sums]

        folded = run.count > 1 and run.shares_keys
        count = self.batch * groups * (1 if folded else run.count)
        found = map_range(chunks if folded else piece, count)
        of_queries, *of_keys = found[: 1 + shape[1]]
        sums = [ops.sum(ops.cast(x, wide(x.dtype)), axis=0) for x in found[1 + shape[1] :]]
        if folded:
            queries = rearrange(of_queries, "(b g) 1 (c i) h d -> b c i (g h) d", **sizes)
            keys = [rearrange(x, "(b g) 1 j h d -> b 1 j (g h) d", g=groups) for x in of_keys]
            return _Found([queries], keys, sums)
        queries, *keys = [
            rearrange(x, "(b c g) 1 i h d -> b c i (g h) d", **sizes)
            for x in (of_queries, *of_keys)
        ]
        return _Found([queries], keys, sums)

    def _sum(self, runs):
        if len(runs) == 1:
            return self.runs[0].sum_keys(runs[0], self.m)
        rows = [run.sum_chunks(x) for run, x in zip(self.runs, runs, strict=True)]
        return sum_rows(rows, [run.k_start for run in self.runs], self.m)


class _Pieces:
    """The forward and the backward pass over all pieces."""

    def __init__(
        self,
        schedule,
        tensors,
        masks,
        bias,
        mods,
        *,
        repeats,
        seeds,
        dropout,
        keep,
        return_lse,
        zero_unanswered,
        zero_unseen,
    ):
        query, key, value = tensors
        self.cut, self.repeats = _Cut(schedule, query, key), repeats
        self.masks, self.bias, self.seeds, self.dropout = masks, bias, seeds, dropout
        self.mods = mods
        self.return_lse, self.zero_unanswered = return_lse, zero_unanswered
        self.zero_unseen = zero_unseen
        self.dtype = self.score_dtype = keras.backend.standardize_dtype(query.dtype)
        # A mask adds 0 or `LOWEST`, which bfloat16 has; and all softmaxes sum it up in float32.
        if self.dtype != "bfloat16" or return_lse or bias or mods:
            self.score_dtype = wide(self.dtype)
        self.query = self.cut.query_rows(query)
        self.key, self.value = self.cut.key_rows(key), self.cut.key_rows(value)
        self.keep, self.kept, self.tables, self.latest = keep, {}, {}, None
        # Whether more is asked of a mask than its table.
        self.need_allowed = zero_unseen or (
            mods is not None and not are_defined_everywhere(mods.mods)
        )

    def forward(self):
        (packed,), *_ = self.cut.each(self._forward)
        self._forget_masks()
        return packed

    def _forget_masks(self):
        self.tables.clear()
        self.latest = None

    def _forward(self, piece):
        query, key, value = self._tiles(piece)
        weighed, lse = self._weigh(piece, query, key, self.return_lse)
        if self.keep:
            self.kept[piece.number] = weighed
        weights, drop, answered = weighed
        out = self._spread(average(drop(weights), value))
        packed = _pack(zero_masked(out, answered), lse)
        return _Found([self.cut.from_queries(piece, self._joined(packed))], [], [])

    def backward(self, packed, d_packed):
        """The gradients by query, key, value, each bias and each tensor of the mods."""
        out, _ = _unpack(packed, self.repeats, self.return_lse)
        d_out, d_lse = _unpack(d_packed, self.repeats, self.return_lse)
        products = ops.cast(out, wide(self.dtype)) * ops.cast(d_out, wide(self.dtype))
        delta = ops.sum(rearrange(products, "b n h (r e) -> b n h r e", r=self.repeats), axis=-1)
        if self.dtype == wide(self.dtype) and d_lse is not None:
            delta, d_lse = delta - d_lse, None
        d_bias = []
        body = partial(
            self._backward,
            d_out=self.cut.query_rows(ops.cast(d_out, self.dtype)),
            rows=[None if x is None else self.cut.query_rows(x) for x in (delta, d_lse)],
            d_bias=d_bias,
        )
        (d_query,), d_keys, d_tensors = self.cut.each(body)
        self._forget_masks()
        tensors = _flat(self.mods.tensors) if self.mods else []
        d_tensors = [ops.cast(d, x.dtype) for d, x in zip(d_tensors, tensors, strict=True)]
        return d_query, *d_keys, *d_bias, *d_tensors

    def _backward(self, piece, d_out, rows, d_bias):
        query, key, value = self._tiles(piece)
        if self.keep:
            weights, drop, answered = self.kept[piece.number]
        else:
            (weights, drop, answered), _ = self._weigh(piece, query, key)
        d_out, delta, d_lse = (
            None if x is None else self._rows(self.cut.queries(piece, x)) for x in (d_out, *rows)
        )
        if answered is not None:
            d_out = self._flat(zero_masked(self._spread(d_out), answered))
        d_value, d_scores = weight_gradients(value, weights, drop, d_out, delta, d_lse)
        if self.bias:  # it comes with pieces of whole runs
            d_bias.append(sum_to(self._spread(d_scores), self.bias[piece.run_index]))
        d_scores, d_tensors = self._through_mods(piece, query, key, d_scores)
        d_query, d_key = score_gradients(query, key, d_scores)
        d_query = self._joined(self._spread(d_query))
        return _Found(
            [self.cut.from_queries(piece, d_query)],
            [self.cut.from_keys(piece, x) for x in (d_key, d_value)],
            d_tensors,
        )

    def _tiles(self, piece):
        keys = [self.cut.keys(piece, x) for x in (self.key, self.value)]
        if self.zero_unseen:
            seen = self._mask(piece).seen(self.repeats)
            keys = [zero_masked(x, seen) for x in keys]
        return self._rows(self.cut.queries(piece, self.query)), *keys

    # Heads of queries that share keys are features of one head outside of the tiles, more rows
    # in products with keys, and an axis of their own where masks are added: no copy lies between.

    def _rows(self, x):
        if self.repeats == 1:
            return x
        return rearrange(x, "b h t i (r d) -> b h t (i r) d", r=self.repeats)

    def _spread(self, x):
        if self.repeats == 1:
            return x
        return rearrange(x, "b h t (i r) d -> b h t i r d", r=self.repeats)

    def _flat(self, x):
        return x if self.repeats == 1 else rearrange(x, "b h t i r d -> b h t (i r) d")

    def _joined(self, x):
        return x if self.repeats == 1 else rearrange(x, "b h t i r d -> b h t i (r d)")

    # ---- Scores and weights ----

    def _weigh(self, piece, query, key, return_lse=False):
        """The softmax weights of a piece and what is told of them.

        Returns:
            `(weights, drop, answered), lse`: `drop` is what dropout does to
            the weights; `answered` says which queries have a key, or is `None`
            where that does not matter.
        """
        mask = self._mask(piece)
        tables, allowed = mask.tables, mask.allowed
        scores = self._spread(score(query, key, self.score_dtype))
        if self.mods and only_add(self.mods.mods):
            tables = [self._mods(piece, add_biases, self.score_dtype), *tables]
        elif self.mods:
            scores, allowed = self._mods(piece, apply_mods, scores)
        if allowed is not mask.allowed:  # a mod may have forbidden some
            tables = [additive_mask(allowed, self.score_dtype)]
        if self.bias:
            tables = [self.bias[piece.run_index], *tables]
        for table in tables:
            scores = scores + table
        weights = softmax(scores)
        lse = ops.expand_dims(log_sum_exp(scores, weights), -1) if return_lse else None
        answered = mask.answered
        if self.zero_unanswered and self.mods and not are_defined_everywhere(self.mods.mods):
            answered = ops.any(is_not_masked(scores), axis=-1, keepdims=True)
        weights = self._flat(ops.cast(weights, self.dtype))
        return (weights, self._drop(piece, ops.shape(weights)), answered), lse

    def _mods(self, piece, function, first, tensors=None):
        """`apply_mods` or `add_biases` at the pairs of a piece."""
        mods, positions = self.mods, self.mods.positions[piece.run_index]
        positions = tuple(self.cut.tile(piece, x) for x in positions)
        tensors = mods.tensors if tensors is None else tensors
        allowed = self._mask(piece).allowed
        return function(mods.mods, first, positions, tensors, allowed, mods.example)

    def _through_mods(self, piece, query, key, d_scores):
        """The gradients by the scores before the mods, and by their tensors: a list."""
        if not self.mods:
            return d_scores, []
        flat = _flat(self.mods.tensors)

        def bias(*flat):
            tensors = _like(self.mods.tensors, iter(flat))
            return self._mods(piece, add_biases, self.score_dtype, tensors)

        def modify(scores, *flat):
            tensors = _like(self.mods.tensors, iter(flat))
            return self._mods(piece, apply_mods, scores, tensors)[0]

        d_wide = ops.cast(self._spread(d_scores), self.score_dtype)
        if not only_add(self.mods.mods):
            scores = self._spread(score(query, key, self.score_dtype))
            d_wide, *d_tensors = pull_back(modify, [scores, *flat], d_wide)
            return self._flat(ops.cast(d_wide, self.dtype)), d_tensors
        if not flat:
            return d_scores, []
        return d_scores, pull_back(bias, flat, sum_to(d_wide, bias(*flat)))

    def _mask(self, piece):
        """The `_TileMask` of a piece."""
        masks = self.masks[piece.run_index]
        if not masks:
            return _TileMask()
        if self.cut.streamed:  # where it lies, only the loop knows
            if self.latest is None or self.latest[0] is not piece:
                self.latest = piece, self._make_mask(piece, masks)
            return self.latest[1]
        shared = all(x.shape[1] == 1 for mask in masks for x in mask.tensors)  # by all heads
        place = piece.run_index, piece.chunk, None if shared else piece.group
        if place not in self.tables:
            self.tables[place] = self._make_mask(piece, masks)
        return self.tables[place]

    def _make_mask(self, piece, masks):
        allowed = allowed_by(masks, partial(self.cut.tile, piece))
        answered = ops.any(allowed, axis=-1, keepdims=True) if self.zero_unanswered else None
        table = additive_mask(allowed, self.score_dtype)
        return _TileMask(allowed if self.need_allowed else None, [table], answered)

    def _drop(self, piece, shape):
        """What dropout does to the weights of a piece; the same each time."""
        if not self.dropout:
            return lambda weights: weights
        seed = _Seed(take(self.seeds, piece.number, 1, axis=0)[0])
        keep = keras.random.uniform(shape, dtype="float32", seed=seed) >= self.dropout

        def drop(weights):
            scaled = weights / (1 - self.dropout)
            return ops.where(keep, scaled, ops.zeros((), weights.dtype))

        return drop


class _TileMask(NamedTuple):
    """What is masked in the tiles of a piece.

    Args:
        allowed: bools that broadcast with the scores; `None` where all are allowed, and
            where nobody asks.
        tables: the same as tables to add to the scores: one, or none.
        answered: `(..., 1)` bools: which queries have a key; `None` where it does not matter.
    """

    allowed: object = None
    tables: list = ()
    answered: object = None

    def seen(self, repeats):
        """Which keys a query of their tile may attend to, `(b|1, h|1, t, j)`; `None` for all."""
        if self.allowed is None:
            return None
        return ops.any(self.allowed, axis=3 if repeats == 1 else (3, 4))


class _Seed(keras.random.SeedGenerator):
    """A generator that has one seed to give, and no state."""

    def __init__(self, seed):
        self.seed = seed

    def next(self, ordered=True):
        return ops.cast(self.seed, "uint32") if keras.backend.backend() == "jax" else self.seed


def _add(sums, tensors):
    """Add tensors to their sums so far, of which there are none at first, in float32 or wider."""
    if not sums:
        return [ops.cast(x, wide(x.dtype)) for x in tensors]
    return [total + ops.cast(x, total.dtype) for total, x in zip(sums, tensors, strict=True)]


def _join_each(lists, axis):
    return [_join(tensors, axis) for tensors in zip(*lists, strict=True)]


def _join(tensors, axis):
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors, axis=axis)
