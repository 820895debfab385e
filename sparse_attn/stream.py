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

import operator
from collections import deque
from dataclasses import dataclass
from functools import partial, reduce

import keras
from einops import rearrange
from keras import ops

from sparse_attn.attend import average, gradients, log_sum_exp, weigh
from sparse_attn.layouts import Run, crop, sum_rows, take
from sparse_attn.masking import additive_mask, wide, zero_masked
from sparse_attn.tracing import (
    AT_ONCE,
    after,
    fold_range,
    map_range,
    may_differentiate,
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
        heads: the heads of a piece, a divisor of the number of heads.
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


def schedule(layout, batch, heads, dim, dtype, streamed=False):
    """A `Schedule` in pieces of about `PIECE_BYTES`, for a layout of known lengths.

    Args:
        layout: a layout.
        batch: int, or `None` while it is unknown.
        heads: int.
        dim: features of a key or a value, whichever has more of them.
        dtype: that of the queries.
        streamed: whether the pieces run in a loop.
    """
    # What is largest in a piece: its scores, or the copies of its keys.
    pair = score_bytes(1, 1 if streamed else batch, 1, dtype) * max(1, layout.copies * dim)
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
    return reduce(operator.and_, [mask.function(*map(share, mask.tensors)) for mask in masks])


def attend_tiles(
    schedule,
    query,
    key,
    value,
    masks,
    bias=(),
    *,
    dropout=0.0,
    seeds=None,
    return_lse=False,
    zero_unanswered=False,
):
    """Attention over the tiles of a layout.

    Args:
        schedule: a `Schedule`. With a bias, one of whole runs that is not streamed.
        query: `(b, n, h, d)`, already scaled and finite.
        key: `(b, m, h, d)`, finite.
        value: `(b, m, h, e)`, finite.
        masks: for each run, a list of `Mask`; a pair is allowed if all of them say so.
        bias: for each run, float tiles that broadcast to `(b, h, t, i, j)`; or nothing at all.
        dropout: the share of weights to drop.
        seeds: `(num_pieces, 2)` ints, for dropout.
        return_lse: whether `lse` is wanted.
        zero_unanswered: whether a query with no allowed key must get 0.

    Returns:
        `(out, lse)` of shapes `(b, n, h, e)` and `(b, n, h, 1)`. Where no key
        is allowed, `out` is 0 or any finite number and `lse` below `MASKED`.
        `lse` is float32 or wider, before dropout, and `None` unless it was wanted.
    """
    seeds = [] if seeds is None else [seeds]
    tensors = [*bias, *seeds, *[x for terms in masks for mask in terms for x in mask.tensors]]
    keep = not schedule.streamed and may_differentiate([query, key, value, *bias])

    def pieces(inputs, keep):
        # All tensors are arguments: JAX cannot recompute a function that closes over one.
        inputs = iter(inputs)
        qkv = [next(inputs) for _ in range(3)]
        given_bias = [next(inputs) for _ in bias]
        given_seeds = next(inputs) if seeds else None
        given_masks = [
            [Mask(mask.function, tuple(next(inputs) for _ in mask.tensors)) for mask in terms]
            for terms in masks
        ]
        options = {"seeds": given_seeds, "dropout": dropout, "keep": keep}
        options |= {"return_lse": return_lse, "zero_unanswered": zero_unanswered}
        return _Pieces(schedule, qkv, given_masks, given_bias, **options)

    @ops.custom_gradient
    def core(*inputs):
        once = pieces(inputs, keep)
        packed = once.forward()
        held = [(once, unlinked(packed))]

        @unconverted
        def grad(*given, upstream=None):
            if upstream is None:  # TensorFlow and JAX pass the gradient alone
                found = held[0][0].backward(held[0][1], *given)
            elif held and not may_differentiate(given):
                # PyTorch holds this function as long as the output; what it holds may go.
                once, packed = held.pop()
                found = once.backward(packed, upstream)
            else:  # a second time, or to be differentiated itself: then from the inputs
                again = pieces(given, keep)
                found = again.backward(again.forward(), upstream)
            return *found, *[None] * (3 + len(tensors) - len(found))

        return packed, grad

    out, lse = _unpack(core(query, key, value, *tensors), return_lse)
    return ops.cast(out, query.dtype), lse


def _pack(out, lse):
    """One tensor for both: a custom gradient has one output on every backend."""
    return out if lse is None else ops.concatenate([ops.cast(out, lse.dtype), lse], axis=-1)


def _unpack(packed, has_lse):
    return ops.split(packed, [packed.shape[-1] - 1], axis=-1) if has_lse else (packed, None)


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


class _Cut:
    """A schedule at the sizes of a call: from tensors to pieces, and back.

    A tensor of queries or keys `(b, n, h, d)` is made ready once, by
    `query_rows` or `key_rows`; `queries` and `keys` then take a piece's tiles.
    """

    def __init__(self, schedule, query, key):
        self.streamed, self.heads = schedule.streamed, schedule.heads
        self.runs = schedule.layout.runs()
        self.n, self.m = ops.shape(query)[1], ops.shape(key)[1]
        self.batch, self.groups = ops.shape(query)[0], query.shape[2] // self.heads
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
        """The piece's share of tiles `(b|1, h|1, t|1, i|1, j)` that lie at all pieces."""
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
            body: a function of a `_Piece`. It returns tensors `(b, i, h, d)`:
                one of the piece's queries, and any number of its keys.

        Returns:
            Tensors `(b, n, h, d)` of the queries, and `(b, m, h, d)` of the keys.
        """
        latest = deque([[]] * AT_ONCE, maxlen=AT_ONCE)
        before, found = 0, []
        for index, run in enumerate(self.runs):
            if self.streamed:
                with after(found[-1] if found else []):
                    found.append(self._stream(body, index, before))
            else:
                found.append(self._unroll(body, index, before, latest))
            before += run.count * self.groups * (self.batch if self.streamed else 1)
        queries, *keys = zip(*found, strict=True)
        rows = [rearrange(x, "b c i h d -> b (c i) h d") for x in queries]
        return [crop(_join(rows, axis=1), 0, self.n), *[self._sum(x) for x in keys]]

    def _unroll(self, body, index, before, latest):
        """The pieces of a run one by one: tensors `(b, c, i, h, d)`."""
        run = self.runs[index]
        rows, keys, sums = [], [], []
        for chunk in range(run.count):
            found = []
            for group in range(self.groups):
                number = before + chunk * self.groups + group
                with after(latest[0]):
                    found.append(body(_Piece(run, index, None, chunk, group, number)))
                latest.append(found[-1])
            of_queries, *of_keys = [_join(x, axis=2) for x in zip(*found, strict=True)]
            rows.append(of_queries)
            if run.count > 1 and run.shares_keys:
                sums = _add(sums, of_keys)
            else:
                keys.append(of_keys)
        found = [ops.stack(x, axis=1) for x in (rows, *zip(*keys, strict=True))]
        return found + [ops.cast(x, rows[0].dtype)[:, None] for x in sums]

    def _stream(self, body, index, before):
        """The pieces of a run in a loop: tensors `(b, c, i, h, d)`."""
        run, groups = self.runs[index], self.groups

        def at(row, chunk, group):
            number = before + (row * run.count + chunk) * groups + group
            return body(_Piece(run, index, row, chunk, group, number))

        @unconverted
        def piece(x):
            return at(x // (groups * run.count), x // groups % run.count, x % groups)

        @unconverted
        def chunks(x):
            """The chunks of a row and a group, one after the other: their keys are added up."""

            def add(chunk, so_far):
                queries, *keys = at(x // groups, chunk, x % groups)
                rows, *sums = so_far
                rows = ops.slice_update(rows, (0, chunk * run.queries, 0, 0), queries)
                return [rows, *_add(sums, keys)]

            queries, *keys = at(x // groups, 0, x % groups)
            rows = crop(queries, 0, run.count * run.queries)
            first = [rows, *_add([], keys)]
            rows, *sums = fold_range(unconverted(add), run.count, first)
            return [rows, *[ops.cast(total, rows.dtype) for total in sums]]

        sizes = {"c": run.count, "g": groups}
        if run.count == 1 or not run.shares_keys:
            found = map_range(piece, self.batch * run.count * groups)
            return [rearrange(x, "(b c g) 1 i h d -> b c i (g h) d", **sizes) for x in found]
        rows, *sums = map_range(chunks, self.batch * groups)
        rows = rearrange(rows, "(b g) 1 (c i) h d -> b c i (g h) d", **sizes)
        return [rows, *[rearrange(x, "(b g) 1 j h d -> b 1 j (g h) d", g=groups) for x in sums]]

    def _sum(self, runs):
        if len(runs) == 1:
            return self.runs[0].sum_keys(runs[0], self.m)
        rows = [run.sum_chunks(x) for run, x in zip(self.runs, runs, strict=True)]
        return sum_rows(rows, [run.k_start for run in self.runs], self.m)


class _Pieces:
    """The forward and the backward pass over all pieces."""

    def __init__(
        self, schedule, tensors, masks, bias, *, seeds, dropout, keep, return_lse, zero_unanswered
    ):
        query, key, value = tensors
        self.cut = _Cut(schedule, query, key)
        self.masks, self.bias, self.seeds, self.dropout = masks, bias, seeds, dropout
        self.return_lse, self.zero_unanswered = return_lse, zero_unanswered
        self.dtype = self.score_dtype = keras.backend.standardize_dtype(query.dtype)
        # A mask adds 0 or `LOWEST`, which bfloat16 has; and all softmaxes sum it up in float32.
        if self.dtype != "bfloat16" or return_lse or bias:
            self.score_dtype = wide(self.dtype)
        self.query = self.cut.query_rows(query)
        self.key, self.value = self.cut.key_rows(key), self.cut.key_rows(value)
        self.keep, self.kept, self.tables = keep, {}, {}

    def forward(self):
        (packed,) = self.cut.each(self._forward)
        self.tables.clear()
        return packed

    def _forward(self, piece):
        query, key, value = self._tiles(piece)
        weighed, lse = self._weigh(piece, query, key, self.return_lse)
        if self.keep:
            self.kept[piece.number] = weighed
        weights, drop, answered = weighed
        out = zero_masked(average(drop(weights), value), answered)
        return (self.cut.from_queries(piece, _pack(out, lse)),)

    def backward(self, packed, d_packed):
        """The gradients by query, key, value and each bias."""
        out, _ = _unpack(packed, self.return_lse)
        d_out, d_lse = _unpack(d_packed, self.return_lse)
        out, d_wide = (ops.cast(x, wide(self.dtype)) for x in (out, d_out))
        delta = ops.sum(out * d_wide, axis=-1, keepdims=True)
        delta = delta if d_lse is None else delta - d_lse
        d_bias = []
        body = partial(
            self._backward,
            d_out=self.cut.query_rows(ops.cast(d_out, self.dtype)),
            delta=self.cut.query_rows(delta),
            d_bias=d_bias,
        )
        return *self.cut.each(body), *d_bias

    def _backward(self, piece, d_out, delta, d_bias):
        query, key, value = self._tiles(piece)
        if self.keep:
            weights, drop, answered = self.kept[piece.number]
        else:
            (weights, drop, answered), _ = self._weigh(piece, query, key)
        d_out, delta = (self.cut.queries(piece, x) for x in (d_out, delta))
        d_query, d_key, d_value, d_scores = gradients(
            query, key, value, weights, drop, zero_masked(d_out, answered), delta
        )
        if self.bias:  # it comes with pieces of whole runs
            d_bias.append(_sum_to(d_scores, self.bias[piece.run_index]))
        d_keys = (self.cut.from_keys(piece, x) for x in (d_key, d_value))
        return self.cut.from_queries(piece, d_query), *d_keys

    def _tiles(self, piece):
        keys = (self.cut.keys(piece, x) for x in (self.key, self.value))
        return self.cut.queries(piece, self.query), *keys

    def _weigh(self, piece, query, key, return_lse=False):
        """The softmax weights of a piece and what is told of them.

        Returns:
            `(weights, drop, answered), lse`: `drop` is what dropout does to
            the weights; `answered` says which queries have a key, or is `None`
            where that does not matter.
        """
        mask, answered = self._mask(piece)
        bias = [self.bias[piece.run_index]] if self.bias else []
        scores, weights = weigh(query, key, bias + mask, self.score_dtype)
        lse = log_sum_exp(scores, weights)[..., None] if return_lse else None
        weights = ops.cast(weights, self.dtype)
        return (weights, self._drop(piece, ops.shape(weights)), answered), lse

    def _mask(self, piece):
        """A list of the table that masks a piece, if any, and its `answered`."""
        masks = self.masks[piece.run_index]
        if not masks:
            return [], None
        if self.cut.streamed:  # where it lies, only the loop knows
            return self._make_mask(piece, masks)
        shared = all(x.shape[1] == 1 for mask in masks for x in mask.tensors)  # by all heads
        place = piece.run_index, piece.chunk, None if shared else piece.group
        if place not in self.tables:
            self.tables[place] = self._make_mask(piece, masks)
        return self.tables[place]

    def _make_mask(self, piece, masks):
        allowed = allowed_by(masks, partial(self.cut.tile, piece))
        answered = ops.any(allowed, axis=-1, keepdims=True) if self.zero_unanswered else None
        return [additive_mask(allowed, self.score_dtype)], answered

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


def _join(tensors, axis):
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors, axis=axis)


def _sum_to(x, like):
    """Sum `x` over the axes along which `like` was broadcast."""
    axes = tuple(axis for axis in range(len(x.shape)) if like.shape[axis] == 1)
    return ops.cast(ops.sum(x, axis=axes, keepdims=True) if axes else x, like.dtype)
