"""Layouts: how keys are brought to queries.

A layout cuts the length axis of a tensor into tiles, so that every query of a
tile meets every key of it and no others. It may bring too many keys, never
too few: what is surplus, a mask removes. Whatever travels with a query or a
key (its vector, its position, its padding mask) goes through the same cut, so
nothing is worked out twice.

Every layout has

- `split_queries(x)` and `split_keys(x)`: `(b, n, h, d)` to a list of tiles
  `(b, h, t, i, d)` and `(b, h, t, j, d)`; rows that padding adds are zero;
- `join(tiles, n)`: the inverse of `split_queries`, `n` rows of it;
- `pads_keys`: whether a tile may hold keys that are only padding;
- `scored_pairs`: how many pairs of positions its tiles hold;
- `at(n, m)`: the layout once the lengths are there, as tensors perhaps.

Lengths may be unknown (`None`): then all sizes follow from the tensors.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
from einops import rearrange
from keras import ops

NOMINAL_LENGTH = 2**20  # where lengths are unknown, layouts are compared at this one


def crop(x, start, length):
    """Rows `start` to `start + length` of axis 1, with zeros beyond its ends.

    Args:
        x: a tensor `(b, n, ...)`.
        start: int or int tensor, may be negative.
        length: int or int tensor.
    """
    rows = ops.shape(x)[1]
    before = _most(-start, 0)
    after = _most(start + length - rows, 0)
    if _may_be_positive(before) or _may_be_positive(after):
        x = ops.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (len(x.shape) - 2))
        rows = rows + before + after
    start = _most(start, 0)
    known = all(isinstance(size, int) for size in (start, length, rows))
    if known and (start, length) == (0, rows):
        return x
    shape = ops.shape(x)
    return ops.slice(x, (0, start) + (0,) * (len(shape) - 2), (shape[0], length, *shape[2:]))


def _least(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else ops.minimum(a, b)


def _most(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else ops.maximum(a, b)


def _may_be_positive(size):
    return not isinstance(size, int) or size > 0


def _blocks(length, size):
    """How many blocks of `size` hold `length`, by a division that exports well."""
    return (length + size - 1) // size


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
    """

    rate: int
    width: int
    first: int
    last: int
    n: int | None = None
    shifts: tuple[int, int] | None = None

    def __post_init__(self):
        if self.shifts is None:
            shifts = self.first // self.width, _blocks(self.last, self.width) - 1
            object.__setattr__(self, "shifts", shifts)

    def at(self, n, m):
        """The layout for lengths of which one is a tensor: no tile is much longer than they are."""
        ahead = self.last - self.width
        if self.n is not None or self.first > 0 or ahead < 0:
            return self
        longest = _most(n, m)
        rate = _least(self.rate, longest)
        rows = _blocks(longest, rate)
        width = _least(self.width, rows)
        first, last = -_least(-self.first, rows), width + _least(ahead, rows)
        return replace(self, rate=rate, width=width, first=first, last=last)

    @property
    def pads_keys(self):
        return True

    @property
    def scored_pairs(self):
        blocks = self._num_blocks(self.n or NOMINAL_LENGTH)
        return self.rate * blocks * self.width * (self.last - self.first)

    def _num_blocks(self, queries):
        return _blocks(queries, self.rate * self.width)

    def split_queries(self, x):
        blocks = self._num_blocks(ops.shape(x)[1])
        x = crop(x, 0, blocks * self.width * self.rate)
        return [rearrange(x, "b (t i r) h d -> b h (r t) i d", i=self.width, r=self.rate)]

    def split_keys(self, x, n):
        blocks = self._num_blocks(n)
        low, high = self.shifts
        step = self.width * self.rate
        x = crop(x, low * step, (blocks + high - low) * step)
        heads = x.shape[2]
        x = rearrange(x, "b (u w r) h d -> (b h r) u w d", w=self.width, r=self.rate)
        rows, _, _, dim = ops.shape(x)
        pieces = []
        for shift in range(low, high + 1):
            start = _least(_most(self.first - shift * self.width, 0), self.width)
            stop = _least(self.last - shift * self.width, self.width)
            size = _most(stop - start, 0)
            pieces.append(ops.slice(x, (0, shift - low, start, 0), (rows, blocks, size, dim)))
        x = pieces[0] if len(pieces) == 1 else ops.concatenate(pieces, axis=2)
        return [rearrange(x, "(b h r) t j d -> b h (r t) j d", h=heads, r=self.rate)]

    def join(self, tiles, n):
        x = rearrange(tiles[0], "b h (r t) i d -> b (t i r) h d", r=self.rate)
        return crop(x, 0, n)


@dataclass(frozen=True)
class Stairs:
    """Unequal tiles: groups of queries, each with its own range of keys.

    The axis is first split by residue, `"(u r)"`; a step `(q0, q1, k0, k1)`
    lets the queries `[q0, q1)` of each residue meet its keys `[k0, k1)`. One
    step over everything is dense attention. Steps are in order and without
    gaps; `None` as an end means the end of the axis.

    Args:
        rate: the number of residues.
        steps: a tuple of `(q0, q1, k0, k1)`.
        n: number of queries, or `None` while it is unknown.
        m: number of keys, or `None` while it is unknown.
    """

    rate: int
    steps: tuple[tuple[int, int | None, int, int | None], ...]
    n: int | None = None
    m: int | None = None

    def at(self, n, m):
        """The layout for lengths of which one is a tensor: no more residues than they have rows."""
        if self.n is not None and self.m is not None:
            return self
        return replace(self, rate=_least(self.rate, _most(n, m)))

    @property
    def pads_keys(self):
        return self.rate > 1 and (self.m is None or self.m % self.rate > 0)

    @property
    def scored_pairs(self):
        queries = _blocks(self.n or NOMINAL_LENGTH, self.rate)
        keys = _blocks(self.m or NOMINAL_LENGTH, self.rate)
        return self.rate * sum(
            ((queries if q1 is None else q1) - q0) * ((keys if k1 is None else k1) - k0)
            for q0, q1, k0, k1 in self.steps
        )

    def split_queries(self, x):
        return self._split(x, [(q0, q1) for q0, q1, _, _ in self.steps])

    def split_keys(self, x, n):
        return self._split(x, [(k0, k1) for _, _, k0, k1 in self.steps])

    def _split(self, x, ranges):
        heads = x.shape[2]
        x = crop(x, 0, _blocks(ops.shape(x)[1], self.rate) * self.rate)
        x = rearrange(x, "b (u r) h d -> (b h r) u d", r=self.rate)
        rows = ops.shape(x)[1]
        ends = [rows if end is None else _least(end, rows) for _, end in ranges]
        tiles = [crop(x, start, end - start) for (start, _), end in zip(ranges, ends, strict=True)]
        return [rearrange(x, "(b h r) i d -> b h r i d", h=heads, r=self.rate) for x in tiles]

    def join(self, tiles, n):
        x = tiles[0] if len(tiles) == 1 else ops.concatenate(tiles, axis=3)
        return crop(rearrange(x, "b h r u d -> b (u r) h d"), 0, n)


@dataclass(frozen=True, eq=False)
class Rows:
    """One tile a query: its keys are gathered by index. For queries at any position.

    Args:
        index: `(n, j)` int tensor: the keys that each query meets; a number
            outside of `[0, m)` is no key.
    """

    index: object

    def at(self, n, m):
        return self

    @property
    def pads_keys(self):
        return True

    def split_queries(self, x):
        return [rearrange(x, "b n h d -> b h n 1 d")]

    def split_keys(self, x, n):
        m = ops.shape(x)[1]
        inside = (self.index >= 0) & (self.index < m)
        x = ops.take(x, ops.where(inside, self.index, 0), axis=1)
        x = ops.where(inside[None, :, :, None, None], x, ops.zeros((), x.dtype))
        return [rearrange(x, "b n j h d -> b h n j d")]

    def join(self, tiles, n):
        return rearrange(tiles[0], "b h n 1 d -> b n h d")


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
    halo = _halo(left, right, rate, n)
    return halo if halo.scored_pairs < stairs.scored_pairs else stairs


def block_layout(size, n=None):
    """The layout of blocks of `size` along the diagonal."""
    return Halo(rate=1, width=size, first=0, last=size, n=n)


def column_layout(count, n=None, m=None):
    """The layout in which every query meets the first `count` keys."""
    return Stairs(1, ((0, None, 0, count if m is None else min(count, m)),), n, m)


def _halo(left, right, rate, n):
    """Tiles wide enough for the matrix product, narrow enough to score few pairs in vain."""
    span = left + right + 1
    width = 2 ** int(math.log2(math.sqrt(64 * span)))
    width = max(16, min(width, 512), span // 16)
    if n is not None:
        rows = _blocks(n, rate)
        width = _blocks(rows, _blocks(rows, width))  # even tiles: the last is not half empty
    return Halo(rate, width, -left, width + right, n)


def _stairs(left, right, rate, n, m):
    """Up to 16 groups of queries, so that half of a triangle is scored and not all of a square."""
    if n is None or m is None:
        return Stairs(rate, ((0, None, 0, None),), n, m)
    queries, keys = _blocks(n, rate), _blocks(m, rate)
    bounded = left is not None or right is not None
    groups = min(16, max(1, queries // 64)) if bounded else 1
    edges = np.linspace(0, queries, groups + 1).astype(int).tolist()
    steps = []
    for q0, q1 in itertools.pairwise(edges):
        k0 = 0 if left is None else min(max(q0 - left, 0), keys - 1)
        k1 = keys if right is None else min(max(q1 + right, k0 + 1), keys)
        steps.append((q0, q1, k0, k1))
    return Stairs(rate, tuple(steps), n, m)


def band_rows(left, right, rate, q_pos, m):
    """The keys that lie in a band around queries at any positions.

    Args:
        left, right, rate: as in `band_layout`.
        q_pos: `(n,)` int tensor.
        m: number of keys, int or int tensor.

    Returns:
        An `(n, j)` index for `Rows`, or `None` if the band has all keys.
    """
    if left is not None and right is not None:
        return q_pos[:, None] + ops.arange(-left, right + 1, rate, dtype=q_pos.dtype)[None, :]
    if rate == 1:
        return None
    return (q_pos % rate)[:, None] + rate * ops.arange(_blocks(m, rate), dtype=q_pos.dtype)[None, :]


def block_rows(size, q_pos):
    """The keys in the blocks of queries at any positions: an `(n, size)` index for `Rows`."""
    return (q_pos // size * size)[:, None] + ops.arange(size, dtype=q_pos.dtype)[None, :]
