"""What a pattern costs: pairs, operations, bytes; and how far it reaches in some layers.

All of it follows from the plan. Nothing here is of size n * m.
"""

import functools
import itertools
import math
import operator
from dataclasses import dataclass, fields, replace

import numpy as np
from keras import ops

from sparse_attn.bounds import Select, are_apart
from sparse_attn.checks import check_int, received
from sparse_attn.layouts import Gather, Stairs
from sparse_attn.patterns import Band, Full, Grid, PerHead
from sparse_attn.plan import Part, columns_of, has_surplus, plan
from sparse_attn.reshaping import rearrange
from sparse_attn.stream import MAX_SCORE_BYTES, schedule, score_bytes
from sparse_attn.terms import is_opaque, meet_terms, terms_of
from sparse_attn.tracing import AT_ONCE, eagerly

LONGEST = 2**20  # up to here it is asked whether a pattern beats dense attention
PAIRS_AT_ONCE = 2**22
WORDS_AT_ONCE = 2**21  # of 64 positions each
SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# How many times over some bytes are there at the peak, as TensorFlow's allocator counts them: the
# least squares of 182 peaks of 50 patterns, grids, lone heads and half precision among them. They
# are off by 9% on average, and 178 of them by less than a quarter; the others are `Causal()` in
# bfloat16 (0.7 times) and a small `PerHead` (1.5 times).
FORWARD = {
    "tokens": 6.7,  # query, key, value and output, and copies of them
    "streamed": 1.4,  # these, where pieces run in a loop
    "parts": 1.8,  # these, for each part beside the first
    "padded": 1.2,  # keys and values that are laid out with padding
    "scores": 1,  # of the pieces that are at work at the same time
    "masked": 0.5,  # these, where a mask is added
    "gathered": 0.5,  # keys and values that are gathered for them
}
TRAINING = {
    "tokens": 9.9,
    "streamed": 8.3,
    "parts": 5.5,
    "padded": 1.6,
    "weights": 0.85,  # that are kept for the backward pass
    "scores": 1.15,
    "masked": 0.5,
    "gathered": 0.6,
}
AT_WORK = {"scores", "masked", "gathered"}  # for some heads; the rest lies there for all of them


@dataclass(frozen=True)
class Cost:
    """What `sparse_attention` costs with a pattern: see `Pattern.cost`.

    Attributes:
        pairs: the pairs that the pattern allows; of a `PerHead`, those of all its patterns.
        scored_pairs: the pairs that its plan scores; what is beyond `pairs` is masked.
        density: `pairs` as a share of all pairs, a float in [0, 1].
        forward_flops: floating point operations of the two matrix products over
            all scored pairs, heads and rows of the batch.
        forward_bytes: the most memory in use at any time of a forward pass, query,
            key, value and output among it.
        training_bytes: the same for a forward and a backward pass, with all gradients.
        dense: the same for `Full()`, a `Cost`; `None` there. Its scores, too, are
            worked off in pieces where they are many: only its time is quadratic.
            Beside a `PerHead`, of as many patterns.
        beats_dense_from: the least length at which the plan scores less than dense
            attention, found by halving from powers of two: a few lengths beyond
            it may be dense again. `None` if there is none up to `n` and,
            where every predicate is known, 2**20.
    """

    pairs: int
    scored_pairs: int
    density: float
    forward_flops: int
    forward_bytes: int
    training_bytes: int
    dense: "Cost | None" = None
    beats_dense_from: int | None = None

    def __str__(self):
        return self.table()

    def table(self, width=80):
        """The cost as lines of text.

        Args:
            width: characters of a line. Where lines would be longer, what a line is
                about stands above it.

        Returns:
            A str of lines.
        """
        rows = [("", "pattern", *(["dense", "ratio"] if self.dense else []))]
        for field in fields(self)[:6]:
            found = getattr(self, field.name)
            row = [field.name.replace("_", " "), _short(field.name, found)]
            if self.dense:
                other = getattr(self.dense, field.name)
                row += [_short(field.name, other), f"{found / other:.3f}"]
            rows.append(row)
        first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
        is_wide = first + sum(widths) + 2 * len(widths) > width
        lines = []
        for name, *values in rows:
            if is_wide and name:
                lines.append(name)
            name = "" if is_wide else name.ljust(first)
            lines.append(f"{name}  {'  '.join(map(str.rjust, values, widths))}")
        if self.dense:
            start = self.beats_dense_from
            known = start is not None
            lines.append(
                f"The shortest length that beats dense: {start:,}."
                if known
                else "Beats dense at no length that was tried."
            )
        return "\n".join(lines)


def _short(name, value):
    if name == "density":
        return f"{value:.2%}"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size and not name.endswith("pairs"):
            return f"{value / size:.3g} {unit}{'B' if name.endswith('bytes') else ''}"
    return f"{value:,}"


def cost(pattern, n, num_heads, head_dim, dtype, batch):
    """See `Pattern.cost`."""
    n = check_int("n", n, minimum=1)
    num_heads = check_int("num_heads", num_heads, minimum=1)
    head_dim = check_int("head_dim", head_dim, minimum=1)
    batch = check_int("batch", batch, minimum=1)
    if not isinstance(dtype, str):
        raise TypeError(received("dtype", f"one of {list(SIZES)}", dtype))
    if dtype not in SIZES:
        raise ValueError(received("dtype", f"one of {list(SIZES)}", dtype))
    pattern.check_lengths(n, n)
    call = _Call(n, num_heads, head_dim, dtype, batch)
    dense = PerHead([Full()] * len(_patterns(pattern)))  # as many pairs to compare with
    start = min_length_that_beats_dense(pattern, n)
    return replace(call.cost(pattern), dense=call.cost(dense), beats_dense_from=start)


def _patterns(pattern):
    return pattern.patterns if isinstance(pattern, PerHead) else (pattern,)


@dataclass(frozen=True)
class _Call:
    """A call of `sparse_attention`, but for its pattern."""

    n: int
    num_heads: int
    head_dim: int
    dtype: str
    batch: int

    def cost(self, pattern):
        """A `Cost` alone."""
        n, patterns = self.n, _patterns(pattern)
        is_shared = isinstance(pattern, PerHead)
        groups = pattern.groups(self.num_heads) if is_shared else {pattern: range(self.num_heads)}
        plans = {each: plan(each, n) for each in groups}
        counts = {each: count_pairs(each, n, n) for each in groups}
        pairs = sum(counts[each] for each in patterns)
        scored = sum(plans[each].scored_pairs * len(heads) for each, heads in groups.items())
        amounts = [self._amounts(plans[each].parts, len(heads)) for each, heads in groups.items()]
        return Cost(
            pairs=pairs,
            scored_pairs=sum(plans[each].scored_pairs for each in patterns),
            density=pairs / (len(patterns) * n * n),
            forward_flops=4 * self.batch * self.head_dim * scored,
            forward_bytes=_peak(amounts, FORWARD),
            training_bytes=_peak(amounts, TRAINING),
        )

    def _amounts(self, parts, heads):
        """How many bytes there are of what `FORWARD` and `TRAINING` count."""
        size = SIZES[self.dtype]
        tokens = self.batch * self.n * heads * self.head_dim * size
        pairs = sum(part.scored_pairs for part in parts)
        budget = MAX_SCORE_BYTES * heads // self.num_heads
        streamed = score_bytes(pairs, self.batch, heads, self.dtype) > budget
        found = dict.fromkeys((*FORWARD, *TRAINING), 0)
        found["tokens"], found["streamed"] = tokens, tokens if streamed else 0
        found["weights"] = 0 if streamed else self.batch * heads * pairs * size
        found["parts"] = tokens * max(0, len(parts) - 1)
        in_half = self.dtype == "bfloat16" and are_apart([part.queries for part in parts])
        score = 2 if in_half else max(4, size)
        for part in parts:
            layout = part.layout
            cut = schedule(layout, self.batch, heads, self.head_dim, self.dtype, streamed)
            at_once = min(AT_ONCE, cut.num_pieces(self.batch, heads))
            at_once *= cut.heads * (1 if streamed else self.batch)
            at_once *= max(run.scored_pairs for run in cut.layout.runs())
            copies = layout.copies * isinstance(layout, Gather)
            at_work = {
                "scores": score * at_once,
                "masked": score * at_once * any(has_surplus(part, layout)),
                "gathered": int(2 * size * self.head_dim * at_once * copies),
            }
            if sum(at_work.values()) > sum(found[name] for name in at_work):
                found |= at_work
            if not isinstance(layout, Stairs) and getattr(layout, "shifts", None) != (0, 0):
                keys = self.n if part.keys is None else int(part.keys.count(self.n))
                found["padded"] += 2 * tokens * keys // self.n
        return found


def _peak(amounts, factors):
    """The bytes at the peak: what lies there for all heads, and the pieces at work of some."""
    work = factors.keys() & AT_WORK
    total = sum(factors[name] * sum(x[name] for x in amounts) for name in factors.keys() - work)
    return int(total + max(sum(factors[name] * x[name] for name in work) for x in amounts))


def min_length_that_beats_dense(pattern, length):
    """The least length at which a plan is not dense, or `None`; see `Cost`."""
    patterns = _patterns(pattern)

    def beats(n):
        return 0 < sum(plan(each, n).scored_pairs for each in patterns) < len(patterns) * n * n

    longest = length if any(map(is_opaque, patterns)) else max(length, LONGEST)
    below = 0
    for n in sorted({length, *(2**i for i in range(longest.bit_length()))}):
        try:
            pattern.check_lengths(n, n)
        except ValueError:  # it has no meaning at this length, nor at longer ones
            return None
        if beats(n):
            while n - below > 1:
                middle = (n + below) // 2
                below, n = (below, middle) if beats(middle) else (middle, n)
            return n
        below = n
    return None


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """What positions reach through some layers: see `Pattern.receptive_field`.

    Attributes:
        layers: an int.
        reached: an `(n,)` int array: for each position how many it reaches through
            so many layers, itself among them.
        share: the mean of them as a share of `n`, a float in [0, 1].
        layers_to_settle: the least number of layers after which more reach no further.
        layers_to_all: the least number of layers through which every position
            reaches every other one; `None` if no number is enough, as of a causal
            pattern.
    """

    layers: int
    reached: np.ndarray
    share: float
    layers_to_settle: int
    layers_to_all: int | None


def receptive_field(pattern, layers, n):
    """See `Pattern.receptive_field`."""
    layers = check_int("layers", layers, minimum=0)
    n = check_int("n", n, minimum=1)
    pattern.check_lengths(n, n)
    if isinstance(pattern, PerHead):
        pattern = functools.reduce(operator.or_, dict.fromkeys(pattern.patterns))
    runs = _runs(pattern, n)
    if _are_windows(runs, n):
        return _field_of_windows(runs, layers, n)
    reached, settled, every = np.zeros(n, int), 0, True
    size = 64 * max(1, WORDS_AT_ONCE // (n * n.bit_length() + runs.shape[1]))
    for start in range(0, n, size):
        sources = np.arange(start, min(start + size, n))
        through, final, needed = _spread(runs, sources, layers, n)
        reached += through
        settled, every = max(settled, needed), every and bool((final == len(sources)).all())
    share = float(reached.mean() / n)
    return ReceptiveField(layers, reached, share, settled, settled if every else None)


def _are_windows(runs, n):
    """Whether each position sees itself and neighbours without a gap, and nothing else."""
    queries, first, last = runs
    whole = np.array_equal(queries, np.arange(n))
    return whole and bool(((first <= queries) & (queries <= last)).all())


def _field_of_windows(runs, layers, n):
    """A receptive field where what a position reaches is always a window, `low` to `high`."""
    _, first, last = runs
    low, high = np.arange(n), np.arange(n)
    through, step = np.ones(n, int), 0
    while True:
        after = _over_runs(np.minimum, low, first, last), _over_runs(np.maximum, high, first, last)
        if np.array_equal(after, (low, high)):
            break
        (low, high), step = after, step + 1
        if step <= layers:
            through = high - low + 1
    to_all = step if (low == 0).all() and (high == n - 1).all() else None
    return ReceptiveField(layers, through, float(through.mean() / n), step, to_all)


def _over_runs(function, x, first, last):
    """The least, the greatest or the union of `x[first : last + 1]`, for each of some runs."""
    levels = np.frexp(last - first + 1)[1] - 1  # exact: these are small ints
    table, found = x, np.empty((len(first), *x.shape[1:]), x.dtype)
    for level in range(levels.max() + 1):
        at = levels == level
        found[at] = function(table[first[at]], table[last[at] + 1 - 2**level])
        table = function(table[: -(2**level)], table[2**level :])
    return found


def _runs(pattern, n):
    """The keys of each query as runs: `(3, runs)` ints, the query, the first and the last key."""
    columns = columns_of(plan(pattern, n).parts, n)
    found, first = [np.zeros((3, 0), int)], 0
    while first < n:
        start, stop = columns(first, first)
        rows = min(PAIRS_AT_ONCE // max(1, stop - start), math.isqrt(PAIRS_AT_ONCE))
        q_pos = np.arange(first, min(first + max(1, rows), n))
        start, stop = columns(first, q_pos[-1])
        if start < stop:
            allowed = pattern._answer(q_pos, np.arange(start, stop))
            edges = np.diff(np.pad(allowed, ((0, 0), (1, 1))), axis=1)
            row, column = np.nonzero(edges)  # where runs begin and end in turn
            ends = start + column[::2], start + column[1::2] - 1
            found.append(np.stack([q_pos[row[::2]], *ends]))
        first += len(q_pos)
    return np.concatenate(found, axis=1)


def _spread(runs, sources, layers, n):
    """Through how many layers some positions, the sources, are seen by the others.

    A position holds a bit for each source that it reaches. Through a layer it
    gets those of its keys, and of a run of keys in one look at a table of
    powers of two.

    Returns:
        `(n,)` counts of the sources that are reached through `layers` layers and
        through any number of them; and the least number after which no more are.
    """
    queries, first, last = runs
    asked, starts = np.unique(queries, return_index=True)
    bits = np.zeros((n, -(-len(sources) // 64)), "uint64")
    places = sources - sources[0]
    bits[sources, places // 64] = np.uint64(1) << (places % 64).astype("uint64")
    through, step = _count_bits(bits), 0
    while len(asked):
        seen = _over_runs(np.bitwise_or, bits, first, last)
        after = bits.copy()
        after[asked] |= np.bitwise_or.reduceat(seen, starts, axis=0)
        if np.array_equal(after, bits):
            break
        bits, step = after, step + 1
        if step <= layers:
            through = _count_bits(bits)
    return through, _count_bits(bits), step


def _count_bits(bits):
    return np.unpackbits(bits.view("uint8"), axis=1).sum(axis=1, dtype=int)


def count_pairs(pattern, n, m):
    """How many pairs of `n` queries and `m` keys a pattern allows; an int.

    Counted, not drawn: by rows where every term of the pattern has tiles of its
    own that hold it exactly, and otherwise in the tiles of its plan.
    """
    terms = terms_of(pattern, n, m)
    if all(term.is_exact for term in terms):
        return _count_any(terms, n, m)
    return sum(_count(part.bound, part.pattern, n, m) for part in plan(pattern, n, m))


def _count_any(terms, n, m):
    """Pairs that at least one of some terms allows: |a or b| = |a| + |b| - |a and b|."""
    if not terms:
        return 0
    first, *rest = terms
    shared = [term for term in (meet_terms(first, x, n, m) for x in rest) if term is not None]
    alone = _count(first.bound, first.pattern, n, m)
    return alone + _count_any(rest, n, m) - _count_any(shared, n, m)


def _count(bound, pattern, n, m):
    """Pairs of a pattern that lies within a bound."""
    match pattern:
        case Band():
            return int(_of_band(pattern, np.arange(n), m).sum())
        case Grid(sizes, bands):
            return int(_of_grid(sizes, bands, np.arange(n), m).sum())
        case Select(queries, keys, Band(rate=1) as band):
            q_pos = np.arange(n) if queries is None else queries.positions(n)
            first, last = _ends(band, q_pos, m)
            stop = np.maximum(last + 1, first)
            seen = stop - first if keys is None else keys.count(stop) - keys.count(first)
            return int(seen.sum())
    return sum(int(allowed.sum()) for _, _, allowed in pairs_within(bound, pattern, n, m))


def _ends(band, q_pos, m):
    """The first and the last key that each query may see, were it for the sides alone."""
    first = 0 if band.left is None else np.clip(q_pos - band.left, 0, m)
    last = m - 1 if band.right is None else np.clip(q_pos + band.right, -1, m - 1)
    return np.broadcast_to(first, q_pos.shape), np.broadcast_to(last, q_pos.shape)


def _of_band(band, q_pos, m):
    """For each query the number of its keys."""
    first, last = _ends(band, q_pos, m)
    first = first + (q_pos - first) % band.rate
    return np.maximum((last - first) // band.rate + 1, 0)


def _of_grid(sizes, bands, q_pos, m):
    """For each query the number of its keys: whole rows of keys, and the rest of the last one."""
    if not sizes:
        return _of_band(bands[0], q_pos, m)
    row = math.prod(sizes)
    whole, rest = divmod(m, row)
    y, x = np.divmod(q_pos, row)
    total = _of_band(bands[0], y, whole) * _of_grid(sizes[1:], bands[1:], x, row)
    if rest:
        total = total + bands[0](y, whole) * _of_grid(sizes[1:], bands[1:], x, rest)
    return total


def pairs_within(bound, pattern, n, m):
    """The pairs of a pattern in the tiles of its bound, some tiles at a time.

    Yields:
        `(q_pos, k_pos, allowed)` of shapes `(t, i, 1)`, `(t, 1, j)` and
        `(t, i, j)`; where `allowed` is False, a position may be -1.
    """
    for rows, columns in tile_positions(Part.of(bound, pattern, n, m), n, m):
        height, width = rows.shape[1], columns.shape[1]
        high = max(1, min(height, PAIRS_AT_ONCE // width))
        many = max(1, PAIRS_AT_ONCE // (high * width))
        for t, i in itertools.product(range(0, len(rows), many), range(0, height, high)):
            q = rows[t : t + many, i : i + high, None]
            k = columns[t : t + many, None, :]
            with eagerly():
                allowed = np.asarray(pattern(np.maximum(q, 0), np.maximum(k, 0)))
            yield q, k, allowed & (q >= 0) & (k >= 0)


def tile_positions(part, n, m):
    """The positions in a part's tiles: for each run `(t, i)` and `(t, j)` ints, -1 for none."""
    count = n if part.queries is None else int(part.queries.count(n))
    with eagerly():
        queries = part.layout.split_queries(_numbers(part.queries, n))
        keys = part.layout.split_keys(_numbers(part.keys, m), count)
        return [
            tuple(ops.convert_to_numpy(x)[0, 0, :, :, 0] - 1 for x in pair)
            for pair in zip(queries, keys, strict=True)
        ]


def _numbers(chosen, length):
    """Positions `(1, length, 1, 1)`, counted from 1: 0 is padding."""
    found = np.arange(length, dtype="int32") if chosen is None else chosen.positions(length)
    return ops.convert_to_tensor(rearrange(found, "n -> 1 n 1 1") + 1)
