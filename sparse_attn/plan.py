"""Plans: a pattern as a few disjoint parts, each with the tiles that hold it.

A plan is found in three steps. The pattern is spread into terms joined by
"or"; each term has a *bound*: a `Band`, a `Blocks` or a `Prefix` that holds
all of its pairs. Terms that cost less together than apart are fused. Then each
term gives up what an earlier one already allows, so that no pair is scored
twice, and its layout follows from its bound.

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

from sparse_attn.checks import check_int
from sparse_attn.layouts import (
    NOMINAL_LENGTH,
    Gather,
    band_layout,
    band_rows,
    block_layout,
    block_rows,
    column_layout,
)
from sparse_attn.patterns import (
    And,
    Atrous,
    Band,
    Blocks,
    Causal,
    Dilated,
    Full,
    Local,
    Not,
    Or,
    Pattern,
    Prefix,
    Strided,
    check_pattern,
)

MAX_PARTS = 4
# What takes time beside the pairs, said in pairs: another part and its merge, and tiles at all.
PART_PAIRS = 2**16
TILE_PAIRS = 2**13
LONGEST = 2**31  # positions are int32: where a length is unknown, it is no longer than this


@dataclass(frozen=True)
class Part:
    """Some pairs of a pattern, and the tiles that hold them.

    Attributes:
        bound: a `Band`, `Blocks` or `Prefix` that allows at least these pairs.
        pattern: the exact pairs; equal to `bound` where that is exact.
        layout: how keys are brought to queries.
    """

    bound: Pattern
    pattern: Pattern
    layout: object

    @property
    def scored_pairs(self):
        """Pairs of positions in the layout's tiles."""
        return self.layout.scored_pairs


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
    n = None if n is None else check_int("n", n, minimum=1)
    m = n if m is None else check_int("m", m, minimum=1)
    pattern.check_lengths(n, m)
    return _plan(pattern, n, m)


def _plan(pattern, n, m):
    return _cached_plan(pattern, n, m, len(bound.registry) + len(rewrite.registry))


@functools.lru_cache(maxsize=1024)
def _cached_plan(pattern, n, m, registered):
    terms = _terms(pattern, n, m)
    # The dearest first: the others give up what it allows.
    terms.sort(key=lambda term: -_cost(term.bound, n, m))
    parts = []
    for i, term in enumerate(terms):
        exact = term.pattern
        for earlier in terms[:i]:
            if _meet(term.bound, earlier.bound) is not None:
                exact = exact & ~earlier.pattern
        parts.append(Part(term.bound, exact, layout(term.bound, n, m)))
    dense = layout(Band(), n, m)
    overhead = TILE_PAIRS + PART_PAIRS * (len(parts) - 1)
    if parts and sum(part.scored_pairs for part in parts) + overhead >= dense.scored_pairs:
        parts = [Part(Band(), parts[0].pattern if len(parts) == 1 else pattern, dense)]
    return Plan(tuple(parts), n, m)


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
    parts = []
    for part in _plan(pattern, None, None):
        parts.append(Part(part.bound, part.pattern, _layout_at(part.bound, q_pos, n, m)))
    known = isinstance(n, int) and isinstance(m, int)
    dense = _dense_at(n, m)
    if known and sum(_moved(part.layout, m, dim) for part in parts) >= _moved(dense, m, dim):
        parts = [Part(Band(), pattern, dense)]
    return Plan(tuple(parts), n if known else None, m if known else None)


def _layout_at(bound, q_pos, n, m):
    if isinstance(bound, Prefix):  # the same keys for all
        return _dense_at(n, m, bound)
    if isinstance(bound, Blocks):
        index = block_rows(bound.size, q_pos)
    else:
        index = band_rows(bound.left, bound.right, bound.rate, q_pos, m)
    return _dense_at(n, m) if index is None else Gather(index)


def _dense_at(n, m, keys=Band()):  # noqa: B008 - a pattern never changes
    """The same keys for every query."""
    return layout(keys, *(size if isinstance(size, int) else None for size in (n, m)))


def _moved(layout, m, dim):
    """Numbers that a layout makes for a head: copies of keys, and scores."""
    if isinstance(layout, Gather):
        return layout.scored_pairs * (dim + 1)
    return layout.scored_pairs + m * dim


def has_surplus(part, layout):
    """For each run of a part's layout, whether its tiles may hold pairs that are not the part's.

    Args:
        part: a `Part`.
        layout: its layout, perhaps cut into runs.

    Returns:
        A list of bools. What only padding brings is not looked at.
    """
    runs, pattern = layout.runs(), part.pattern
    if not isinstance(pattern, Band):  # blocks and columns are laid out as they are
        return [pattern != part.bound] * len(runs)
    if not all(isinstance(x, int) for x in (layout.rate, *itertools.chain(*layout.distances))):
        return [True] * len(runs)
    return [
        layout.rate % pattern.rate > 0
        or (pattern.left is not None and low < -pattern.left)
        or (pattern.right is not None and high > pattern.right)
        for low, high in layout.distances
    ]


def is_stationary(pattern):
    """Whether a pattern certainly depends on the distance `k - q` alone."""
    pattern = _registered(rewrite, pattern)
    kind = type(pattern)
    if kind in (And, Or):
        return is_stationary(pattern.first) and is_stationary(pattern.second)
    return is_stationary(pattern.pattern) if kind is Not else kind is Band


@functools.lru_cache(maxsize=4096)
def layout(bound, n=None, m=None):
    """The layout that holds a bound: a `Band`, `Blocks` or `Prefix`."""
    match bound:
        case Band(left, right, rate):
            return band_layout(left, right, rate, n, m)
        case Blocks(size):
            return block_layout(size, n)
        case Prefix(length):
            return column_layout(length, n, m)
    raise TypeError(f"A bound must be a Band, Blocks or Prefix. Received: {bound!r}")


# ---- From a pattern to terms -------------------------------------------------


@functools.singledispatch
def bound(pattern):
    """A `Band`, `Blocks` or `Prefix` that allows every pair that `pattern` does.

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
for _kind in (Band, Blocks, Prefix):
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
        return other.is_exact and _contains(other.bound, self.bound)


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
    if type(found) not in (Band, Blocks, Prefix):
        raise TypeError(
            f"The bound of a pattern must be a Band, Blocks or Prefix. "
            f"Received: bound({pattern!r}) = {found!r}"
        )
    simple = _simplify(found, n, m)
    if simple is None:
        return []
    return [Term(simple, simple if found == pattern else pattern)]


def _both(a, b, n, m):
    """The term of the pairs in `a` and in `b`, or `None` if there are none."""
    if a.is_within(b):
        return a
    if b.is_within(a):
        return b
    met = _meet(a.bound, b.bound)
    met = None if met is None else _simplify(met, n, m)
    if met is None:
        return None
    if isinstance(a.bound, Band) and isinstance(b.bound, Band):
        if a.is_exact and b.is_exact:
            return Term(met, met)
        return Term(met, a.pattern & b.pattern)
    cheaper = min(a.bound, b.bound, met, key=lambda bound: _cost(bound, n, m))
    return Term(cheaper, a.pattern & b.pattern)


def _fuse(terms, n, m):
    """Join terms while that saves more than a part costs, and until there are few."""
    terms = list(dict.fromkeys(terms))
    while len(terms) > 1:
        fusions = []
        for a, b in itertools.combinations(terms, 2):
            fused = _either(a, b)
            saved = _cost(a.bound, n, m) + _cost(b.bound, n, m) - _cost(fused.bound, n, m)
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
    return Term(_hull(a.bound, b.bound), a.pattern | b.pattern)


# ---- The arithmetic of bounds ------------------------------------------------


def _cost(bound, n, m):
    return layout(bound, n, m).scored_pairs


def _simplify(bound, n, m):
    """The bound in its simplest form for `n` queries and `m` keys; `None` if it is empty."""
    n, m = LONGEST if n is None else n, LONGEST if m is None else m
    longest = max(n, m)
    match bound:
        case Prefix(length):
            if length == 0:
                return None
            return Band() if length >= m else bound
        case Blocks(size):
            return Band() if size >= longest else bound
    left, right, rate = bound.left, bound.right, bound.rate
    if rate >= longest:  # of the comb, the diagonal alone is in reach
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


def _meet(a, b):
    """A band that holds what both bounds do, exactly if they are bands; `None` if it is empty."""
    a, b = _as_band(a), _as_band(b)
    return _simplify(
        Band(
            _tighter(a.left, b.left),
            _tighter(a.right, b.right),
            math.lcm(a.rate, b.rate),
        ),
        None,
        None,
    )


def _hull(a, b):
    """A bound that holds what either does."""
    if _contains(a, b):
        return a
    if _contains(b, a):
        return b
    a, b = _as_band(a), _as_band(b)
    left = None if None in (a.left, b.left) else max(a.left, b.left)
    right = None if None in (a.right, b.right) else max(a.right, b.right)
    return Band(left, right, math.gcd(a.rate, b.rate))


def _contains(outer, inner):
    """Whether `outer` certainly holds all of `inner`."""
    match outer, inner:
        case Prefix(longer), Prefix(shorter):
            return shorter <= longer
        case Blocks(larger), Blocks(smaller):
            return larger % smaller == 0
        case Band(), _:
            return _meet(outer, inner) == _as_band(inner)
    return False


def _as_band(bound):
    match bound:
        case Prefix():
            return Band()
        case Blocks(size):
            return Band(size - 1, size - 1)
    return bound


def _tighter(a, b):
    """The smaller of two limits, where `None` is no limit."""
    return min((side for side in (a, b) if side is not None), default=None)
