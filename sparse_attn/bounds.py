"""Bounds: the families of patterns that have tiles of their own, and their arithmetic.

A bound is one of

- a `Band`: how far apart, and how often;
- a `Grid`: a band along each axis of a grid;
- a `Select`: some of the queries or of the keys, and a band among these;
- a `Lists`: blocks of keys, listed for blocks of queries.

All that plans need to know of them is here: what holds both of two bounds or
either, whether one holds another, and the layout of each.
"""

import functools
import itertools
import math

import numpy as np

from sparse_attn.layouts import (
    NOMINAL_LENGTH,
    Gather,
    band_layout,
    grid_layout,
    select_layout,
)
from sparse_attn.patterns import Band, Grid, Pattern, Ranges, leaf, listed, look_up

LONGEST = 2**31  # positions are int32: where a length is unknown, it is no longer than this


@leaf
class Select(Pattern):
    """Chosen queries or keys: `band(q_pos, k_pos)`, and both are among the chosen ones.

    Args:
        queries, keys: `Ranges`, or `None` for all.
        band: a `Band`.
    """

    queries: Ranges | None = None
    keys: Ranges | None = None
    band: Band = Band()

    def __repr__(self):
        chosen = [("queries", self.queries), ("keys", self.keys)]
        arguments = [f"{name}={x!r}" for name, x in chosen if x is not None]
        arguments += [f"band={self.band!r}"] if self.band != Band() else []
        return f"Select({', '.join(arguments)})"

    def rows_apart(self, n):
        return np.zeros(0, int) if self.queries is None else self.queries.positions(n)

    def __call__(self, q_pos, k_pos):
        answer = self.band(q_pos, k_pos)
        for chosen, positions in ((self.queries, q_pos), (self.keys, k_pos)):
            if chosen is not None:
                answer = answer & chosen(positions)
        return answer


@leaf
class Lists(Pattern):
    """Listed blocks: the block of `k_pos` is in the list of the block of `q_pos`.

    Args:
        size: a positive int, the size of a block.
        lists: for each block of the chosen queries a tuple of numbers of blocks
            of keys, all equally long; negative ones are no blocks.
        queries: `Ranges` of whole blocks, or `None` for all.
        partial: behind so many blocks of each list all others are allowed as a
            whole in the pattern that this bounds.
    """

    size: int
    lists: tuple[tuple[int, ...], ...]
    queries: Ranges | None = None
    partial: int = 0

    def __repr__(self):
        chosen = "" if self.queries is None else f", queries={self.queries!r}"
        each = len(self.lists[0]) if self.lists else 0
        return f"Lists({self.size}, {len(self.lists)} of {each} blocks{chosen})"

    @property
    def table(self):
        """`lists` as an array `(blocks, listed)`."""
        return np.array(self.lists, "int32").reshape(len(self.lists), -1)

    def __call__(self, q_pos, k_pos):
        table, block = self.table, q_pos // self.size
        if self.queries is None:
            return listed(table, block, k_pos // self.size)
        numbers = self.queries.count(np.arange(self.queries.ranges[-1][1] + self.size)) // self.size
        number = look_up(numbers, block * self.size)
        return listed(table, number, k_pos // self.size) & self.queries(q_pos)


KINDS = (Band, Grid, Select, Lists)


def simplify(bound, n, m):
    """The bound in its simplest form for `n` queries and `m` keys; `None` if it is empty.

    Args:
        bound: a bound.
        n, m: ints, or `None` while they are unknown.
    """
    n, m = LONGEST if n is None else n, LONGEST if m is None else m
    match bound:
        case Band():
            return _simplify_band(bound, n, m)
        case Grid():
            return _simplify_grid(bound, n, m)
        case Select():
            return _simplify_select(bound, n, m)
    return bound if bound.lists and bound.lists[0] else None


def _simplify_band(bound, n, m):
    left, right, rate = bound.left, bound.right, bound.rate
    if rate >= max(n, m):  # of the comb, the diagonal alone is in reach
        return Band(0, 0) if bound(0, 0) else None
    # What is out of reach is unlimited, or empty.
    if left is not None:
        left = left // rate * rate
        if -left >= m:
            return None
        if left >= n - 1:
            left = None
    if right is not None:
        right = right // rate * rate
        if -right >= n:
            return None
        if right >= m - 1:
            right = None
    if left is not None and right is not None:
        if -left > right:
            return None
        if -left == right:
            rate = 1
    return Band(left, right, rate)


def _simplify_grid(bound, n, m):
    rows = math.prod(bound.sizes)
    lengths = [(-(-n // rows), -(-m // rows)), *((size, size) for size in bound.sizes)]
    bands = [_simplify_band(band, *pair) for band, pair in zip(bound.bands, lengths, strict=True)]
    if None in bands:
        return None
    sizes = list(bound.sizes)
    # Neighbouring axes that are both whole, or both the diagonal, are one axis.
    axis = 0
    while axis + 1 < len(bands):
        if bands[axis] == bands[axis + 1] and bands[axis] in (Band(), Band(0, 0)):
            del bands[axis + 1]
            if axis == 0:
                del sizes[0]
            else:
                sizes[axis - 1 : axis + 1] = [sizes[axis - 1] * sizes[axis]]
        else:
            axis += 1
    if len(bands) == 1:
        return _simplify_band(bands[0], n, m)
    rows = math.prod(sizes)
    if all(band == Band(0, 0) for band in bands[1:]):  # a comb of them
        left, right, rate = bands[0].left, bands[0].right, bands[0].rate
        left, right = (None if x is None else x * rows for x in (left, right))
        return _simplify_band(Band(left, right, rate * rows), n, m)
    if max(n, m) <= rows and bands[0] == Band(0, 0):  # a single row
        return simplify(Grid(tuple(sizes[1:]), tuple(bands[1:])), n, m)
    return Grid(tuple(sizes), tuple(bands))


def _simplify_select(bound, n, m):
    band = _simplify_band(bound.band, n, m)
    chosen = [
        None if x is None else within(x, size) for x, size in ((bound.queries, n), (bound.keys, m))
    ]
    if band is None or any(x is not None and not x.ranges for x in chosen):
        return None
    whole = [x is None or x.ranges == ((0, size),) for x, size in zip(chosen, (n, m), strict=True)]
    if all(whole):
        return band
    return Select(*(None if w else x for w, x in zip(whole, chosen, strict=True)), band)


def within(chosen, length):
    """The `Ranges` in `[0, length)`, cut off there; not periodic if there is one period only."""
    if chosen.period is not None and chosen.period < length:
        return chosen
    ranges = tuple((a, min(b, length)) for a, b in chosen.ranges if a < length)
    return Ranges(ranges)


def meet(a, b):
    """A bound that holds what both do and whether it is just that; `(None, True)` if empty.

    Where it is not, it is the meeting of the bands that hold them.
    """
    match a, b:
        case Band(), Band():
            return simplify(_meet_bands(a, b), None, None), True
        case Grid(), Grid() if a.sizes == b.sizes:
            bands = tuple(_meet_bands(x, y) for x, y in zip(a.bands, b.bands, strict=True))
            return simplify(Grid(a.sizes, bands), None, None), True
        case (Select(), Select() | Band()) | (Band(), Select()):
            a, b = (x if isinstance(x, Select) else Select(band=x) for x in (a, b))
            queries = _meet_ranges(a.queries, b.queries)
            keys = _meet_ranges(a.keys, b.keys)
            if NotImplemented not in (queries, keys):
                found = Select(queries, keys, _meet_bands(a.band, b.band))
                return simplify(found, None, None), True
    chosen = [getattr(x, "queries", None) for x in (a, b)]
    if _meet_ranges(*chosen) == Ranges(()):
        return None, True
    band = simplify(_meet_bands(as_band(a), as_band(b)), None, None)
    return band, band is None


def _meet_bands(a, b):
    left, right = (
        min((x for x in sides if x is not None), default=None)
        for sides in ((a.left, b.left), (a.right, b.right))
    )
    return Band(left, right, math.lcm(a.rate, b.rate))


def _meet_ranges(a, b):
    """The ranges in both; `NotImplemented` where they cannot be told."""
    if a is None or b is None or a == b:
        return b if a is None else a
    if a.period is not None or b.period is not None:
        return NotImplemented
    both = [(max(a0, b0), min(a1, b1)) for a0, a1 in a.ranges for b0, b1 in b.ranges]
    return Ranges(tuple(sorted((start, stop) for start, stop in both if start < stop)))


def hull(a, b):
    """A bound that holds what either does."""
    if contains(a, b):
        return a
    if contains(b, a):
        return b
    a, b = as_band(a), as_band(b)
    left = None if None in (a.left, b.left) else max(a.left, b.left)
    right = None if None in (a.right, b.right) else max(a.right, b.right)
    return Band(left, right, math.gcd(a.rate, b.rate))


def contains(outer, inner):
    """Whether `outer` certainly holds all of `inner`."""
    if outer == inner:
        return True
    match outer, inner:
        case Band(), _:
            return simplify(_meet_bands(outer, as_band(inner)), None, None) == as_band(inner)
        case Grid(), Grid():
            if outer.sizes == inner.sizes:
                pairs = zip(outer.bands, inner.bands, strict=True)
                return all(contains(x, y) for x, y in pairs)
            # Smaller blocks within larger ones.
            return (
                outer.bands == inner.bands == (Band(0, 0), Band())
                and outer.sizes[0] % inner.sizes[0] == 0
            )
        case Select(), Select():
            return (
                contains(outer.band, inner.band)
                and _contains_ranges(outer.queries, inner.queries)
                and _contains_ranges(outer.keys, inner.keys)
            )
    return False


def are_apart(chosen):
    """Whether no position is certainly in two of some `Ranges`, of which `None` is all."""
    return all(_meet_ranges(a, b) == Ranges(()) for a, b in itertools.combinations(chosen, 2))


def _contains_ranges(outer, inner):
    return outer is None or (inner is not None and _meet_ranges(outer, inner) == inner)


def as_band(bound):
    """A `Band` that holds a bound."""
    match bound:
        case Band():
            return bound
        case Select():
            return bound.band
        case Grid():
            rows, band = math.prod(bound.sizes), bound.bands[0]
            left, right = (
                None if x is None else (x + 1) * rows - 1 for x in (band.left, band.right)
            )
            return Band(left, right)
    return Band()


@functools.lru_cache(maxsize=4096)
def layout(bound, n=None, m=None):
    """The layout that holds a bound, among its chosen queries and keys."""
    match bound:
        case Band(left, right, rate):
            return band_layout(left, right, rate, n, m)
        case Grid(sizes, bands):
            return grid_layout(sizes, [(x.left, x.right, x.rate) for x in bands], n, m)
        case Select(queries, keys, band):
            return select_layout(band.left, band.right, queries, keys, n, m)
        case Lists(size):
            table = bound.table
            exist = table.size > 0 and table.min() >= 0 and (table.max() + 1) * size <= (m or 0)
            return Gather(table, size, size, pads_keys=not exist)
    raise TypeError(f"A bound must be one of {KINDS}. Received: {bound!r}")


def cost(bound, n, m):
    """Pairs of positions in the tiles of a bound; at `NOMINAL_LENGTH` where one is unknown."""
    if isinstance(bound, Select):  # of an unknown length, too, these are a part
        n, m = n or NOMINAL_LENGTH, m or NOMINAL_LENGTH
    return layout(bound, n, m).scored_pairs
