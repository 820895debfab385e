"""Attention over the tiles of a layout, piece by piece.

A piece is some heads of one chunk of a layout's run. Pieces are so small that
the memory of one serves the next. Where the scores of a call fit into
`max_score_bytes`, the softmax weights of all pieces are kept for the backward
pass. Otherwise the pieces run one after another, and the backward pass works
the weights of each out again, so that the scores of few pieces exist at a time.

The backward pass is written out: nothing of the size of the scores is kept but
the weights, and no framework differentiates through the pieces.
"""

import itertools
from dataclasses import dataclass

import keras
from einops import rearrange
from keras import ops

from sparse_attn.attend import average, gradients, log_sum_exp, weigh
from sparse_attn.layouts import Run, crop, sum_rows
from sparse_attn.masking import additive_mask, wide
from sparse_attn.tracing import after, unconverted

MAX_SCORE_BYTES = 2**30
PIECE_BYTES = 2**24  # what a CPU's allocator recycles; larger tensors are mapped anew each time
AT_ONCE = 2  # pieces that a graph of TensorFlow works on at the same time
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
    """Bytes that the scores of so many pairs of positions take; an int."""
    batch = batch if isinstance(batch, int) else NOMINAL_BATCH
    return batch * heads * pairs * (8 if wide(dtype) == "float64" else 4)


def schedule(layout, batch, heads, dtype, streamed=False):
    """A `Schedule` in pieces of about `PIECE_BYTES` of scores, for a layout of known lengths."""
    pair = score_bytes(1, 1 if streamed else batch, 1, dtype)
    # To cut costs copies where chunks meet: a single head may take twice as much.
    layout = layout.cut(max(1, 2 * PIECE_BYTES // pair))
    largest = pair * max(run.scored_pairs for run in layout.runs())
    fitting = [x for x in range(1, heads + 1) if heads % x == 0 and x * largest <= PIECE_BYTES]
    return Schedule(layout, max(fitting, default=1), streamed)


def attend_tiles(
    schedule, query, key, value, masks, bias=(), *, dropout=0.0, seeds=None, return_lse=False
):
    """Attention over the tiles of a layout.

    Args:
        schedule: a `Schedule`. With a bias, one of whole runs that is not streamed.
        query: `(b, n, h, d)`, already scaled and finite.
        key: `(b, m, h, d)`, finite.
        value: `(b, m, h, e)`, finite.
        masks: for each run, a list of bool tiles that broadcast to
            `(b, h, t, i, j)`; a pair is allowed if all of them say so.
        bias: for each run, float tiles of such a shape; or nothing at all.
        dropout: the share of weights to drop.
        seeds: `(num_pieces, 2)` ints, for dropout.
        return_lse: whether `lse` is wanted.

    Returns:
        `(out, lse)` of shapes `(b, n, h, e)` and `(b, n, h, 1)`. Where no key
        is allowed, `out` is any finite number and `lse` below `MASKED`. `lse`
        is float32 or wider, before dropout, and `None` unless it was wanted.
    """
    seeds = [] if seeds is None else [seeds]

    @ops.custom_gradient
    def core(query, key, value, *flat):
        # All tensors are arguments: JAX cannot recompute a function that closes over one.
        rest = iter(flat)
        given_bias = [next(rest) for _ in bias]
        given_masks = [[next(rest) for _ in terms] for terms in masks]
        options = {"seeds": next(rest, None), "dropout": dropout, "return_lse": return_lse}
        pieces = _Pieces(schedule, (query, key, value), given_masks, given_bias, **options)
        packed = pieces.forward()

        @unconverted
        def grad(*inputs, upstream=None):
            # TensorFlow and JAX pass the gradient alone, PyTorch the inputs and `upstream`.
            found = pieces.backward(packed, inputs[0] if upstream is None else upstream)
            return *found, *[None] * (3 + len(flat) - len(found))

        return packed, grad

    packed = core(query, key, value, *bias, *itertools.chain(*masks), *seeds)
    out, lse = _unpack(packed, return_lse)
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


class _Pieces:
    """The forward and the backward pass over all pieces."""

    def __init__(self, schedule, tensors, masks, bias, seeds, dropout, return_lse):
        self.streamed, self.heads = schedule.streamed, schedule.heads
        self.runs = schedule.layout.runs()
        self.masks, self.bias = masks, bias
        self.seeds, self.dropout, self.return_lse = seeds, dropout, return_lse
        query, key, value = tensors
        self.n, self.m = ops.shape(query)[1], ops.shape(key)[1]
        self.batch, self.groups = ops.shape(query)[0], query.shape[2] // self.heads
        self.dtype = self.score_dtype = keras.backend.standardize_dtype(query.dtype)
        # A mask adds 0 or `LOWEST`, which bfloat16 has; and all softmaxes sum it up in float32.
        if self.dtype != "bfloat16" or return_lse or bias:
            self.score_dtype = wide(self.dtype)
        # Chunks may reach beyond the ends: padding, so that they can be sliced.
        parts = [run for run in self.runs if run.queries is not None]
        self.q_rows = max((x.q_start + x.count * x.queries for x in parts), default=self.n)
        self.k_start = min((x.k_start for x in parts), default=0)
        ends = [x.k_start + (x.count - 1) * x.queries + x.keys for x in parts]
        k_rows = max(ends, default=self.m) - self.k_start
        self.query = self._by_heads(crop(query, 0, self.q_rows))
        self.key, self.value = (self._by_heads(crop(x, self.k_start, k_rows)) for x in (key, value))
        self.tables, self.kept = {}, {}

    # ---- The two passes ----

    def forward(self):
        self.latest = [[]] * AT_ONCE
        outs = [self._each(index, self._forward)[0] for index in range(len(self.runs))]
        return self._join(outs)

    def backward(self, packed, d_packed):
        self.latest = [[]] * AT_ONCE
        out, _ = _unpack(packed, self.return_lse)
        d_out, d_lse = _unpack(d_packed, self.return_lse)
        self.d_out = self._by_heads(crop(ops.cast(d_out, self.dtype), 0, self.q_rows))
        delta = ops.sum(ops.cast(out * d_out, wide(self.dtype)), axis=-1, keepdims=True)
        delta = delta if d_lse is None else delta - d_lse
        self.delta = self._by_heads(crop(delta, 0, self.q_rows))
        self.d_bias = [[] for _ in self.bias]
        found = [self._each(index, self._backward) for index in range(len(self.runs))]
        d_query, d_key, d_value = zip(*found, strict=True)
        d_bias = [
            _over_heads(pieces, whole) for pieces, whole in zip(self.d_bias, self.bias, strict=True)
        ]
        return self._join(d_query), self._sum(d_key), self._sum(d_value), *d_bias

    def _forward(self, piece):
        query, key, value = self._tiles(piece)
        weights, drop, lse = self._weigh(piece, query, key, self.return_lse)
        if not self.streamed:
            self.kept[piece.number] = weights, drop
        tile = _pack(average(drop(weights), value), lse)
        return (self._rows(piece, tile),)

    def _backward(self, piece):
        query, key, value = self._tiles(piece)
        if self.streamed:
            weights, drop, _ = self._weigh(piece, query, key)
        else:
            weights, drop = self.kept[piece.number]
        d_out, delta = (self._queries(piece, x) for x in (self.d_out, self.delta))
        d_query, d_key, d_value, d_scores = gradients(
            query, key, value, weights, drop, d_out, delta
        )
        if self.bias:
            tile = self._at(piece, self.bias[piece.run_index])
            self.d_bias[piece.run_index].append(_sum_to(d_scores, tile))
        layout, n, m = piece.run.layout, piece.run.queries or self.n, piece.run.keys or self.m
        d_keys = (layout.sum_keys([x], n, m) for x in (d_key, d_value))
        return self._rows(piece, d_query), *d_keys

    def _weigh(self, piece, query, key, return_lse=False):
        """The weights of a piece, what dropout does to them, and their log-sum-exp if wanted."""
        scores, weights = weigh(query, key, self._tables(piece), self.score_dtype)
        lse = log_sum_exp(scores, weights)[..., None] if return_lse else None
        weights = ops.cast(weights, self.dtype)
        return weights, self._drop(piece, ops.shape(weights)), lse

    # ---- From tensors to pieces ----

    def _each(self, index, body):
        """Apply `body` to every piece of a run: a tuple of tensors `(b, c, i, h, d)`."""
        run, groups = self.runs[index], self.groups
        before = sum(run.count for run in self.runs[:index]) * groups
        if not self.streamed:
            chunks = []
            for chunk in range(run.count):
                found = []
                for group in range(groups):
                    number = before + chunk * groups + group
                    with after(self.latest[-AT_ONCE]):
                        found.append(body(_Piece(run, index, None, chunk, group, number)))
                    self.latest.append(found[-1])
                chunks.append([_join(tensors, axis=2) for tensors in zip(*found, strict=True)])
            return [ops.stack(tensors, axis=1) for tensors in zip(*chunks, strict=True)]

        @unconverted
        def in_loop(x):
            row, chunk, group = x // (groups * run.count), x // groups % run.count, x % groups
            return body(_Piece(run, index, row, chunk, group, x + before * self.batch))

        count = self.batch * run.count * groups
        found = ops.map(in_loop, ops.arange(count, dtype="int32"))
        sizes = {"c": run.count, "g": groups}
        return [rearrange(x, "(b c g) 1 i h d -> b c i (g h) d", **sizes) for x in found]

    def _join(self, runs):
        rows = [rearrange(x, "b c i h d -> b (c i) h d") for x in runs]
        return crop(_join(rows, axis=1), 0, self.n)

    def _sum(self, runs):
        if len(runs) == 1:
            return self.runs[0].sum_keys(runs[0], self.m)
        rows = [rearrange(x, "b 1 j h d -> b j h d") for x in runs]
        return sum_rows(rows, [run.k_start for run in self.runs], self.m)

    def _tiles(self, piece):
        run = piece.run
        start = None
        if run.keys is not None:
            start = run.k_start - self.k_start + piece.chunk * run.queries
        n = run.queries or self.n
        keys = (self._slice(x, piece, start, run.keys) for x in (self.key, self.value))
        tiles = (run.layout.split_keys(x, n)[0] for x in keys)
        return self._queries(piece, self.query), *tiles

    def _queries(self, piece, x):
        run = piece.run
        start = None if run.queries is None else run.q_start + piece.chunk * run.queries
        return run.layout.split_queries(self._slice(x, piece, start, run.queries))[0]

    def _rows(self, piece, tile):
        return piece.run.layout.join([tile], piece.run.queries or self.n)

    @property
    def _is_whole(self):
        return self.groups == 1 and not self.streamed

    def _by_heads(self, x):
        """Heads first: to slice the first axis is no copy."""
        return x if self._is_whole else rearrange(x, "b n h d -> h b n d")

    def _slice(self, x, piece, start, rows):
        """The heads of a piece, in `rows` from `start` on, or in all rows."""
        if self._is_whole:
            return x if rows is None else _take(x, start, rows, axis=1)
        x = _take(x, piece.group * self.heads, self.heads, axis=0)
        if piece.row is not None:
            x = _take(x, piece.row, 1, axis=1)
        if rows is not None:
            x = _take(x, start, rows, axis=2)
        return rearrange(x, "h b n d -> b n h d")

    def _tables(self, piece):
        """What is added to the scores of a piece: its bias, and its masks as one table."""
        terms = self.masks[piece.run_index]
        bias = [self._at(piece, self.bias[piece.run_index])] if self.bias else []
        if not terms:
            return bias
        if self.streamed:  # where it lies, only the loop knows
            return [*bias, self._table(piece, terms)]
        shared = all(term.shape[1] == 1 for term in terms)  # by all heads
        place = piece.run_index, piece.chunk, None if shared else piece.group
        if place not in self.tables:
            self.tables[place] = self._table(piece, terms)
        return [*bias, self.tables[place]]

    def _table(self, piece, terms):
        tables = [additive_mask(self._at(piece, x), self.score_dtype) for x in terms]
        return sum(tables[1:], tables[0])

    def _at(self, piece, x):
        """The piece's share of tiles `(b|1, h|1, t|1, i, j)` that lie at all pieces."""
        if piece.row is not None and x.shape[0] != 1:
            x = _take(x, piece.row, 1, axis=0)
        if self.groups > 1 and x.shape[1] != 1:
            x = _take(x, piece.group * self.heads, self.heads, axis=1)
        if piece.run.count > 1 and x.shape[2] != 1:
            x = rearrange(x, "b h (r t) i j -> b h r t i j", r=piece.run.layout.rate)
            size = x.shape[3] // piece.run.count
            x = _take(x, piece.chunk * size, size, axis=3)
            x = rearrange(x, "b h r t i j -> b h (r t) i j")
        return x

    def _drop(self, piece, shape):
        """What dropout does to the weights of a piece; the same each time."""
        if not self.dropout:
            return lambda weights: weights
        seed = _Seed(_take(self.seeds, piece.number, 1, axis=0)[0])
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


def _take(x, start, size, axis):
    """`size` entries along an axis, from `start` on, which may be a tensor."""
    shape = list(ops.shape(x))
    starts = [0] * len(shape)
    starts[axis], shape[axis] = start, size
    return ops.slice(x, starts, shape)


def _join(tensors, axis):
    return tensors[0] if len(tensors) == 1 else ops.concatenate(tensors, axis=axis)


def _sum_to(x, like):
    """Sum `x` over the axes along which `like` was broadcast."""
    axes = tuple(axis for axis in range(len(x.shape)) if like.shape[axis] == 1)
    return ops.cast(ops.sum(x, axis=axes, keepdims=True) if axes else x, like.dtype)


def _over_heads(pieces, whole):
    """The gradient of all heads from those of the groups, or their sum where they share it."""
    return _join(pieces, axis=1) if whole.shape[1] != 1 else sum(pieces[1:], pieces[0])
