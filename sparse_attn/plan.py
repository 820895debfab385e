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

from sparse_attn import blocks, recipes
from sparse_attn.bounds import (
    KINDS,
    Lists,
    Select,
    as_band,
    contains,
    cost,
    hull,
    layout,
    meet,
    simplify,
)
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
    And,
    Atrous,
    Axial,
    Band,
    Blocks,
    Causal,
    Dilated,
    Fixed,
    Full,
    Global,
    Grid,
    Local,
    Neighborhood,
    Not,
    Or,
    Pattern,
    PerHead,
    Prefix,
    Random,
    Ranges,
    Strided,
    check_pattern,
    look_up,
)
from sparse_attn.tracing import eagerly

MAX_PARTS = 4
# What takes time beside the pairs, said in pairs: another part and its merge, and tiles at all.
PART_PAIRS = 2**16
TILE_PAIRS = 2**13
FIND_PAIRS = 2**20  # of cheaper plans, no blocks are looked for
MASK_COST = 0.25  # a mask, beside the pairs that it is of
GATHER_COST = 16  # keys that are gathered, in rows of a block


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
        raise TypeError(received("pattern", "one of the `patterns` of a PerHead", pattern))
    n = None if n is None else check_int("n", n, minimum=1)
    m = n if m is None else check_int("m", m, minimum=1)
    pattern.check_lengths(n, m)
    return _plan(pattern, n, m)


def _plan(pattern, n, m):
    return _cached_plan(pattern, n, m, len(bound.registry) + len(rewrite.registry))


@functools.lru_cache(maxsize=1024)
def _cached_plan(pattern, n, m, registered):
    parts = _disjoint(_terms(pattern, n, m), n, m)
    if n is not None and m is not None and _may_find(pattern, parts, n, m):
        others = [_disjoint(terms, n, m) for terms in _found(pattern, parts, n, m)]
        parts = min(parts, *others, key=_spent)
    pairs = sum(part.scored_pairs for part in parts)
    if parts and pairs + TILE_PAIRS + PART_PAIRS * (len(parts) - 1) >= cost(Band(), n, m):
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
    return pairs + PART_PAIRS * (len(parts) - 1)


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
    bands = [as_band(part.bound) for part in parts]

    def columns(first, last):
        start = min(0 if band.left is None else first - band.left for band in bands)
        stop = max(m if band.right is None else last + band.right + 1 for band in bands)
        return start, stop

    same = blocks_of(pattern, n, m)
    base, same = (same, same) if same >= blocks.SIZES[0] else (blocks.SIZES[0], 1)
    with eagerly():
        found = blocks.find(pattern._answer, n, m, base, columns, same)
    if found.band is not None:
        yield _term(Band(*found.band), pattern, n, m)
    for size in {base, *blocks.SIZES}:
        if size % base == 0:
            yield _listed(pattern, found.merged(size // base), n, m)


def _listed(pattern, found, n, m):
    """Terms of listed blocks."""
    terms = []
    for rows in blocks.groups(found.counts, found.size, PART_PAIRS):
        queries = None if len(rows) == len(found.rows) else Ranges.of_blocks(rows, found.size, n)
        longest = found.counts[rows].max()
        if longest * found.size >= m:
            bound = Band() if queries is None else Select(queries)
            exact = all(found.whole[row].all() and len(found.rows[row]) == longest for row in rows)
            terms.append(Term(bound, bound if exact else _within(pattern, queries)))
            continue
        lists, partial = [], 0
        for row in rows:
            numbers, whole = found.rows[row], found.whole[row]
            partial = max(partial, int((~whole).sum()))
            numbers = numbers[np.argsort(whole, kind="stable")].tolist()
            lists.append(tuple(numbers + [-1] * (longest - len(numbers))))
        bound = Lists(found.size, tuple(lists), queries, partial)
        terms.append(Term(bound, bound if partial == 0 else _within(pattern, queries)))
    return terms


def _within(pattern, queries):
    return pattern if queries is None else pattern & Select(queries)


def is_opaque(pattern):
    """Whether nothing is known of some predicate in a pattern."""
    pattern = _registered(rewrite, pattern)
    match pattern:
        case And() | Or():
            return is_opaque(pattern.first) or is_opaque(pattern.second)
        case Not():
            return is_opaque(pattern.pattern)
    return type(pattern) not in bound.registry


def blocks_of(pattern, n, m):
    """The size of blocks that a pattern certainly allows or forbids as a whole; an int."""
    pattern = _registered(rewrite, pattern)
    match pattern:
        case And() | Or():
            return math.gcd(blocks_of(pattern.first, n, m), blocks_of(pattern.second, n, m))
        case Not():
            return blocks_of(pattern.pattern, n, m)
        case Grid():
            whole = all(band == Band() for band in pattern.bands[1:])
            return math.prod(pattern.sizes) if whole else 1
        case Lists():
            return pattern.size
        case Select():
            edges = [0 if pattern.band == Band() else 1]
            for chosen, size in ((pattern.queries, n), (pattern.keys, m)):
                if chosen is not None:
                    edges += [chosen.period or 0]
                    edges += [x for pair in chosen.ranges for x in pair if x < size]
            return math.gcd(*edges)
    return 0 if pattern == Band() else 1


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
    parts = [_part_at(part, q_pos, n, m) for part in _plan(pattern, None, None)]
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


def period(pattern):
    """How far queries and keys can certainly move together without a change; 0 if not at all.

    Args:
        pattern: a `Pattern`.

    Returns:
        An int: 1 if the pattern depends on the distance `k - q` alone.
    """
    pattern = _registered(rewrite, pattern)
    match pattern:
        case Band():
            return 1
        case Grid():
            return math.prod(pattern.sizes)
        case And() | Or():
            return math.lcm(period(pattern.first), period(pattern.second))
        case Not():
            return period(pattern.pattern)
        case Select():
            chosen = [x.period or 0 for x in (pattern.queries, pattern.keys) if x is not None]
            return math.lcm(1, *chosen)
    return 0


def answers_all(pattern):
    """Whether every query certainly has a key, its own; `None` if that is not certain."""
    pattern = _registered(rewrite, pattern)
    match pattern:
        case Band() | Grid():
            return bool(pattern(0, 0))
        case And():
            both = {answers_all(pattern.first), answers_all(pattern.second)}
            return False if False in both else None if None in both else True
        case Or():
            both = {answers_all(pattern.first), answers_all(pattern.second)}
            return True if True in both else None if None in both else False
        case Not():
            answer = answers_all(pattern.pattern)
            return None if answer is None else not answer
    return None


# ---- From a pattern to terms -------------------------------------------------


@functools.singledispatch
def bound(pattern):
    """A `Band`, `Grid`, `Blocks`, `Prefix` or the like that allows every pair that `pattern` does.

    Register one for a pattern of your own to make it fast:
    `bound.register(MyPattern, lambda pattern: Band(pattern.reach, 0))`. It
    holds for that class alone: a subclass may allow other pairs.

    Args:
        pattern: a `Pattern`.

    Returns:
        A `Pattern`: what is registered for its class, or `Band()`, all pairs.
    """
    return Band()


@functools.singledispatch
def rewrite(pattern):
    """The same pairs, said in the terms of a plan.

    Args:
        pattern: a `Pattern`.

    Returns:
        A `Pattern` equal to it at every pair: what is registered for its
        class, and for that class alone, or `pattern` itself.
    """
    return pattern


def _registered(function, pattern):
    """What is registered for a class, not for a parent whose predicate it may override."""
    return function.registry.get(type(pattern), function.registry[object])(pattern)


rewrite.register(Full, lambda pattern: Band())
rewrite.register(Causal, lambda pattern: Band(right=0))
rewrite.register(Local, lambda pattern: Band(*pattern.sides))
rewrite.register(Atrous, lambda pattern: Band(rate=pattern.rate))
rewrite.register(Strided, lambda pattern: Local(pattern.stride) | Atrous(pattern.stride))
rewrite.register(
    Dilated, lambda pattern: Local(pattern.window * pattern.rate) & Atrous(pattern.rate)
)
rewrite.register(Blocks, lambda pattern: pattern.grid)
rewrite.register(Neighborhood, lambda pattern: pattern.grid)
rewrite.register(Axial, lambda pattern: functools.reduce(Or, pattern.grids))
rewrite.register(Prefix, lambda pattern: Select(keys=Global(pattern.length).ranges))
rewrite.register(
    Global, lambda pattern: Select(queries=pattern.ranges) | Select(keys=pattern.ranges)
)
rewrite.register(Fixed, lambda pattern: Blocks(pattern.stride) | Select(keys=pattern.ends))
rewrite.register(
    Random,
    lambda pattern: Lists(pattern.block_size, tuple(map(tuple, pattern.lists.tolist()))),
)
for _kind in recipes.Recipe.__subclasses__():
    rewrite.register(_kind, lambda pattern: _registered(rewrite, pattern.pattern))
for _kind in KINDS:
    bound.register(_kind, lambda pattern: pattern)


@dataclass(frozen=True)
class Term:
    """Pairs to compute, `pattern`, and a bound that holds them."""

    bound: Pattern
    pattern: Pattern

    @property
    def is_exact(self):
        return self.bound == self.pattern

    def is_within(self, other):
        """Whether `other` certainly allows all that this term does."""
        return other.is_exact and contains(other.bound, self.bound)


def _terms(pattern, n, m):
    """Spread a pattern into terms joined by "or"; they may overlap."""
    pattern = _registered(rewrite, pattern)
    kind = type(pattern)
    if kind is Or:
        return _fuse(_terms(pattern.first, n, m) + _terms(pattern.second, n, m), n, m)
    if kind is And:
        pairs = itertools.product(_terms(pattern.first, n, m), _terms(pattern.second, n, m))
        both = (_both(a, b, n, m) for a, b in pairs)
        return _fuse([term for term in both if term is not None], n, m)
    if kind is Not:
        return _complement(_registered(rewrite, pattern.pattern), n, m)
    return _term(_registered(bound, pattern), pattern, n, m)


def _complement(pattern, n, m):
    """The terms of `~pattern`: "not" is moved inwards."""
    kind = type(pattern)
    if kind is Or:
        return _terms(~pattern.first & ~pattern.second, n, m)
    if kind is And:
        return _terms(~pattern.first | ~pattern.second, n, m)
    if kind is Not:
        return _terms(pattern.pattern, n, m)
    if kind is Band and pattern.rate == 1:
        sides = []
        if pattern.right is not None:
            sides.append(Band(left=-pattern.right - 1))
        if pattern.left is not None:
            sides.append(Band(right=-pattern.left - 1))
        return [term for side in sides for term in _term(side, side, n, m)]
    return _term(Band(), ~pattern, n, m)


def _term(found, pattern, n, m):
    """A list of the one term with this bound in its simplest form, or of none."""
    found = _registered(rewrite, found)
    if type(found) not in KINDS:
        raise TypeError(
            f"The bound of a pattern must be a Band, Grid, Blocks, Prefix or the like, which is "
            f"no union. Received: bound({pattern!r}) = {found!r}"
        )
    simple = simplify(found, n, m)
    if simple is None:
        return []
    return [Term(simple, simple if found == pattern else pattern)]


def _both(a, b, n, m):
    """The term of the pairs in `a` and in `b`, or `None` if there are none."""
    if a.is_within(b):
        return a
    if b.is_within(a):
        return b
    met, exact = meet(a.bound, b.bound)
    met = None if met is None else simplify(met, n, m)
    if met is None:
        return None
    exact = exact and a.is_exact and b.is_exact
    # What is met may be dearer: a narrow band among many chosen ones.
    cheaper = min(met, a.bound, b.bound, key=lambda bound: cost(bound, n, m))
    if exact:
        return Term(cheaper, met)
    return Term(cheaper, a.pattern & b.pattern)


def _fuse(terms, n, m):
    """Join terms while that saves more than a part costs, and until there are few."""
    terms = list(dict.fromkeys(terms))
    while len(terms) > 1:
        fusions = []
        for a, b in itertools.combinations(terms, 2):
            fused = _either(a, b)
            saved = cost(a.bound, n, m) + cost(b.bound, n, m) - cost(fused.bound, n, m)
            fusions.append((saved, a, b, fused))
        saved, a, b, fused = max(fusions, key=lambda fusion: fusion[0])
        if saved + PART_PAIRS < 0 and len(terms) <= MAX_PARTS:
            break
        terms = [term for term in terms if term not in (a, b)] + [fused]
    return terms


def _either(a, b):
    """One term for the pairs in `a` or in `b`."""
    if a.is_within(b):
        return b
    if b.is_within(a):
        return a
    return Term(hull(a.bound, b.bound), a.pattern | b.pattern)
