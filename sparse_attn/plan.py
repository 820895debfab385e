"""Plans: a pattern as a few disjoint parts, each with the tiles that hold it.

A plan is found in three steps. The pattern is spread into terms joined by
"or"; each term has a *bound* (`bounds.py`) that holds all of its pairs. Terms
that cost less together than apart are fused. Then each term gives up what an
earlier one already allows, so that no pair is scored twice, and its layout
follows from its bound.

A new pattern works at once, since any pattern is bounded by `Band()`. It
becomes fast when its bound is registered:

    @bound.register
    def _(pattern: MyPattern):
        return Band(left=pattern.reach, right=0)
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from sparse_attn import blocks, terms
from sparse_attn.bounds import Lists, Select, as_band, cost, layout, meet
from sparse_attn.checks import check_int, received
from sparse_attn.layouts import (
    NOMINAL_LENGTH,
    Gather,
    Halo,
    Nested,
    Stairs,
    band_rows,
    block_rows,
    grid_rows,
)
from sparse_attn.patterns import (
    Band,
    Grid,
    Pattern,
    PerHead,
    Ranges,
    check_pattern,
    look_up,
)
from sparse_attn.terms import Term, blocks_of, bound, is_opaque, rewrite, term_within, terms_of
from sparse_attn.tracing import eagerly

# What takes time beside the pairs, said in pairs: tiles at all; see `terms.PART_PAIRS`.
TILE_PAIRS = 2**13
FIND_PAIRS = 2**13  # of cheaper plans, no blocks are looked for
MASK_COST = 0.25  # a mask, beside the pairs that it is of
GATHER_COST = 16  # keys that are gathered, in rows of a block
# How one pair of a pattern is looked for.
SEARCH_SIZE = 128  # among the first positions; then among twice as many, and so on
SEARCH_AT_ONCE = 2**19  # pairs
SEARCH_PAIRS = 2**26  # of unknown lengths, where none is found


@dataclass(frozen=True)
class Part:
    """Some pairs of a pattern, and the tiles that hold them.

    Attributes:
        bound: a bound that allows at least these pairs.
        pattern: the exact pairs; equal to `bound` where that is exact.
        layout: how keys are brought to queries, among the chosen ones.
        queries, keys: the `Ranges` of the chosen ones, or `None` for all.
        scored_pairs: pairs of positions in the tiles.
    """

    bound: Pattern
    pattern: Pattern
    layout: object
    queries: Ranges | None
    keys: Ranges | None
    scored_pairs: int

    @classmethod
    def of(cls, bound, pattern, n, m):
        chosen = (getattr(bound, name, None) for name in ("queries", "keys"))
        return cls(bound, pattern, layout(bound, n, m), *chosen, cost(bound, n, m))


@dataclass(frozen=True)
class Plan:
    """Disjoint parts whose union is the pattern. Iterates over them.

    Attributes:
        parts: a tuple of `Part`.
        n, m: the lengths it was made for, or `None`.
    """

    parts: tuple[Part, ...]
    n: int | None = None
    m: int | None = None

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)

    @property
    def scored_pairs(self):
        """Pairs that are scored for each head and batch row; an int.

        Where a length is unknown, at `NOMINAL_LENGTH`, a very long one. The
        tiles of a short sequence are cut down to it once its length is there.
        """
        return sum(part.scored_pairs for part in self.parts)

    @property
    def share(self):
        """Scored pairs as a share of all `n * m`; a float in [0, 1]."""
        return self.scored_pairs / ((self.n or NOMINAL_LENGTH) * (self.m or NOMINAL_LENGTH))

    def __str__(self):
        lines = [f"{len(self.parts)} part(s), {self.share:.1%} of all pairs scored"]
        for part in self.parts:
            exact = "" if part.pattern == part.bound else f", masked by {part.pattern!r}"
            lines.append(f"  {part.scored_pairs:>12,} pairs in {part.bound!r}{exact}")
        return "\n".join(lines)


def plan(pattern, n=None, m=None):
    """Decide how a pattern is computed.

    Every pair that the pattern allows lies in exactly one part, and no plan
    for known lengths scores more pairs than a dense computation does.

    Args:
        pattern: a `Pattern`.
        n: number of queries, or `None` while it is unknown.
        m: number of keys, `n` by default.

    Returns:
        A `Plan`: disjoint parts `(bound, pattern, layout)`. It has no parts
        if the pattern allows nothing at these lengths.

    Raises:
        TypeError, ValueError: if `pattern` is no hashable pattern, a length is
            no positive int, or the pattern cannot relate the lengths.

    Example:

    >>> from sparse_attn import Causal, Strided, plan
    >>> print(plan(Causal() & Strided(64), 4096))
    2 part(s), 4.7% of all pairs scored
           524,288 pairs in Band(64, 0)
           262,144 pairs in Band(None, 0, 64), masked by Band(None, 0, 64) & ~Band(64, 0)
    """
    check_pattern("pattern", pattern)
    if isinstance(pattern, PerHead):
        requirement = "the pattern of one head: [plan(p, n) for p in pattern.patterns] plans all"
        raise TypeError(received("pattern", requirement, pattern))
    n = None if n is None else check_int("n", n, minimum=1)
    m = n if m is None else check_int("m", m, minimum=1)
    return plan_lengths(pattern, n, m)


def plan_lengths(pattern, n, m):
    """`plan` where either length may be unknown alone: `m=None` is not `n` here."""
    pattern.check_lengths(n, m)
    registered = (*bound.registry.values(), *rewrite.registry.values())
    return _cached_plan(pattern, n, m, registered)


@functools.lru_cache(maxsize=1024)
def _cached_plan(pattern, n, m, registered):
    spread = terms_of(pattern, n, m)
    parts = _disjoint(terms.fuse(spread, n, m), n, m)
    if n is not None and m is not None and _may_find(pattern, parts, n, m):
        others = [_disjoint(found, n, m) for found in _found(pattern, parts, n, m)]
        if len(spread) > 1 and any(term.is_opaque for term in spread):
            narrow = [found for term in spread for found in _narrowed(term, n, m)]
            others.append(_disjoint(terms.fuse(narrow, n, m), n, m))
        parts = min(parts, *others, key=_spent)
    pairs = sum(part.scored_pairs for part in parts)
    if parts and pairs + TILE_PAIRS + terms.PART_PAIRS * (len(parts) - 1) >= cost(Band(), n, m):
        parts = [Part.of(Band(), parts[0].pattern if len(parts) == 1 else pattern, n, m)]
    return Plan(tuple(parts), n, m)


def _disjoint(terms, n, m):
    """Parts of terms; the dearest comes first, and the others give up what it allows."""
    terms = sorted(terms, key=lambda term: -cost(term.bound, n, m))
    parts = []
    for i, term in enumerate(terms):
        exact = term.pattern
        for earlier in terms[:i]:
            if meet(term.bound, earlier.bound)[0] is not None:
                exact = exact & ~earlier.pattern
        parts.append(Part.of(term.bound, exact, n, m))
    return parts


def _spent(parts):
    """What parts cost, in pairs of a part that is laid out as it is."""
    pairs = 0
    for part in parts:
        size = part.bound.size if isinstance(part.bound, Lists) else math.inf
        masked = 0 if part.pattern == part.bound else MASK_COST
        pairs += part.scored_pairs * (1 + masked + GATHER_COST / size)
    return pairs + terms.PART_PAIRS * (len(parts) - 1)


def _may_find(pattern, parts, n, m):
    """Whether blocks may be found that cost less than these parts.

    Where a predicate is a user's own, with no bound; or where several parts are
    made of blocks: these are one.
    """
    if _spent(parts) < FIND_PAIRS or all(part.pattern == part.bound for part in parts):
        return False
    return is_opaque(pattern) or blocks_of(pattern, n, m) >= blocks.SIZES[0]


def _found(pattern, parts, n, m):
    """Lists of terms: the pattern in the band that holds it, and in blocks of each size."""
    columns = columns_of(parts, m)
    same = blocks_of(pattern, n, m)
    base, same = (same, same) if same >= blocks.SIZES[0] else (blocks.SIZES[0], 1)
    with eagerly():
        found = blocks.find(pattern._answer, n, m, base, columns, same)
    if found.band is not None:
        yield term_within(Band(*found.band), pattern, n, m)
    for size in {base, *blocks.SIZES}:
        if size % base == 0:
            yield _listed(pattern, found.merged(size // base), n, m)


def _narrowed(term, n, m):
    """Terms of the pairs of a term, in bounds that are found where its predicate is opaque."""
    if not term.is_opaque:
        return [term]
    found = _found(term.pattern, _disjoint([term], n, m), n, m)
    return min([term], *found, key=lambda each: _spent(_disjoint(each, n, m)))


def columns_of(parts, m):
    """Which keys some parts may hold: a function of the first and the last of some queries.

    It returns `(start, stop)`, within `[0, m]`.
    """
    bands = [as_band(part.bound) for part in parts]

    def columns(first, last):
        starts = [0 if band.left is None else first - band.left for band in bands]
        stops = [m if band.right is None else last + band.right + 1 for band in bands]
        start = max(0, min(starts, default=0))
        return start, max(start, min(m, max(stops, default=0)))

    return columns


def _listed(pattern, found, n, m):
    """Terms of listed blocks."""
    made = []
    for rows in blocks.groups(found.counts, found.size, terms.PART_PAIRS):
        queries = None if len(rows) == len(found.rows) else Ranges.of_blocks(rows, found.size, n)
        longest = found.counts[rows].max()
        if longest * found.size >= m:
            bound = Band() if queries is None else Select(queries)
            exact = all(found.whole[row].all() and len(found.rows[row]) == longest for row in rows)
            made.append(Term(bound, bound if exact else _within(pattern, queries)))
            continue
        lists, partial = [], 0
        for row in rows:
            numbers, whole = found.rows[row], found.whole[row]
            partial = max(partial, int((~whole).sum()))
            numbers = numbers[np.argsort(whole, kind="stable")].tolist()
            lists.append(tuple(numbers + [-1] * (longest - len(numbers))))
        bound = Lists(found.size, tuple(lists), queries, partial)
        made.append(Term(bound, bound if partial == 0 else _within(pattern, queries)))
    return made


def _within(pattern, queries):
    return pattern if queries is None else pattern & Select(queries)


def plan_at(pattern, q_pos, n, m, dim):
    """A plan for queries at any positions, such as those of a decoder.

    Args:
        pattern: a `Pattern`.
        q_pos: `(n,)` int tensor, the queries' positions.
        n, m: numbers of queries and keys, ints or int tensors.
        dim: int, features of a key.

    Returns:
        A `Plan`. Each query's keys are gathered, or scored densely where fewer
        numbers are moved so, or where a length is unknown and the pattern unbounded.
    """
    check_pattern("pattern", pattern)
    pattern.check_lengths(None, m if isinstance(m, int) else None)
    parts = [_part_at(part, q_pos, n, m) for part in plan_lengths(pattern, None, None)]
    known = isinstance(n, int) and isinstance(m, int)
    dense = Part.of(Band(), pattern, *((n, m) if known else (None, None)))
    if known and sum(_moved(part, m, dim) for part in parts) >= _moved(dense, m, dim):
        parts = [dense]
    return Plan(tuple(parts), n if known else None, m if known else None)


def _part_at(part, q_pos, n, m):
    """A part for queries at any positions: which of them are chosen, is not known."""
    bound = part.bound
    match bound:
        case Band(left, right, rate):
            index = band_rows(left, right, rate, q_pos, m)
        case Grid(sizes, bands):
            index = grid_rows(sizes, [(x.left, x.right, x.rate) for x in bands], q_pos, m)
        case Lists(size):
            index = block_rows(look_up(bound.table, q_pos // size), size)
        case _:
            index = None
    n, m = (size if isinstance(size, int) else None for size in (n, m))
    if index is None:
        keys = bound.keys if isinstance(bound, Select) else None
        return Part.of(Band() if keys is None else Select(keys=keys), part.pattern, n, m)
    found = Gather(index)
    return Part(bound, part.pattern, found, None, None, found.scored_pairs if n and m else 0)


def _moved(part, m, dim):
    """Numbers that a part makes for a head: copies of keys, and scores."""
    keys = part.scored_pairs if isinstance(part.layout, Gather) else m
    return part.scored_pairs + keys * dim


@functools.lru_cache(maxsize=1024)
def allowed_pair(pattern, n, m):
    """A pair that a pattern allows, so that a function of positions may be evaluated there.

    The predicate is evaluated on pairs within the bounds of its plan alone, the first
    positions first: on all of them if the lengths are known, and otherwise on
    those below `NOMINAL_LENGTH`, but on few more than `SEARCH_PAIRS` in vain.

    Args:
        pattern: a `Pattern`.
        n, m: numbers of queries and keys, or `None` while they are unknown.

    Returns:
        `(q_pos, k_pos)`, ints; `(0, 0)` if none is found.
    """
    if 0 in (n, m):
        return 0, 0
    known = None not in (n, m)
    parts = plan_lengths(pattern, n, m) if known else terms_of(pattern, n, m)
    limit = min(NOMINAL_LENGTH, pattern.max_length or NOMINAL_LENGTH)
    lengths = [limit if size is None else size for size in (n, m)]
    size, looked_at = SEARCH_SIZE, 0
    while True:
        within = [min(size, length) for length in lengths]
        for q_pos, k_pos in itertools.chain(*(_held(part, *within) for part in parts)):
            with eagerly():
                found = np.argwhere(pattern._answer(q_pos, k_pos))
            if len(found):
                return int(q_pos[found[0, 0]]), int(k_pos[found[0, 1]])
            looked_at += len(q_pos) * len(k_pos)
        if within == lengths or (not known and looked_at > SEARCH_PAIRS):
            return 0, 0
        size *= 2


def _held(part, n, m):
    """The queries and keys among the first `n` and `m` whose pairs hold a part, or a term.

    Yields:
        Pairs of arrays of positions, some of them at a time.
    """
    bound, columns = part.bound, columns_of([part], m)
    listed = isinstance(bound, Lists)
    queries, keys = (
        np.arange(size) if chosen is None else chosen.positions(size)
        for chosen, size in ((getattr(bound, x, None), y) for x, y in (("queries", n), ("keys", m)))
    )
    rows = bound.size if listed else SEARCH_SIZE
    for first in range(0, len(queries), rows):
        q_pos = queries[first : first + rows]
        if listed:
            starts = np.array(bound.lists[first // rows])[:, None] * rows
            near = (starts + np.arange(rows)).reshape(-1)
            near = near[(near >= 0) & (near < m)]
        else:
            near = keys[slice(*np.searchsorted(keys, columns(q_pos[0], q_pos[-1])))]
        count = max(1, SEARCH_AT_ONCE // len(q_pos))
        for start in range(0, len(near), count):
            yield q_pos, near[start : start + count]


def has_surplus(part, layout):
    """For each run of a part's layout, whether its tiles may hold pairs that are not the part's.

    Args:
        part: a `Part`.
        layout: its layout, perhaps cut into runs.

    Returns:
        A list of bools. What only padding brings is not looked at.
    """
    pattern, runs = part.pattern, layout.runs()
    if isinstance(part.bound, Select):
        needed = pattern != part.bound or part.bound.band != Band()
    elif isinstance(pattern, Band):
        return _band_surplus(pattern, layout)
    elif isinstance(pattern, Grid) and pattern == part.bound:
        needed = _grid_surplus(pattern, layout)
    else:
        needed = pattern != part.bound
    return [needed] * len(runs)


def _band_surplus(band, layout):
    if not isinstance(layout, (Halo, Stairs)):
        return [True] * len(layout.runs())
    if not all(isinstance(x, int) for x in (layout.rate, *itertools.chain(*layout.distances))):
        return [True] * len(layout.runs())
    return [
        layout.rate % band.rate > 0
        or (band.left is not None and low < -band.left)
        or (band.right is not None and high > band.right)
        for low, high in layout.distances
    ]


def _grid_surplus(grid, layout):
    if isinstance(layout, Halo):  # of whole rows
        known = isinstance(layout.width, int)
        return not known or layout.width != math.prod(grid.sizes)
    axes, bands = axes_of(layout), grid.bands
    if len(axes) != len(bands):
        return True
    return any(any(_band_surplus(*pair)) for pair in zip(bands, axes, strict=True))


def axes_of(layout):
    """The layouts of the axes of a grid."""
    return [layout.outer, *axes_of(layout.inner)] if isinstance(layout, Nested) else [layout]
