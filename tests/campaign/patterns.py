"""Random patterns, and what each kind of pattern means, written a second time.

The definitions follow README's table, in int64 numpy, where no parameter and no position
overflows. They share nothing with the predicates but the blocks that `Random` has drawn.
"""

import functools
import sys
from dataclasses import dataclass

import numpy as np

from sparse_attn import (
    Atrous,
    Axial,
    Band,
    BigBird,
    Blocks,
    Causal,
    Dilated,
    Fixed,
    Full,
    Global,
    Grid,
    Local,
    Longformer,
    Neighborhood,
    Pattern,
    PerHead,
    Prefix,
    PrefixLM,
    Random,
    SparseTransformer,
    StreamingLLM,
    Strided,
    patterns,
)

HUGE = (2**31 - 1, 2**31, 2**32 + 1, 2**35, 2**40, sys.maxsize)
FAR = 2**32  # farther apart than any two positions


# ---- A user's own patterns --------------------------------------------------------------


@dataclass(frozen=True)
class Landmarks(Pattern):
    """Depends on the keys alone: what it returns is of their shape."""

    step: int

    def __call__(self, q_pos, k_pos):
        return k_pos % self.step == 0


@dataclass(frozen=True)
class Digits(Pattern):
    """Depends on the positions themselves, and has no bound."""

    base: int

    def __call__(self, q_pos, k_pos):
        return k_pos % self.base <= q_pos % self.base


@dataclass(frozen=True)
class Table(Pattern):
    """Reads a table, made for one length."""

    length: int

    @property
    def max_length(self):
        return self.length

    def __call__(self, q_pos, k_pos):
        own = np.arange(self.length) * 7 % 5
        return patterns.look_up(own, q_pos) != patterns.look_up(own, k_pos)


# ---- Definitions: q is (n, 1), k is (1, m), both int64 -----------------------------------


@functools.singledispatch
def allowed(pattern, q, k):
    """Which pairs a pattern allows, by the meaning that README gives it."""
    raise NotImplementedError(pattern)


def _everything(q, k):
    return np.ones(np.broadcast_shapes(q.shape, k.shape), bool)


def _coordinates(x, sizes):
    """The coordinates of positions on a grid with these sizes of all axes but the first."""
    found = []
    for size in reversed(sizes):
        x, place = np.divmod(x, size)
        found.append(place)
    return [x, *reversed(found)]


def _each(value, axes):
    return value if isinstance(value, tuple) else (value,) * axes


def _is_one_of(x, positions):
    return x < positions if isinstance(positions, int) else np.isin(x, positions)


def _drawn(pattern, q, k):
    """Whether the block of the key is in the list that was drawn for the block of the query."""
    q_block, k_block = q // pattern.block_size, k // pattern.block_size
    listed = np.zeros((len(pattern.lists),) * 2, bool)
    for row, blocks in zip(listed, pattern.lists, strict=True):
        row[blocks[blocks >= 0]] = True
    return listed[q_block, k_block]


def _define(kind):
    return lambda function: allowed.register(kind)(function)


_define(Full)(lambda p, q, k: _everything(q, k))
_define(Causal)(lambda p, q, k: q - k >= 0)
_define(Atrous)(lambda p, q, k: abs(q - k) % p.rate == 0)
_define(Prefix)(lambda p, q, k: _everything(q, k) & (k < p.length))
_define(Global)(lambda p, q, k: _is_one_of(q, p.positions) | _is_one_of(k, p.positions))
_define(Landmarks)(lambda p, q, k: _everything(q, k) & (k == k // p.step * p.step))
_define(Digits)(lambda p, q, k: q - q // p.base * p.base >= k - k // p.base * p.base)
_define(Table)(lambda p, q, k: (q * 7 - k * 7) % 5 != 0)
_define(Random)(lambda p, q, k: _drawn(p, q, k))
_define(patterns.And)(lambda p, q, k: allowed(p.first, q, k) & allowed(p.second, q, k))
_define(patterns.Or)(lambda p, q, k: allowed(p.first, q, k) | allowed(p.second, q, k))
_define(patterns.Not)(lambda p, q, k: ~allowed(p.pattern, q, k))


def _between(q, k, left, right, rate=1):
    left, right = (FAR if x is None else min(max(x, -FAR), FAR) for x in (left, right))
    return (k >= q - left) & (k <= q + right) & (abs(q - k) % rate == 0)


@_define(Local)
def _(p, q, k):
    return _between(q, k, *_each(p.window, 2))


@_define(Band)
def _(p, q, k):
    return _between(q, k, p.left, p.right, p.rate)


@_define(Strided)
def _(p, q, k):
    return (abs(q - k) <= p.stride) | ((q - k) % p.stride == 0)


@_define(Dilated)
def _(p, q, k):
    steps, rest = np.divmod(abs(q - k), p.rate)
    return (rest == 0) & (steps <= p.window)


@_define(Blocks)
def _(p, q, k):
    return abs(q // p.size - k // p.size) <= p.reach


@_define(Fixed)
def _(p, q, k):
    return (q // p.stride == k // p.stride) | (p.stride - 1 - k % p.stride < p.summary)


@_define(Grid)
def _(p, q, k):
    axes = zip(p.bands, _coordinates(q, p.sizes), _coordinates(k, p.sizes), strict=True)
    return np.logical_and.reduce([allowed(band, x, y) for band, x, y in axes])


@_define(Neighborhood)
def _(p, q, k):
    found, axes = _everything(q, k), len(p.shape)
    places = (_coordinates(x, p.shape[1:]) for x in (q, k))
    for x, y, window, rate in zip(*places, _each(p.window, axes), _each(p.dilation, axes)):  # noqa: B905
        steps, rest = np.divmod(abs(x - y), rate)
        found &= (rest == 0) & (steps <= window)
    return found


@_define(Axial)
def _(p, q, k):
    places = zip(_coordinates(q, p.shape[1:]), _coordinates(k, p.shape[1:]), strict=True)
    return sum((x != y).astype(int) for x, y in places) <= 1


@_define(Longformer)
def _(p, q, k):
    ends = [_is_one_of(x, p.global_positions) for x in (q, k)]
    return _between(q, k, *_each(p.window, 2)) | ends[0] | ends[1]


@_define(BigBird)
def _(p, q, k):
    x, y = q // p.block_size, k // p.block_size
    last = (p.length - 1) // p.block_size
    ends = (x == 0) | (y == 0) | (x == last) | (y == last)
    return (abs(x - y) <= 1) | ends | _drawn(p.drawn, q, k)


@_define(StreamingLLM)
def _(p, q, k):
    return (k <= q) & ((q - k <= p.window) | (k < p.sinks))


@_define(PrefixLM)
def _(p, q, k):
    return (k <= q) | (k < p.prefix)


@_define(SparseTransformer)
def _(p, q, k):
    far = Strided(p.stride) if p.kind == "strided" else Fixed(p.stride, p.summary)
    return (k <= q) & allowed(far, q, k)


# ---- Drawing ----------------------------------------------------------------------------


def draw(rng, longest, heads=1):
    """A random pattern that has a meaning up to a length, perhaps one for each head."""
    if heads > 1 and rng.random() < 0.2:
        count = int(rng.choice([x for x in range(1, heads + 1) if heads % x == 0]))
        found = PerHead([draw(rng, longest) for _ in range(count)])
        return Causal() & found if rng.random() < 0.3 else found
    return _expression(rng, longest, int(rng.choice(5, p=[0.25, 0.35, 0.25, 0.1, 0.05])))


def _expression(rng, longest, depth):
    if depth == 0:
        return draw_of(None, rng, longest)
    first = _expression(rng, longest, depth - 1)
    kind = rng.random()
    if kind < 0.2:
        return ~first
    second = _expression(rng, longest, int(rng.integers(depth)))
    return first & second if kind < 0.6 else first | second


def draw_of(kind, rng, longest):
    """A random pattern of a class, or of any class."""

    def number(low, high=9):
        """An int from `low` on: mostly small, sometimes of the length, rarely huge."""
        kind = rng.random()
        if kind < 0.05:
            return int(rng.choice(HUGE))
        return int(rng.integers(low, (longest + 2 if kind < 0.2 else high) + 1))

    def small(low, high):
        return int(rng.integers(low, high + 1))

    def side():
        return None if rng.random() < 0.3 else number(0)

    def signed():
        return None if rng.random() < 0.3 else number(0) * int(rng.choice([-1, 1]))

    def places():
        if rng.random() < 0.5:
            return number(0)
        return tuple(small(0, longest + 3) for _ in range(small(0, 5)))

    def up_to(low, high):
        return min(number(low), high)

    def shape(axes):
        """A grid of at least `longest` points, often no more than that."""
        if rng.random() < 0.05:
            return (2**16,) * axes
        sizes = [small(1, 9) for _ in range(axes - 1)]
        rows = -(-longest // int(np.prod(sizes))) + int(rng.choice([0, 0, 1, 50]))
        return (rows, *sizes)

    def neighborhood():
        axes = small(1, 3)
        windows, rates = (tuple(number(x, 4) for _ in range(axes)) for x in (0, 1))
        return shape(axes), windows, rates

    def grid():
        sizes = tuple(number(1) for _ in range(small(1, 2)))
        return sizes, tuple(Band(signed(), signed(), number(1, 4)) for _ in (0, *sizes))

    def fixed(*kinds):
        stride = number(1)
        return stride, *kinds, up_to(1, stride)

    def length():
        return longest + int(rng.choice([0, 0, 1, 50]))

    def block():
        return min(number(1), 4 * longest)  # a BigBird lists the positions of its last block

    makers = {
        Full: lambda: (),
        Causal: lambda: (),
        Local: lambda: (number(0) if rng.random() < 0.5 else (side(), side()),),
        Atrous: lambda: (number(1),),
        Strided: lambda: (number(1),),
        Dilated: lambda: (number(0), number(1)),
        Blocks: lambda: (number(1), up_to(0, 2**31) if rng.random() < 0.3 else 0),
        Fixed: fixed,
        Prefix: lambda: (number(0),),
        Global: lambda: (places(),),
        Band: lambda: (signed(), signed(), number(1)),
        Random: lambda: (
            length(), number(1), small(0, 4), small(0, 99), rng.choice([None, Local(1)])
        ),
        Longformer: lambda: (number(0) if rng.random() < 0.5 else (side(), side()), places()),
        BigBird: lambda: (length(), block(), small(0, 3), small(0, 99)),
        StreamingLLM: lambda: (number(0), number(0)),
        PrefixLM: lambda: (number(0),),
        SparseTransformer: lambda: (
            (number(1),) if rng.random() < 0.5 else fixed("fixed")
        ),
        Landmarks: lambda: (small(1, 9),),
        Digits: lambda: (small(1, 9),),
        Table: lambda: (length(),),
        Axial: lambda: (shape(small(2, 3)),),
        Neighborhood: neighborhood,
        Grid: grid,
    }  # fmt: skip
    kind = kind or list(makers)[rng.integers(len(makers))]
    return kind(*makers[kind]())
