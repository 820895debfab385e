"""Terms: a pattern as pairs joined by "or", each of them within a bound.

The pattern's operators are followed inwards. What is registered for the class of
a pattern says how: `rewrite`, the same pairs in other words; `bound`, what holds
them (`bounds.py`).
"""

import functools
import itertools
import math
from dataclasses import dataclass

from sparse_attn import recipes
from sparse_attn.bounds import (
    KINDS,
    Lists,
    Select,
    as_band,
    contains,
    cost,
    hull,
    meet,
    simplify,
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
    Strided,
)

MAX_PARTS = 4
# What takes time beside the pairs, said in pairs: another part and its merge.
PART_PAIRS = 2**16


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


def registered(function, pattern):
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
    lambda pattern: Lists(
        min(pattern.block_size, pattern.length), tuple(map(tuple, pattern.lists.tolist()))
    ),
)
for _kind in recipes.Recipe.__subclasses__():
    rewrite.register(_kind, lambda pattern: registered(rewrite, pattern.pattern))
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

    @property
    def is_opaque(self):
        """Whether its bound may be wider than need be, since a predicate is opaque."""
        return not self.is_exact and is_opaque(self.pattern)

    def is_within(self, other):
        """Whether `other` certainly allows all that this term does."""
        return other.is_exact and contains(other.bound, self.bound)


def terms_of(pattern, n, m):
    """Spread a pattern into terms joined by "or"; they may overlap.

    Those of known and those of opaque predicates are not yet fused with each other.
    """
    pattern = registered(rewrite, pattern)
    kind = type(pattern)
    if kind is Or:
        found = terms_of(pattern.first, n, m) + terms_of(pattern.second, n, m)
        return fuse(found, n, m, opaque_apart=True)
    if kind is And:
        pairs = itertools.product(terms_of(pattern.first, n, m), terms_of(pattern.second, n, m))
        met = (meet_terms(a, b, n, m) for a, b in pairs)
        return fuse([x for x in met if x is not None], n, m, opaque_apart=True)
    if kind is Not:
        return _complement(registered(rewrite, pattern.pattern), n, m)
    return term_within(registered(bound, pattern), pattern, n, m)


def _complement(pattern, n, m):
    """The terms of `~pattern`: "not" is moved inwards."""
    kind = type(pattern)
    if kind is Or:
        return terms_of(~pattern.first & ~pattern.second, n, m)
    if kind is And:
        return terms_of(~pattern.first | ~pattern.second, n, m)
    if kind is Not:
        return terms_of(pattern.pattern, n, m)
    if kind is Band and pattern.rate == 1:
        sides = []
        if pattern.right is not None:
            sides.append(Band(left=-pattern.right - 1))
        if pattern.left is not None:
            sides.append(Band(right=-pattern.left - 1))
        return [term for side in sides for term in term_within(side, side, n, m)]
    return term_within(Band(), ~pattern, n, m)


def term_within(found, pattern, n, m):
    """A list of the one term with this bound in its simplest form, or of none."""
    found = registered(rewrite, found)
    if type(found) not in KINDS:
        raise TypeError(
            f"The bound of a pattern must be a Band, Grid, Blocks, Prefix or the like, which is "
            f"no union. Received: bound({pattern!r}) = {found!r}"
        )
    simple = simplify(found, n, m)
    if simple is None:
        return []
    return [Term(simple, simple if found == pattern else pattern)]


def meet_terms(a, b, n, m):
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


def fuse(terms, n, m, *, opaque_apart=False):
    """Join terms while that saves more than a part costs, and until there are few.

    Args:
        terms: a list of `Term`.
        n, m: the lengths, or `None`.
        opaque_apart: whether terms of opaque predicates, whose bounds may yet be
            found, are left alone while there are few.

    Returns:
        A list of `Term`.
    """
    terms = list(dict.fromkeys(terms))
    while len(terms) > 1:
        fusions = []
        for a, b in itertools.combinations(terms, 2):
            if opaque_apart and len(terms) <= MAX_PARTS and (a.is_opaque or b.is_opaque):
                continue
            fused = _either(a, b)
            saved = cost(a.bound, n, m) + cost(b.bound, n, m) - cost(fused.bound, n, m)
            fusions.append((saved, a, b, fused))
        if not fusions:
            break
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


# ---- What is certain of a pattern ----


def is_opaque(pattern):
    """Whether nothing is known of some predicate in a pattern."""
    pattern = registered(rewrite, pattern)
    match pattern:
        case And() | Or():
            return is_opaque(pattern.first) or is_opaque(pattern.second)
        case Not():
            return is_opaque(pattern.pattern)
    return type(pattern) not in bound.registry


def blocks_of(pattern, n, m):
    """The size of blocks that a pattern certainly allows or forbids as a whole; an int."""
    pattern = registered(rewrite, pattern)
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


def period(pattern):
    """How far queries and keys can certainly move together without a change; 0 if not at all.

    Args:
        pattern: a `Pattern`.

    Returns:
        An int: 1 if the pattern depends on the distance `k - q` alone.
    """
    pattern = registered(rewrite, pattern)
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
    pattern = registered(rewrite, pattern)
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


def is_causal(pattern):
    """Whether it is certain that no query sees a later key."""
    if isinstance(pattern, PerHead):
        return all(map(is_causal, pattern.patterns))
    pattern = registered(rewrite, pattern)
    match pattern:
        case And():
            return is_causal(pattern.first) or is_causal(pattern.second)
        case Or():
            return is_causal(pattern.first) and is_causal(pattern.second)
    right = as_band(registered(bound, pattern)).right
    return right is not None and right <= 0
