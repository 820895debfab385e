"""The tiles of a part: what is masked in them, and where their scores lie."""

import functools
import math
from dataclasses import dataclass

from keras import ops

from sparse_attn.bounds import Lists
from sparse_attn.checks import check_tensor
from sparse_attn.masking import at_least_lowest, is_not_masked
from sparse_attn.patterns import Band, Grid, ask
from sparse_attn.plan import allowed_pair, axes_of, has_surplus
from sparse_attn.reshaping import rearrange
from sparse_attn.scores import are_defined_everywhere, tensors_of
from sparse_attn.stream import Mask, Mods
from sparse_attn.terms import answers_all, period
from sparse_attn.tracing import known_size, most, take_along_last, trace_pairs


@dataclass(frozen=True)
class Given:
    """What a call gives beside its vectors and its pattern.

    Args:
        heads: the numbers of the heads of the queries, ints.
        repeats: how many of them share a head of keys.
        q_pos: `(n,)` int tensor, where the queries are not at `0, 1, 2, ...`.
        key_mask: `(b, m)` bool tensor or `None`.
        segment_ids: a pair of int tensors `(b, n)` and `(b, m)`, or `None`.
        attention_mask: `(b|1, h|1, n, m)` bool tensor or `None`.
        bias: `(b|1, h|1, n, m)` float tensor or `None`.
        mods: a tuple of `ScoreMod`.
        query_mask: `(b, n)` bool tensor or `None`.
    """

    heads: tuple
    repeats: int = 1
    q_pos: object = None
    key_mask: object = None
    segment_ids: object = None
    attention_mask: object = None
    bias: object = None
    mods: tuple = ()
    query_mask: object = None

    def sees_all(self, pattern, n, m):
        """Whether every valid key certainly has a valid query that may attend to it.

        What another key holds, be it NaN, must not matter. Lengths that are not
        known yet are taken to be equal.
        """
        of_queries, of_keys = self.segment_ids or (None, None)
        alike = self.query_mask is self.key_mask and of_queries is of_keys
        others = (self.q_pos, self.attention_mask, self.bias)
        if not alike or not all(x is None for x in others):
            return False
        shorter = isinstance(n, int) and isinstance(m, int) and n < m
        return not shorter and answers_all(pattern) is True

    @property
    def restricts(self):
        """Whether a query may be left without a key that the pattern allows."""
        given = (self.q_pos, self.key_mask, self.segment_ids, self.attention_mask, self.bias)
        return not all(x is None for x in given) or not are_defined_everywhere(self.mods)


class Tiles:
    """What is masked in the tiles of a part, and what is done to their scores.

    Tiles are `(b, h, t, i, j)`, or `(b, g, t, i, r, j)` where `r` heads of
    queries share each of `g` heads of keys.

    Args:
        part: a `Part`.
        layout: its layout, perhaps cut into runs.
        queries, keys: its `Chosen` ones.
        given: a `Given`.
        by_query: whether it matters which queries are valid, and not padding.

    Attributes:
        masks: for each run of the layout, a list of `Mask`: a pair is allowed
            if all of them say so.
        bias: for each run, float tiles; empty if there is no bias.
    """

    def __init__(self, part, layout, queries, keys, given, by_query=False):
        self.part, self.layout, self.queries, self.keys = part, layout, queries, keys
        self.given = given
        self.shifted = given.q_pos is not None
        self.q_pos = given.q_pos if self.shifted else queries.positions
        self.k_pos = keys.positions
        self.masks = self._pattern_masks()
        key_mask = given.key_mask
        if key_mask is not None or layout.pads_keys or not keys.all_exist:
            valid = _as_rows(self.k_pos) < keys.size
            if key_mask is not None:
                valid = valid & keys.pick(ops.expand_dims(key_mask, (2, 3)))
            valid = layout.split_keys(valid, queries.count)
            self._restrict([rearrange(x, "b 1 t j 1 -> b 1 t 1 j") for x in valid])
        if by_query or not are_defined_everywhere(given.mods):
            exists = _as_rows(queries.positions) < queries.size
            if by_query and given.query_mask is not None:
                exists = exists & queries.pick(ops.expand_dims(given.query_mask, (2, 3)))
            self._restrict(layout.split_queries(exists))
        if given.segment_ids is not None:
            self._restrict(*self._segments(*given.segment_ids))
        if given.attention_mask is not None:
            self._restrict(self._at_pairs(given.attention_mask))
        self.bias = []
        if given.bias is not None:
            tiles = self._at_pairs(given.bias)
            self._restrict([is_not_masked(x) for x in tiles])
            self.bias = [self._spread(at_least_lowest(x)) for x in tiles]

    def _spread(self, x):
        """Tiles `(b, h, t, i, j)` as those of scores are; heads and queries may be 1."""
        repeats = self.given.repeats
        if repeats == 1:
            return x
        if x.shape[1] == 1:
            return rearrange(x, "b 1 t i j -> b 1 t i 1 j")
        return rearrange(x, "b (g r) t i j -> b g t i r j", r=repeats)

    def _mask(self, function, tensors):
        return Mask(function, tuple(self._spread(x) for x in tensors))

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
                return ops.expand_dims(_evaluate(pattern, q_pos, k_pos), (0, 1))
            allowed = _evaluate(pattern, q_pos, k_pos[..., :partial])
            whole = [(0, 0)] * (len(k_pos.shape) - 1) + [(0, k_pos.shape[-1] - partial)]
            return ops.expand_dims(ops.pad(allowed, whole, constant_values=True), (0, 1))

        return [
            self._mask(evaluate, [ops.expand_dims(x, (0, 1)) for x in pair]) for pair in positions
        ]

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
            n, m = (
                (x.count + row - 1) // row if axis == 0 else size for x in (self.queries, self.keys)
            )
            pairs = layout.sample(ops.arange(n, dtype="int32"), ops.arange(m, dtype="int32"))
            tables.append([band(q_pos, k_pos)[0] for q_pos, k_pos in pairs])
        found = []
        for outer in tables[0]:
            for (inner,) in tables[1:]:
                both = ops.expand_dims(outer, (1, 3)) & ops.expand_dims(inner, (0, 2))
                outer = rearrange(both, "i k j l -> (i k) (j l)")
            found.append(self._mask(_as_it_is, [ops.expand_dims(outer, (0, 1, 2))]))
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
        rows = self.layout.split_queries(self.queries.pick(ops.expand_dims(of_queries, (2, 3))))
        columns = self.layout.split_keys(
            self.keys.pick(ops.expand_dims(of_keys, (2, 3))), self.queries.count
        )
        return rows, [rearrange(x, "b 1 t j 1 -> b 1 t 1 j") for x in columns]

    def _restrict(self, *tensors):
        """Allow what a mask does, or what is equal in two tensors."""
        function = _as_it_is if len(tensors) == 1 else ops.equal
        masks = [self._mask(function, each) for each in zip(*tensors, strict=True)]
        self.masks = [[*terms, mask] for terms, mask in zip(self.masks, masks, strict=True)]

    def _at_pairs(self, x):
        """A table `(b|1, h|1, n, m)` at each tile's pairs of positions."""
        rows = self.queries.pick(rearrange(x, "b h n m -> b n h m"))
        rows = self.layout.split_queries(rows)
        columns = [k_pos for _, k_pos in self._positions]
        if not self.keys.all_exist:  # those beyond the end are masked, whatever stands in the last
            last = most(self.keys.size, 1) - 1
            columns = [ops.minimum(k_pos, last) for k_pos in columns]
        return [
            take_along_last(tile, ops.expand_dims(k_pos, (0, 1)))
            for tile, k_pos in zip(rows, columns, strict=True)
        ]

    def mods(self, pattern):
        """The `Mods` of the call, or `None`; `pattern` is that of all its parts."""
        mods = self.given.mods
        if not mods:
            return None
        pair = (0, 0)
        if not are_defined_everywhere(mods):
            n, m = (known_size(x.size) for x in (self.queries, self.keys))
            pair = allowed_pair(pattern, None if self.shifted else n, m)
        example = *pair, self.given.heads[0]
        return Mods(mods, self._positions_for(mods), tensors_of(mods), example)

    def _positions_for(self, mods):
        """For each run `(q_pos, k_pos, head)`, which broadcast with its scores.

        Where distances alone matter, those of one tile serve all that are alike.
        """
        chosen = (self.given.q_pos, self.part.queries, self.part.keys)
        positions = None
        if all(x is None for x in chosen) and all(mod.by_distance for mod in mods):
            positions = self.layout.sample(self.q_pos, self.k_pos)
        heads = rearrange(ops.convert_to_tensor(self.given.heads, "int32"), "h -> 1 h 1 1 1")
        return [
            tuple(
                self._spread(x)
                for x in (ops.expand_dims(q_pos, (0, 1)), ops.expand_dims(k_pos, (0, 1)), heads)
            )
            for q_pos, k_pos in (self._positions if positions is None else positions)
        ]

    @property
    def answer_all(self):
        """Whether every query certainly has a key: its own."""
        n, m = self.queries.size, self.keys.size
        known = isinstance(n, int) and isinstance(m, int)
        if self.given.restricts or not known or n > m:
            return False
        return answers_all(self.part.pattern) is True


def _as_it_is(mask):
    return mask


def _as_rows(positions):
    return rearrange(positions, "n -> 1 n 1 1")


def trace_predicate(pattern):
    """Raise what `_evaluate` would, once a model is traced: for predicates of users."""
    n, m = (
        size if pattern.max_length is None else min(size, pattern.max_length) for size in (2, 3)
    )
    trace_pairs(functools.partial(_evaluate, pattern), n, m)


def _evaluate(pattern, q_pos, k_pos):
    """The predicate's answer as a bool tensor of the rank of the positions, checked."""
    answer = ops.convert_to_tensor(ask(pattern, q_pos, k_pos))
    rank = len(q_pos.shape)
    answer = answer[(None,) * (rank - len(answer.shape))]
    sizes = [(1, a, b) for a, b in zip(q_pos.shape, k_pos.shape, strict=True)]
    shape = tuple(
        tuple(sorted({*size})) if all(isinstance(x, int) for x in size) else None for size in sizes
    )
    return check_tensor(f"{pattern!r}(q_pos, k_pos)", answer, "bool", shape)
