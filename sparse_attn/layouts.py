"""Layouts: how keys are brought to queries.

A layout cuts the length axis of a tensor into tiles, so that every query of a
tile meets every key of it and no others. It may bring too many keys, never
too few: what is surplus, a mask removes. Whatever travels with a query or a
key (its vector, its position, its padding mask) goes through the same cut, so
nothing is worked out twice.

Every layout has

- `split_queries(x)` and `split_keys(x, n)`: `(b, n, h, d)` to a list of tiles
  `(b, h, t, i, d)` and `(b, h, t, j, d)`; rows that padding adds are zero;
- `join(tiles, n)`: the inverse of `split_queries`, `n` rows of it;
- `sum_keys(tiles, n, m)`: the adjoint of `split_keys`, `m` rows of it: what
  several tiles say of a key is added up;
- `pads_keys`: whether a tile may hold keys that are only padding;
- `scored_pairs`: how many pairs of positions its tiles hold;
- `copies`: how many copies of keys it makes for each of them;
- `tiles` and `tile_shape`: how many tiles it has, and their `(i, j)`, where all
  are alike and the lengths known;
- `distances`: for each run, the least and the greatest `k - q` in its tiles;
- `step`: how far queries and keys move together from one tile to the next; 0 if
  there is one tile;
- `sample(q_pos, k_pos)`: for each run the positions `(1, i, 1)` and `(1, 1, j)`
  of one tile without padding, whose distances are those of every tile; `None`
  if its tiles differ;
- `at(n, m)`: the layout once the lengths are there, as tensors perhaps;
- `cut(pairs)`: the same layout in runs whose chunks hold about that many pairs;
- `runs()`: the runs, one for each tensor in the list of tiles.

The layout of a run has, beside these,

- `of_chunk(chunk)`: the layout of one of its chunks;
- `tile(x, chunk, count)`: a chunk's share of tiles `(b, h, t|1, i|1, ...)` of
  all `count` chunks.

Lengths may be unknown (`None`): then all sizes follow from the tensors.
"""

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from keras import ops

from sparse_attn.checks import within_int32
from sparse_attn.reshaping import rearrange
from sparse_attn.tracing import (
    eagerly,
    gather,
    is_symbolic,
    least,
    most,
    pad_rows,
    size_of,
    split,
    sum_segments,
    take,
)

# Sizes of tiles. The row "tiles" of the benchmark compares them with their halves and doubles.
WIDTH_FACTOR = 64  # the width of a tile is the root of this many times its band's
GRID_QUERIES = 64  # of a tile of a grid that is near along several axes
MAX_GROUPS = 8  # groups of queries whose keys begin or end at one place
NOMINAL_LENGTH = 2**20  # where lengths are unknown, layouts are compared at this one


def crop(x, start, length):
    """Rows `start` to `start + length` of axis 1, with zeros beyond its ends.

    Args:
        x: a tensor `(b, n, ...)`.
        start: int or int tensor, may be negative.
        length: int or int tensor.
    """
    rows = size_of(x, 1)
    before = most(-start, 0)
    after = most(start + length - rows, 0)
    if _may_be_positive(before) or _may_be_positive(after):
        x = pad_rows(x, before, after)
    return take(x, most(start, 0), length, axis=1)


def _may_be_positive(size):
    return not isinstance(size, int) or size > 0


def _blocks(length, size):
    """How many blocks of `size` hold `length`, by a division that exports well.

    At least one where the length is an int tensor: graphs divide by the number of blocks.
    """
    if not isinstance(length, int) and not is_symbolic(length):
        length = most(length, 1)
    return (length + size - 1) // size


def _longest(n, m):
    """The larger of two lengths that may be tensors, at least 1 as the sizes of tiles are."""
    return most(most(n, m), 1)


def _even(blocks, most):
    """The size of chunks of about `most` blocks of which the last is as full as can be."""
    most = max(1, min(most, blocks))
    return min(range(most, _blocks(2 * most, 3) - 1, -1), key=lambda size: -blocks % size)


@dataclass(frozen=True)
class Run:
    """Chunks of one shape: each is a stretch of queries and the stretch of keys that they meet.

    Chunk `c` holds `queries` rows from `q_start + c * queries` on, and `keys`
    rows from `k_start + c * key_step` on; rows beyond the ends are zero.

    Args:
        layout: how a chunk is cut into tiles: its `of_chunk`.
        queries, keys: rows of a chunk, or `None` for all there are.
        q_start, k_start: rows where the first chunk begins.
        key_step: `queries`, or 0 if all chunks meet the same keys.
        count: the number of chunks.
    """

    layout: object
    queries: int | None = None
    keys: int | None = None
    q_start: int = 0
    k_start: int = 0
    key_step: int = 0
    count: int = 1

    @property
    def scored_pairs(self):
        """Pairs of positions in the tiles of a chunk."""
        return self.layout.of_chunk(0).scored_pairs

    @property
    def shares_keys(self):
        return self.key_step == 0

    def sum_keys(self, chunks, m):
        """Add up what the chunks say of each key: `(b, c, j, h, d)` to `(b, m, h, d)`.

        Where they share their keys, `chunks` may be their sum, `(b, 1, j, h, d)`.
        """
        heads = chunks.shape[3]
        if self.shares_keys or self.count == 1:
            x = self.sum_chunks(chunks)
            return x if self.keys is None else crop(x, -self.k_start, m)
        outer = Halo(1, self.key_step, self.k_start, self.k_start + self.keys)
        chunks = rearrange(chunks, "b c j h d -> b 1 c j (h d)")
        x = outer.sum_keys([chunks], self.count * self.key_step, m)
        return rearrange(x, "b m 1 (h d) -> b m h d", h=heads)

    def sum_chunks(self, chunks):
        """The sum of chunks that share their keys: `(b, j, h, d)`."""
        return chunks[:, 0] if chunks.shape[1] == 1 else ops.sum(chunks, axis=1)

    def tile(self, x, chunk):
        """A chunk's share of tiles `(b, h, t|1, i|1, ...)` of all chunks."""
        return x if self.count == 1 else self.layout.tile(x, chunk, self.count)


@dataclass(frozen=True)
class Halo:
    """Equal tiles: block `t` of queries meets keys at a fixed offset from it.

    The axis is first split by residue, `"(u r)"`, then into blocks of `width`.
    The queries `[t * width, (t + 1) * width)` of a residue meet its keys
    `[t * width + first, t * width + last)`.

    Args:
        rate: the number of residues.
        width: queries in a tile.
        first: offset of a tile's first key from its first query.
        last: offset of the end of its keys.
        n: number of queries, or `None` while it is unknown.
        shifts: the blocks that hold a tile's keys, as the least and the
            greatest distance from its own; they follow from the rest.
        origin: offset of the first row of keys from the first query.
        chunk: tiles of each residue in a chunk, or `None` for all of them.
    """

    rate: int
    width: int
    first: int
    last: int
    n: int | None = None
    shifts: tuple[int, int] | None = None
    origin: int = 0
    chunk: int | None = None

    def __post_init__(self):
        if self.shifts is None:
            shifts = self.first // self.width, _blocks(self.last, self.width) - 1
            object.__setattr__(self, "shifts", shifts)

    def at(self, n, m):
        """The layout for lengths of which one is a tensor: no tile is much longer than they are."""
        ahead = self.last - self.width
        if self.n is not None or self.first > 0 or ahead < 0 or is_symbolic(n) or is_symbolic(m):
            return self
        longest = _longest(n, m)
        rate = least(self.rate, longest)
        rows = _blocks(longest, rate)
        width = least(self.width, rows)
        first, last = -least(-self.first, rows), width + least(ahead, rows)
        return replace(self, rate=rate, width=width, first=first, last=last)

    def cut(self, pairs):
        blocks = self._num_blocks(self.n)
        chunk = _even(blocks, pairs // (self.rate * self.width * (self.last - self.first)))
        return replace(self, chunk=chunk) if chunk < blocks else self

    def runs(self):
        if self.chunk is None:
            return (Run(self),)
        inner = replace(self, n=self.chunk * self._step, origin=self.first, chunk=None)
        keys = ((self.chunk - 1) * self.width + self.last - self.first) * self.rate
        count = self._num_blocks(self.n) // self.chunk
        return (Run(inner, inner.n, keys, 0, self.first * self.rate, inner.n, count),)

    def of_chunk(self, chunk):
        return self

    def tile(self, x, chunk, count):
        if x.shape[2] == 1:
            return x
        x = rearrange(x, "b h (r t) i ... -> b h r t i ...", r=self.rate)
        blocks = x.shape[3] // count
        x = take(x, chunk * blocks, blocks, axis=3)
        return rearrange(x, "b h r t i ... -> b h (r t) i ...")

    @property
    def pads_keys(self):
        return True

    @property
    def copies(self):
        return 1 / self.width

    @property
    def scored_pairs(self):
        blocks = self._num_blocks(self.n or NOMINAL_LENGTH)
        return self.rate * blocks * self.width * (self.last - self.first)

    @property
    def tiles(self):
        return self.rate * self._num_blocks(self.n)

    @property
    def tile_shape(self):
        return self.width, self.last - self.first

    @property
    def distances(self):
        return ((self.rate * (self.first - self.width + 1), self.rate * (self.last - 1)),)

    @property
    def step(self):
        known = isinstance(self.rate, int) and isinstance(self.width, int)
        return self.width if known and self.rate == 1 else 1

    @property
    def _step(self):
        return self.width * self.rate

    def _num_blocks(self, queries):
        blocks = _blocks(queries, self._step)
        return blocks if self.chunk is None else _blocks(blocks, self.chunk) * self.chunk

    def _pieces(self):
        """The blocks that hold a tile's keys: their shifts, and which rows of them: start, size."""
        low, high = self.shifts
        for shift in range(low, high + 1):
            start = least(most(self.first - shift * self.width, 0), self.width)
            stop = least(self.last - shift * self.width, self.width)
            yield shift, start, most(stop - start, 0)

    def sample(self, q_pos, k_pos):
        low, high = self.shifts
        tile = max(-low, 0)  # with all its keys inside of this many blocks:
        rows = _as_rows(ops.arange((tile + max(high, 0) + 1) * self._step, dtype="int32"))
        whole = replace(self, origin=0, chunk=None)
        queries = whole.split_queries(rows)[0]
        keys = whole.split_keys(rows, size_of(rows, 1))[0]
        return [_pair(queries[0, 0, tile], keys[0, 0, tile])]

    def split_queries(self, x):
        blocks = self._num_blocks(size_of(x, 1))
        x = crop(x, 0, blocks * self._step)
        return [rearrange(x, "b (t i r) h d -> b h (r t) i d", i=self.width, r=self.rate)]

    def split_keys(self, x, n):
        blocks = self._num_blocks(n)
        low, high = self.shifts
        x = crop(x, low * self._step - self._skipped, (blocks + high - low) * self._step)
        heads = x.shape[2]
        # Blocks first: to slice the first axis is no copy.
        x = rearrange(x, "b (u w r) h d -> u (b h r) w d", w=self.width, r=self.rate)
        pieces = [
            take(take(x, shift - low, blocks, axis=0), start, size, axis=2)
            for shift, start, size in self._pieces()
        ]
        x = pieces[0] if len(pieces) == 1 else ops.concatenate(pieces, axis=2)
        return [rearrange(x, "t (b h r) j d -> b h (r t) j d", h=heads, r=self.rate)]

    def sum_keys(self, tiles, n, m):
        low, high = self.shifts
        heads = tiles[0].shape[1]
        x = rearrange(tiles[0], "b h (r t) j d -> t (b h r) j d", r=self.rate)
        total, offset = None, 0
        for shift, start, size in self._pieces():
            piece = take(x, offset, size, axis=2)
            before, behind = (shift - low, high - shift), (start, self.width - start - size)
            piece = ops.pad(piece, (before, (0, 0), behind, (0, 0)))
            total = piece if total is None else total + piece
            offset += size
        x = rearrange(total, "u (b h r) w d -> b (u w r) h d", h=heads, r=self.rate)
        return crop(x, self._skipped - low * self._step, m)

    @property
    def _skipped(self):
        return self.origin * self.rate

    def join(self, tiles, n):
        x = rearrange(tiles[0], "b h (r t) i d -> b (t i r) h d", r=self.rate)
        return crop(x, 0, n)


class Step(NamedTuple):
    """Queries `[q0, q1)`, in `count` equal chunks, which all meet the keys `[k0, k1)`."""

    q0: int
    q1: int | None
    k0: int
    k1: int | None
    count: int = 1


@dataclass(frozen=True)
class Stairs:
    """Unequal tiles: groups of queries, each with its own range of keys.

    The axis is first split by residue, `"(u r)"`; a step lets some queries of
    each residue meet some of its keys. One step over everything is dense
    attention. Steps are in order and without gaps; `None` as an end means the
    end of the axis.

    Args:
        rate: the number of residues.
        steps: a tuple of `Step`.
        n: number of queries, or `None` while it is unknown.
        m: number of keys, or `None` while it is unknown.
    """

    rate: int
    steps: tuple[Step, ...]
    n: int | None = None
    m: int | None = None

    def at(self, n, m):
        """The layout for lengths of which one is a tensor: no more residues than they have rows."""
        if self.rate == 1 or not (self.n is None or self.m is None):
            return self
        if is_symbolic(n) or is_symbolic(m):
            return self
        return replace(self, rate=least(self.rate, _longest(n, m)))

    def cut(self, pairs):
        steps = []
        for q0, q1, k0, k1, _ in self._closed_steps():
            count = min(_blocks(self.rate * (q1 - q0) * (k1 - k0), pairs), q1 - q0)
            rows, longer = divmod(q1 - q0, count)
            edge = q0 + longer * (rows + 1)
            steps += [Step(q0, edge, k0, k1, longer), Step(edge, q1, k0, k1, count - longer)]
        return replace(self, steps=tuple(step for step in steps if step.count))

    def runs(self):
        if len(self.steps) == 1 and self.steps[0].count == 1:
            return (Run(self),)
        runs = []
        for q0, q1, k0, k1, count in self._closed_steps():
            queries, keys = (q1 - q0) // count, k1 - k0
            inner = Stairs(self.rate, (Step(0, queries, 0, keys),))
            sizes = (self.rate * size for size in (queries, keys, q0, k0))
            runs.append(Run(inner, *sizes, count=count))
        return tuple(runs)

    def of_chunk(self, chunk):
        return self

    @property
    def step(self):
        return 0 if isinstance(self.rate, int) and self.rate == 1 else 1

    def tile(self, x, chunk, count):
        """Chunks are of the same tiles and of other queries."""
        rows = x.shape[3] // count
        return x if x.shape[3] == 1 else take(x, chunk * rows, rows, axis=3)

    @property
    def copies(self):
        return 0

    @property
    def pads_keys(self):
        if not isinstance(self.rate, int) or self.m is None:
            return not isinstance(self.rate, int) or self.rate > 1
        return self.m % self.rate > 0

    @property
    def scored_pairs(self):
        return self.rate * sum((x.q1 - x.q0) * (x.k1 - x.k0) for x in self._closed_steps())

    @property
    def tiles(self):
        return self.rate

    @property
    def tile_shape(self):
        (step,) = self._closed_steps()
        return step.q1 - step.q0, step.k1 - step.k0

    @property
    def distances(self):
        return tuple(
            (self.rate * (x.k0 - x.q1 + 1), self.rate * (x.k1 - 1 - x.q0))
            for x in self._closed_steps()
        )

    def _closed_steps(self):
        queries = _blocks(self.n or NOMINAL_LENGTH, self.rate)
        keys = _blocks(self.m or NOMINAL_LENGTH, self.rate)
        for q0, q1, k0, k1, count in self.steps:
            q1, k1 = queries if q1 is None else q1, keys if k1 is None else k1
            yield Step(q0, q1, k0, k1, count)

    def sample(self, q_pos, k_pos):
        queries, keys = self.split_queries(_as_rows(q_pos)), self.split_keys(_as_rows(k_pos), None)
        return [_pair(q[0, 0, 0], k[0, 0, 0]) for q, k in zip(queries, keys, strict=True)]

    def split_queries(self, x):
        return self._split(x, [(step.q0, step.q1) for step in self.steps])

    def split_keys(self, x, n):
        return self._split(x, [(step.k0, step.k1) for step in self.steps])

    def _split(self, x, ranges):
        heads = x.shape[2]
        x = crop(x, 0, _blocks(size_of(x, 1), self.rate) * self.rate)
        x = rearrange(x, "b (u r) h d -> (b h r) u d", r=self.rate)
        rows = size_of(x, 1)
        ends = [rows if end is None else least(end, rows) for _, end in ranges]
        tiles = [crop(x, start, end - start) for (start, _), end in zip(ranges, ends, strict=True)]
        return [rearrange(x, "(b h r) i d -> b h r i d", h=heads, r=self.rate) for x in tiles]

    def sum_keys(self, tiles, n, m):
        rows = [rearrange(x, "b h r j d -> b (j r) h d") for x in tiles]
        return sum_rows(rows, [step.k0 * self.rate for step in self.steps], m)

    def join(self, tiles, n):
        x = tiles[0] if len(tiles) == 1 else ops.concatenate(tiles, axis=3)
        return crop(rearrange(x, "b h r u d -> b (u r) h d"), 0, n)


@dataclass(frozen=True)
class Nested:
    """A grid, axis by axis: `outer` lays out its rows, and `inner` the points of a row.

    A tile is the product of one of each: `t` tiles of `i` rows, with `u` tiles
    of `k` points in each of them.

    Args:
        outer: the layout of the first axis.
        inner: the layout of all others, of a single run.
        row: points in a row.
    """

    outer: object
    inner: object
    row: int

    def at(self, n, m):
        return replace(self, outer=self.outer.at(_blocks(n, self.row), _blocks(m, self.row)))

    def cut(self, pairs):
        return replace(self, outer=self.outer.cut(max(1, pairs // self.inner.scored_pairs)))

    def runs(self):
        runs = []
        for run in self.outer.runs():
            sizes = (run.queries, run.keys, run.q_start, run.k_start, run.key_step)
            sizes = [None if size is None else size * self.row for size in sizes]
            runs.append(Run(replace(self, outer=run.layout), *sizes, count=run.count))
        return tuple(runs)

    def of_chunk(self, chunk):
        return self

    def tile(self, x, chunk, count):
        u = 1 if x.shape[2] == 1 else self.inner.tiles
        k = 1 if x.shape[3] == 1 else self.inner.tile_shape[0]
        x = rearrange(x, "b h (t u) (i k) ... -> b h t i u k ...", u=u, k=k)
        x = self.outer.tile(x, chunk, count)
        return rearrange(x, "b h t i u k ... -> b h (t u) (i k) ...")

    step = 1

    def sample(self, q_pos, k_pos):
        return None

    @property
    def tiles(self):
        return self.outer.tiles * self.inner.tiles

    @property
    def tile_shape(self):
        outer, inner = self.outer.tile_shape, self.inner.tile_shape
        return outer[0] * inner[0], outer[1] * inner[1]

    @property
    def pads_keys(self):
        return True  # the last row may not be full

    @property
    def copies(self):
        return 3 * self.outer.copies * self.inner.copies  # padded, heads first, in tiles

    @property
    def scored_pairs(self):
        return self.outer.scored_pairs * self.inner.scored_pairs

    def split_queries(self, x):
        return [take_rows(x, rows) for rows in self._query_rows(size_of(x, 1))]

    def split_keys(self, x, n):
        return [take_rows(x, rows) for rows in self._key_rows(n, size_of(x, 1))]

    def sum_keys(self, tiles, n, m):
        return add_rows(tiles, self._key_rows(n, m), m)

    def join(self, tiles, n):
        return add_rows(tiles, self._query_rows(n), n)

    def _query_rows(self, n):
        """For each run the rows `(t, i)` of its tiles, negative for padding."""
        return self._row_numbers("split_queries", n)

    def _key_rows(self, n, m):
        return self._row_numbers("split_keys", m, n)

    def _row_numbers(self, split, *sizes):
        """Vectors are moved once; axis by axis only the numbers of their rows are."""
        if all(isinstance(size, int) for size in (*sizes, *_sizes(self.outer))):
            return _known_rows(self, split, *sizes)
        return self._split_numbers(split, *sizes)

    def _split_numbers(self, split, length, n=None):
        numbers = ops.arange(1, _blocks(length, self.row) * self.row + 1, dtype="int32")
        x = rearrange(numbers, "(y x) -> 1 y 1 x", x=self.row)
        behind = () if n is None else (_blocks(n, self.row),)
        found = []
        for rows in getattr(self.outer, split)(x, *behind):
            t, i = size_of(rows, 2), size_of(rows, 3)
            x = rearrange(rows, "1 1 t i x -> (t i) x 1 1")
            (x,) = getattr(self.inner, split)(x, *(() if n is None else (self.row,)))
            x = rearrange(x, "(t i) 1 u k 1 -> (t u) (i k)", t=t, i=i)
            found.append(ops.where(x <= length, x, 0) - 1)
        return found


def _sizes(layout):
    return (layout.rate, layout.width) if isinstance(layout, Halo) else (layout.rate,)


@functools.lru_cache(maxsize=256)
def _known_rows(layout, split, *sizes):
    with eagerly():
        return [ops.convert_to_numpy(x) for x in layout._split_numbers(split, *sizes)]


@dataclass(frozen=True, eq=False)
class Gather:
    """Tiles whose keys are gathered: a block of queries meets the blocks of keys in its list.

    Args:
        index: `(t, j)` ints, an array or a tensor: for each block of queries the
            numbers of its blocks of keys; one that does not exist is no key.
        queries: rows in a block of queries.
        keys: rows in a block of keys.
        pads_keys: whether some blocks do not exist, or not in full.
        chunk: blocks of queries in a chunk, or `None` for all of them.
    """

    index: object
    queries: int = 1
    keys: int = 1
    pads_keys: bool = True
    chunk: int | None = None

    def at(self, n, m):
        return self

    def cut(self, pairs):
        blocks, listed = self.index.shape
        chunk = _even(blocks, pairs // (self.queries * self.keys * max(1, listed)))
        if chunk >= blocks:
            return self
        missing = _blocks(blocks, chunk) * chunk - blocks
        index = ops.pad(
            ops.convert_to_tensor(self.index), ((0, missing), (0, 0)), constant_values=-1
        )
        return replace(self, index=index, chunk=chunk)

    def runs(self):
        if self.chunk is None:
            return (Run(self),)
        count = self.index.shape[0] // self.chunk
        return (Run(self, queries=self.chunk * self.queries, count=count),)

    def of_chunk(self, chunk):
        if self.chunk is None:
            return self
        index = take(self.index, chunk * self.chunk, self.chunk, axis=0)
        return replace(self, index=index, chunk=None)

    def tile(self, x, chunk, count):
        return x if x.shape[2] == 1 else take(x, chunk * self.chunk, self.chunk, axis=2)

    step = 1

    def sample(self, q_pos, k_pos):
        return None

    @property
    def copies(self):
        return 1 / self.queries

    @property
    def scored_pairs(self):
        return math.prod(self.index.shape) * self.queries * self.keys

    def split_queries(self, x):
        x = crop(x, 0, size_of(self.index, 0) * self.queries)
        return [rearrange(x, "b (t i) h d -> b h t i d", i=self.queries)]

    def split_keys(self, x, n):
        blocks = _blocks(size_of(x, 1), self.keys)
        x = crop(x, 0, blocks * self.keys)
        x = take_rows(rearrange(x, "b (u w) h d -> b u h (w d)", w=self.keys), self.index)
        return [rearrange(x, "b h t j (w d) -> b h t (j w) d", w=self.keys)]

    def sum_keys(self, tiles, n, m):
        tiles = [rearrange(x, "b h t (j w) d -> b h t j (w d)", w=self.keys) for x in tiles]
        x = add_rows(tiles, [self.index], _blocks(m, self.keys))
        return crop(rearrange(x, "b u h (w d) -> b (u w) h d", w=self.keys), 0, m)

    def join(self, tiles, n):
        return crop(rearrange(tiles[0], "b h t i d -> b (t i) h d"), 0, n)


def take_rows(x, rows):
    """Rows of axis 1 by number: `(b, n, h, d)` and `(t, i)` ints to tiles `(b, h, t, i, d)`.

    A number that is no row stands for zeros.
    """
    length = size_of(x, 1)
    x = rearrange(crop(x, 0, length + 1), "b n h d -> b h n d")
    return gather(x, _existing(rows, length), axis=2)


def add_rows(tiles, rows, length):
    """The adjoint of `take_rows` for several tiles: `(b, length, h, d)`.

    Args:
        tiles: a list of tensors `(b, h, t, i, d)`.
        rows: for each of them `(t, i)` ints, arrays or tensors.
        length: int or int tensor.
    """
    batch, heads = (size_of(tiles[0], axis) for axis in (0, 1))
    tiles = [rearrange(x, "b h t i d -> b h (t i) d") for x in tiles]
    x = tiles[0] if len(tiles) == 1 else ops.concatenate(tiles, axis=2)
    rows = [rearrange(numbers, "t i -> (t i)") for numbers in rows]
    if isinstance(length, int) and all(isinstance(numbers, np.ndarray) for numbers in rows):
        places = _places(np.concatenate(rows), length)
        if places.size <= 2 * max(length, x.shape[2]):
            x = gather(ops.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0))), places, axis=2)
            x = x[:, :, :, 0] if x.shape[3] == 1 else ops.sum(x, axis=3)
            return rearrange(x, "b h n d -> b n h d")
    rows = [_existing(numbers, length) for numbers in rows]
    numbers = ops.convert_to_tensor(rows[0]) if len(rows) == 1 else ops.concatenate(rows)
    starts = (length + 1) * ops.arange(batch * heads, dtype="int32")
    numbers = rearrange(starts[:, None] + numbers[None, :], "x y -> (x y)")
    x = rearrange(x, "b h i d -> (b h i) d")
    x = sum_segments(x, numbers, batch * heads * (length + 1))
    x = rearrange(x, "(b h n) d -> b n h d", b=batch, h=heads, n=length + 1)
    return crop(x, 0, length)


def _existing(rows, length):
    """The numbers as int32, where those of no row are `length`."""
    if not isinstance(length, int):
        rows = ops.convert_to_tensor(rows)
    inside = (rows >= 0) & (rows < length)
    if isinstance(inside, np.ndarray):
        return np.where(inside, rows, length).astype("int32")
    return ops.cast(ops.where(inside, rows, length), "int32")


def _places(numbers, length):
    """`(length, c)`: where each of `length` numbers stands, filled up with `len(numbers)`."""
    order = np.argsort(numbers, kind="stable")
    order = order[(numbers[order] >= 0) & (numbers[order] < length)]
    counts = np.bincount(numbers[order], minlength=length)
    places = np.full((length, max(1, counts.max(initial=0))), len(numbers), "int32")
    turns = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    places[numbers[order], turns] = order
    return places


def _as_rows(positions):
    return rearrange(positions, "n -> 1 n 1 1")


def _pair(queries, keys):
    """Positions `(i, 1)` and `(j, 1)` as a pair of shapes `(1, i, 1)` and `(1, 1, j)`."""
    return rearrange(queries, "i 1 -> 1 i 1"), rearrange(keys, "j 1 -> 1 1 j")


def sum_rows(pieces, starts, length):
    """Add up pieces that lie at different rows of axis 1, in one pass over them.

    Args:
        pieces: a list of tensors `(b, rows, h, d)`.
        starts: the row where each begins, an int that may be negative.
        length: rows of the sum; what lies beyond `[0, length)` is left out.

    Returns:
        A tensor `(b, length, h, d)`.
    """
    if len(pieces) == 1:
        return crop(pieces[0], -starts[0], length)
    ranges = [(start, start + x.shape[1]) for start, x in zip(starts, pieces, strict=True)]
    edges = {0, length, *(edge for pair in ranges for edge in pair)}
    edges = sorted(edge for edge in edges if 0 <= edge <= length)
    segments = {pair: [] for pair in itertools.pairwise(edges)}
    for x, (start, stop) in zip(pieces, ranges, strict=True):
        inner = [edge for edge in edges if start <= edge <= stop]
        cuts = [edge - start for edge in (start, *inner, stop)]
        parts = split(x, cuts[1:-1], axis=1)[1:-1] if len(inner) > 1 else []
        for pair, part in zip(itertools.pairwise(inner), parts, strict=True):
            segments[pair].append(part)
    batch, heads, dim = (size_of(pieces[0], axis) for axis in (0, 2, 3))
    sums = [
        sum(parts[1:], parts[0])
        if parts
        else ops.zeros((batch, stop - start, heads, dim), pieces[0].dtype)
        for (start, stop), parts in segments.items()
    ]
    return ops.concatenate(sums, axis=1) if len(sums) > 1 else sums[0]


def band_layout(left, right, rate, n=None, m=None):
    """The layout that holds `-left <= k - q <= right`, `(q - k) % rate == 0` in fewest pairs.

    Args:
        left, right: ints (signed) or `None` for unlimited, as in `Band`.
        rate: a positive int.
        n, m: numbers of queries and keys, or `None` while unknown.
    """
    # Within a residue, one step is `rate` positions.
    left = None if left is None else left // rate
    right = None if right is None else right // rate
    stairs = _stairs(left, right, rate, n, m)
    if left is None or right is None:
        return stairs
    halo = _halo(left, right, rate, n, _width(left + right + 1))
    return halo if halo.scored_pairs < stairs.scored_pairs else stairs


def grid_layout(sizes, bands, n=None, m=None):
    """The layout of a band along each axis of a grid.

    Args:
        sizes: the sizes of all axes but the first, ints.
        bands: for each axis `(left, right, rate)` as in `band_layout`.
        n, m: numbers of queries and keys, or `None` while unknown.
    """
    return _grid_layout(sizes, bands, n, m, near=sum(_is_near(band) for band in bands))


def _is_near(band):
    left, right, _ = band
    return None not in (left, right) and left + right > 0


def _grid_layout(sizes, bands, n, m, near, inner=False):
    if not sizes:
        return _axis_layout(bands[0], n, m, near, inner)
    if bands[-1] == (0, 0, 1):  # the points of the last axis are residues
        (left, right, rate), size = bands[-2], sizes[-1]
        left, right = (None if x is None else x * size for x in (left, right))
        sizes = (*sizes[:-2], math.prod(sizes[-2:])) if len(sizes) > 1 else ()
        bands = (*bands[:-2], (left, right, rate * size))
        return _grid_layout(sizes, bands, n, m, near, inner)
    row = math.prod(sizes)
    rows = [None if size is None else _blocks(size, row) for size in (n, m)]
    left, right, rate = bands[0]
    if rate == 1 and None not in (left, right) and set(bands[1:]) == {(None, None, 1)}:
        width = row * max(1, _width(row * (left + right + 1)) // row)
        if left == right == 0 or rows[0] is None:
            width = row
        return Halo(1, width, -left * row, width + right * row, n)
    outer = _axis_layout(bands[0], *rows, near, inner)
    return Nested(outer, _grid_layout(sizes[1:], bands[1:], row, row, near, True), row)


def _axis_layout(band, n, m, near, inner):
    """The layout of one axis of a grid, of which some are near; an inner one is of a single run."""
    left, right, rate = band
    whole = Stairs(rate, (Step(0, None, 0, None),), n, m)
    if None in (left, right):
        return whole if inner else band_layout(*band, n, m)
    left, right = left // rate, right // rate
    span = left + right + 1
    width = (
        1 if span == 1 else _width(span) if near < 2 else max(2, round(GRID_QUERIES ** (1 / near)))
    )
    halo = _halo(left, right, rate, n, width)
    if None in (n, m) or halo.scored_pairs < whole.scored_pairs:
        return halo
    return whole


def select_layout(left, right, queries, keys, n=None, m=None):
    """The layout of a band `-left <= k - q <= right` among chosen queries and keys.

    Args:
        left, right: ints (signed) or `None` for unlimited.
        queries, keys: `Ranges`, or `None` for all.
        n, m: numbers of all queries and of all keys, or `None` while unknown.
    """
    count_q, count_k = (
        (lambda stop: stop) if chosen is None else chosen.count for chosen in (queries, keys)
    )
    if n is None or m is None or (left is None and right is None):
        sizes = [None if x is None else int(c(x)) for c, x in ((count_q, n), (count_k, m))]
        return Stairs(1, (Step(0, None, 0, None),), *sizes)
    groups = min(MAX_GROUPS, max(1, int(count_q(n)) // 128))
    edges = np.linspace(0, n, groups + 1).astype(int).tolist()
    steps, total = [], int(count_k(m))
    for q0, q1 in itertools.pairwise(edges):
        k0 = 0 if left is None else min(max(q0 - left, 0), m)
        k1 = m if right is None else min(max(q1 + right, 0), m)
        k0 = min(int(count_k(k0)), total - 1)
        steps.append(Step(int(count_q(q0)), int(count_q(q1)), k0, max(int(count_k(k1)), k0 + 1)))
    steps = [step for step in steps if step.q0 < step.q1]
    return Stairs(1, tuple(steps), int(count_q(n)), total)


def _width(span):
    """Tiles wide enough for the matrix product, narrow enough to score few pairs in vain."""
    width = 2 ** int(math.log2(math.sqrt(WIDTH_FACTOR * span)))
    return max(16, min(width, 512), span // 16)


def _halo(left, right, rate, n, width):
    if n is not None:
        rows = _blocks(n, rate)
        width = _blocks(rows, _blocks(rows, width))  # even tiles: the last is not half empty
    return Halo(rate, width, -left, width + right, n)


def _stairs(left, right, rate, n, m):
    """A few groups of queries, so that of a triangle little more than its half is scored."""
    if n is None or m is None:
        return Stairs(rate, (Step(0, None, 0, None),), n, m)
    queries, keys = _blocks(n, rate), _blocks(m, rate)
    bounded = left is not None or right is not None
    groups = min(MAX_GROUPS, max(1, queries // 128)) if bounded else 1
    edges = np.linspace(0, queries, groups + 1).astype(int).tolist()
    steps = []
    for q0, q1 in itertools.pairwise(edges):
        k0 = 0 if left is None else min(max(q0 - left, 0), keys - 1)
        k1 = keys if right is None else min(max(q1 + right, k0 + 1), keys)
        steps.append(Step(q0, q1, k0, k1))
    return Stairs(rate, tuple(steps), n, m)


def band_rows(left, right, rate, q_pos, m):
    """The keys that lie in a band around queries at any positions.

    Args:
        left, right, rate: as in `band_layout`.
        q_pos: `(n,)` int tensor.
        m: number of keys, int or int tensor.

    Returns:
        An `(n, j)` index for `Gather`, or `None` if the band has all keys.
    """
    rate = within_int32(rate)
    whole = _blocks(m, rate)  # keys of a residue
    start, count = q_pos % rate, whole
    if left is not None and right is not None:
        left, right = left // rate, right // rate
        near = left + right + 1
        if not isinstance(whole, int) and near > NOMINAL_LENGTH:  # no more than there are
            start = ops.maximum(q_pos - within_int32(left * rate), start)
            count = least(whole, near)
        elif not isinstance(whole, int) or near < whole:
            start, count = q_pos - left * rate, near
    if rate == 1 and count is whole:
        return None
    return start[:, None] + rate * ops.arange(count, dtype=q_pos.dtype)[None, :]


def grid_rows(sizes, bands, q_pos, m):
    """The keys that a band along each axis has around queries at any positions.

    Returns:
        An `(n, j)` index for `Gather`, or `None` if the first axis has no end.
    """
    row = within_int32(math.prod(sizes))
    rows = _blocks(m, row)
    found = band_rows(*bands[0], q_pos // row, rows)
    if found is None:
        return None
    found = ops.where(found < rows, found, -1)  # whose numbers might not be int32
    for axis, band in enumerate(bands[1:], start=1):
        size, behind = (within_int32(x) for x in (sizes[axis - 1], math.prod(sizes[axis:])))
        place = q_pos // behind % size
        near = band_rows(*band, place, size)
        if near is None:
            near = ops.arange(size, dtype=q_pos.dtype)[None, :]
        inside = (near >= 0) & (near < size)
        near = ops.where(inside, near, 0)
        found = found[:, :, None] * size + near[:, None, :]
        found = rearrange(ops.where(inside[:, None, :], found, -1), "n j k -> n (j k)")
    return found


def block_rows(blocks, size):
    """The keys of listed blocks: `(n, listed)` numbers to an `(n, j)` index for `Gather`."""
    rows = blocks[:, :, None] * size + ops.arange(size, dtype=blocks.dtype)
    return rearrange(rows, "n k j -> n (k j)")
