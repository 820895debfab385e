"""Score modifications to draw from, each with its value and derivatives in numpy.

`build` gives what a call takes as its `score_mod`. `values` gives the new scores, their
derivative by the old ones, and for a mod with a table which entry each score reads and the
derivative by that.
"""

from dataclasses import dataclass

import numpy as np
from keras import ops

from sparse_attn import ALiBi, PositionBias, ScoreMod, SoftCap

REACH = 3  # of the table: distances beyond it read its ends


@dataclass(frozen=True)
class Plain:
    """A function of scores and positions, and its derivative by the scores."""

    causal = False  # whether it has a meaning only where the key is not ahead of the query
    has_table = False
    can_forbid = False

    def build(self, heads, table):
        def function(scores, q_pos, k_pos, head):
            return self.new(ops, scores, *(ops.cast(x, scores.dtype) for x in (q_pos, k_pos)))

        return function

    def values(self, s, q, k, head, table):
        q, k = np.asarray(q, "float64"), np.asarray(k, "float64")
        return self.new(np, s, q, k), np.broadcast_to(self.slope(s, q, k), s.shape), None


class Near(Plain):
    def new(self, x, s, q, k):
        return s / (1 + x.abs(q - k) / 8)

    def slope(self, s, q, k):
        return 1 / (1 + np.abs(q - k) / 8)


class Sine(Plain):
    def new(self, x, s, q, k):
        return x.sin(2 * s)

    def slope(self, s, q, k):
        return 2 * np.cos(2 * s)


class Log(Plain):
    """Not finite where the key is ahead of the query, as the next two."""

    causal = True

    def new(self, x, s, q, k):
        return s - x.log(1 + q - k)

    def slope(self, s, q, k):
        return 1.0


class Divide(Plain):
    causal = True

    def new(self, x, s, q, k):
        return s / (1 + q - k)

    def slope(self, s, q, k):
        return 1 / (1 + q - k)


class Root(Plain):
    causal = True

    def new(self, x, s, q, k):
        return s * x.sqrt(q - k)

    def slope(self, s, q, k):
        return np.sqrt(q - k)


class Forbid(Plain):
    """Forbids every third pair."""

    can_forbid = True

    def new(self, x, s, q, k):
        return x.where((q + 2 * k) % 3 == 1, -float("inf"), s)

    def slope(self, s, q, k):
        return 1.0


class ForbidAsMod(Forbid):
    """The same as a `ScoreMod`, whose scores need not be kept."""

    def build(self, heads, table):
        return _Mod(super().build(heads, table))


class LogAsMod(Log):
    def build(self, heads, table):
        return _Mod(super().build(heads, table))


@dataclass(frozen=True)
class Slopes(Plain):
    """`ALiBi`."""

    heads: int

    def build(self, heads, table):
        return ALiBi(self.heads)

    def values(self, s, q, k, head, table):
        lower = 2 ** int(np.log2(self.heads))
        slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
        slopes += [2 ** (-4 * (2 * i + 1) / lower) for i in range(self.heads - lower)]
        return s - np.array(slopes)[head] * abs(q - k), np.ones_like(s), None


@dataclass(frozen=True)
class Cap(Plain):
    """`SoftCap`."""

    cap: float

    def build(self, heads, table):
        return SoftCap(self.cap)

    def values(self, s, q, k, head, table):
        squashed = np.tanh(s / self.cap)
        return self.cap * squashed, 1 - squashed**2, None


class Added(Plain):
    """A `PositionBias` that reads a table by `ops.take`."""

    has_table = True

    def build(self, heads, table):
        return _TableBias(table)

    def values(self, s, q, k, head, table):
        rows = _rows(np, q, k, head)
        return s + table[rows], np.ones_like(s), (rows, np.ones_like(s))


class Times(Plain):
    """A `ScoreMod` that multiplies with a table."""

    has_table = True

    def build(self, heads, table):
        return _TableMod(table)

    def values(self, s, q, k, head, table):
        rows = _rows(np, q, k, head)
        factor = np.broadcast_to(1 + table[rows] / 4, s.shape)
        return s * factor, factor, (rows, s / 4)


class TimesByFunction(Times):
    """The same as a plain function, which the framework differentiates."""

    def build(self, heads, table):
        def function(scores, q_pos, k_pos, head):
            return _TableMod(table).modify(scores, q_pos, k_pos, head, table)

        return function


class _Mod(ScoreMod):
    def __init__(self, function):
        self.function = function

    def modify(self, scores, q_pos, k_pos, head):
        return self.function(scores, q_pos, k_pos, head)


class _TableBias(PositionBias):
    def __init__(self, table):
        self.tensors = (table,)

    def bias(self, q_pos, k_pos, head, table):
        return ops.take(table, _rows(ops, q_pos, k_pos, head), axis=0)


class _TableMod(ScoreMod):
    def __init__(self, table):
        self.tensors = (table,)

    def modify(self, scores, q_pos, k_pos, head, table):
        factor = 1 + ops.take(table, _rows(ops, q_pos, k_pos, head), axis=0) / 4
        return scores * ops.cast(factor, scores.dtype)


def _rows(x, q_pos, k_pos, head):
    """The entry of a table `(heads * (2 * REACH + 1),)` that each pair reads."""
    return head * (2 * REACH + 1) + x.clip(k_pos - q_pos, -REACH, REACH) + REACH


def draw(rng, heads):
    """A tuple of mods: mostly none, sometimes several, of which one may have a table."""
    if rng.random() < 0.5:
        return ()
    kinds = [
        Near(), Sine(), Log(), Divide(), Root(), Forbid(), ForbidAsMod(), LogAsMod(), Slopes(heads),
        Cap(2.0), Cap(30.0), Added(), Added(), Times(), Times(), TimesByFunction(),
    ]  # fmt: skip
    found = []
    for _ in range(int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))):
        mod = kinds[rng.integers(len(kinds))]
        if not (mod.has_table and any(x.has_table for x in found)):
            found.append(mod)
    return tuple(found)
