"""Plans: every allowed pair in exactly one part, and never more work than dense."""

import dataclasses
import importlib
from functools import partial

import keras
import numpy as np
import pytest
from hypothesis import given

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
    Local,
    Longformer,
    Neighborhood,
    Pattern,
    Prefix,
    Random,
    SparseTransformer,
    Strided,
    plan,
)
from sparse_attn.bounds import Lists, Select
from sparse_attn.chosen import Chosen
from sparse_attn.layouts import Gather, Halo, Nested, Stairs
from sparse_attn.patterns import Ranges
from sparse_attn.plan import allowed_pair, bound, plan_at
from sparse_attn.terms import MAX_PARTS
from sparse_attn.tiles import Given, Tiles
from tests.cases import (
    EXPRESSIONS,
    LEAVES,
    LENGTHS,
    UNEQUAL,
    Diagonals,
    Near,
    examples,
    expressions,
    lengths,
    longest,
)
from tests.compare import at_once, to_numpy

plan_module = importlib.import_module("sparse_attn.plan")  # `plan` alone is the function


def counts(parts, n, m, q_pos=None):
    """How often each pair is scored, by scattering the tiles' pairs back."""
    found = np.zeros((n, m), int)
    for part in parts:
        for row, column, masks in at_once(partial(cut_numbers, part, n, m))(q_pos=q_pos):
            row, column = to_numpy(row)[0, 0], to_numpy(column)[0, 0, :, :, 0][:, None, :]
            row, column = np.broadcast_arrays(row, column)
            allowed = row > 0
            for mask in masks:
                allowed = allowed & to_numpy(mask)[0, 0]
            assert (column[allowed] > 0).all(), "padding may be attended"
            np.add.at(found, (row[allowed] - 1, column[allowed] - 1), 1)
    return found


def cut_numbers(part, n, m, q_pos):
    """For each run of tiles: the rows that its queries and its keys are, from 1 on, and its masks.

    The number of a row goes through the cut as its vector does.
    """
    q_pos = None if q_pos is None else keras.ops.convert_to_tensor(q_pos)
    queries, keys = Chosen(part.queries, n), Chosen(part.keys, m)
    layout = part.layout.at(queries.count, keys.count)
    tiles = Tiles(part, layout, queries, keys, Given((0,), q_pos=q_pos))
    rows, columns = (
        x.pick(keras.ops.arange(1, x.size + 1, dtype="int32")[None, :, None, None])
        for x in (queries, keys)
    )
    rows = tiles.layout.split_queries(rows)
    columns = tiles.layout.split_keys(columns, queries.count)
    masks = [[term.function(*term.tensors) for term in terms] for terms in tiles.masks]
    return list(zip(rows, columns, masks, strict=True))


def tile_pairs(part, n, m):
    """Pairs in a part's tiles, counted from the tiles."""
    n, m = Chosen(part.queries, n).count, Chosen(part.keys, m).count

    @at_once
    def cut():
        queries = part.layout.split_queries(keras.ops.zeros((1, n, 1, 1)))
        return queries, part.layout.split_keys(keras.ops.zeros((1, m, 1, 1)), n)

    return sum(q.shape[2] * q.shape[3] * k.shape[3] for q, k in zip(*cut(), strict=True))


def check(pattern, n, m):
    parts = plan(pattern, n, m)
    np.testing.assert_array_equal(counts(parts, n, m), pattern.mask(n, m).astype(int))
    assert parts.scored_pairs == sum(tile_pairs(part, n, m) for part in parts)
    assert parts.scored_pairs <= n * m
    assert len(parts) <= MAX_PARTS
    for part in parts:
        outside = part.pattern.mask(n, m) & ~part.bound.mask(n, m)
        assert not outside.any()


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_each_pair_is_scored_exactly_once(pattern, n):
    check(pattern, n, n)


@pytest.mark.parametrize(("n", "m"), UNEQUAL)
@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_each_pair_is_scored_exactly_once_at_unequal_lengths(pattern, n, m):
    check(pattern, n, m)


def test_the_last_row_of_a_grid_may_not_be_full():
    # A dense outer axis pads nothing itself.
    for n, m in [(5, 13), (13, 5), (7, 7)]:
        check(Neighborhood((70, 4), 2, 2), n, m)


@given(expressions, lengths, lengths)
@examples(150)
def test_each_pair_of_any_expression_is_scored_exactly_once(pattern, n, m):
    check(pattern, n, m)


@given(expressions, lengths, lengths)
@examples(60)
def test_a_plan_for_unknown_lengths_is_right_at_any(pattern, n, m):
    found = counts(plan(pattern), n, m)
    np.testing.assert_array_equal(found, pattern.mask(n, m).astype(int))


@given(expressions, lengths)
@examples(60)
def test_a_plan_for_any_positions(pattern, m):
    q_pos = np.random.default_rng(m).integers(0, m + 3, 4).astype("int32")
    parts = plan_at(pattern, keras.ops.convert_to_tensor(q_pos), 4, m, dim=1)
    expected = pattern.mask(m + 3, m)[q_pos].astype(int)
    np.testing.assert_array_equal(counts(parts, 4, m, q_pos), expected)


FIRST_4 = Ranges(((0, 4),))


def shapes(pattern, n=4096):
    return [(part.bound, type(part.layout)) for part in plan(pattern, n)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Full(), [(Band(), Stairs)]),
        (Causal(), [(Band(None, 0), Stairs)]),
        (Local(64), [(Band(64, 64), Halo)]),
        (Causal() & Local(64), [(Band(64, 0), Halo)]),
        (Atrous(64), [(Band(rate=64), Stairs)]),
        (Atrous(4) & Atrous(6) & Local(100), [(Band(96, 96, 12), Halo)]),
        (Dilated(3, 8), [(Band(24, 24, 8), Halo)]),
        (Strided(64), [(Band(64, 64), Halo), (Band(rate=64), Stairs)]),
        (Causal() & Strided(64), [(Band(64, 0), Halo), (Band(None, 0, 64), Stairs)]),
        (
            Causal() & (Local(64) | Prefix(4)),
            [(Band(64, 0), Halo), (Select(keys=FIRST_4, band=Band(None, 0)), Stairs)],
        ),
        (Blocks(64), [(Blocks(64).grid, Halo)]),
        (Blocks(64) & Causal(), [(Blocks(64).grid, Halo)]),
        (Local(64) | Causal(), [(Band(None, 64), Stairs)]),
        (Local(8) | Local(64), [(Band(64, 64), Halo)]),
        (Local(5000), [(Band(), Stairs)]),
        (Atrous(5000), [(Band(0, 0), Halo)]),
        (~Local(4090), [(Band(None, -4091), Stairs), (Band(-4091, None), Stairs)]),
        (Causal() & ~Causal(), []),
        (~Local(4096), []),
        (Prefix(0), []),
        (Global(4), [(Select(FIRST_4), Stairs), (Select(keys=FIRST_4), Stairs)]),
        (
            Fixed(64, 4),
            [
                (Blocks(64).grid, Halo),
                (Select(keys=Ranges(((60, 64),), period=64)), Stairs),
            ],
        ),
        (Blocks(64, reach=1), [(Blocks(64, reach=1).grid, Halo)]),
        (Neighborhood((64, 64), 3), [(Neighborhood((64, 64), 3).grid, Nested)]),
        (Neighborhood((4096,), 3), [(Band(3, 3), Halo)]),
        (Axial((64, 64)), [(Blocks(64).grid, Halo), (Band(rate=64), Stairs)]),
        (Longformer(64, 0), [(Band(64, 64), Halo)]),
        (SparseTransformer(64), [(Band(64, 0), Halo), (Band(None, 0, 64), Stairs)]),
    ],
    ids=repr,
)
def test_parts_of_known_patterns(pattern, expected):
    assert sorted(map(repr, shapes(pattern))) == sorted(map(repr, expected))


def test_share_of_pairs():
    assert plan(Full(), 1024).share == 1
    assert 0.5 < plan(Causal(), 4096).share < 0.6
    assert plan(Local(256), 4096).share < 0.17
    assert plan(Atrous(64), 4096).share == 1 / 64
    assert plan(Blocks(64), 4096).share == 1 / 64
    assert plan(Prefix(4), 4096).share == 4 / 4096


def test_scored_pairs_of_a_window_are_linear_in_the_length():
    short, long = plan(Local(64), 2**14), plan(Local(64), 2**20)
    assert long.scored_pairs == 2**6 * short.scored_pairs
    assert len(repr(long)) < 1000  # nothing in it grows with the length


@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_no_plan_scores_more_than_dense(pattern):
    for n in (7, 64, 1024, 4096):
        n = min(n, longest(pattern))
        m = min(3 * n, longest(pattern))
        assert plan(pattern, n).scored_pairs <= n * n
        assert plan(pattern, n, m).scored_pairs <= n * m


def test_plan_is_printed_readably():
    assert str(plan(Strided(4), 4096)).splitlines()[0].startswith("2 part(s), ")
    assert "Band(4, 4)" in str(plan(Strided(4), 4096))


def test_a_registered_bound_makes_a_pattern_fast():
    class Spots(Pattern):
        def __call__(self, q_pos, k_pos):
            distance = q_pos - k_pos
            return (distance == 3) | (distance == -2)

    assert plan(Spots()).share == 1
    bound.register(Spots, lambda pattern: Local((3, 2)))
    assert plan(Spots()).share < 0.1
    check(Spots(), 29, 31)


@pytest.mark.parametrize("parent", [Local(3), Prefix(4), Band(2, 2), Causal(), Blocks(4)], ids=repr)
def test_a_subclass_that_overrides_the_predicate_is_not_taken_for_its_parent(parent):
    class Odd(type(parent)):
        def __call__(self, q_pos, k_pos):
            return super().__call__(q_pos, k_pos) ^ ((q_pos - k_pos) % 2 == 1)

    pattern = Odd(*[getattr(parent, name) for name in parent.__match_args__])
    assert not np.array_equal(pattern.mask(29), parent.mask(29))
    for each in (pattern, ~pattern, pattern & Causal(), pattern | Local(2)):
        check(each, 29, 31)


@pytest.mark.parametrize(
    "pattern", [Local(10**12), Atrous(10**12), Blocks(10**12), Prefix(10**12), Dilated(3, 10**12)]
)
def test_numbers_beyond_any_length(pattern):
    check(pattern, 13, 13)
    for part in plan(pattern):
        assert part.bound in (Band(), Band(0, 0))


def test_plans_for_unknown_lengths_stay_linear():
    for pattern in (Local(4096), Strided(4096) & Local(9000), Blocks(100_000), Prefix(5000)):
        assert all(part.bound != Band() for part in plan(pattern))
        assert plan(pattern).share < 1
    assert plan(~Local(4)).share == 1
    assert plan(Atrous(2) | Atrous(3) | Atrous(5)).share == 1


def test_decoding_gathers_only_the_window():
    parts = plan_at(Causal() & Local(16), keras.ops.convert_to_tensor([5000]), 1, 10_000, dim=64)
    (part,) = parts
    assert isinstance(part.layout, Gather)
    assert part.layout.index.shape[1] == 17


# ---- Blocks that are found ---------------------------------------------------


class Islands(Pattern):
    """A user's predicate: squares that lie here and there, and one long row."""

    def __call__(self, q_pos, k_pos):
        return (q_pos // 16 * 7 % 11 == k_pos // 16 % 11) | (q_pos == 40)


@pytest.mark.parametrize("n", [64, 200, 501])
def test_blocks_of_a_users_own_predicate_are_found(n):
    check(Islands(), n, n)
    found = plan(Islands(), n)
    allowed = Islands().mask(n).sum()
    assert found.scored_pairs < 2 * allowed + 64 * n
    assert {type(part.bound) for part in found} <= {Lists, Select}


@pytest.mark.parametrize("pattern", [Islands(), Islands() & Causal(), ~Islands()], ids=repr)
@pytest.mark.parametrize(("n", "m"), [(33, 100), (100, 33)])
def test_blocks_are_found_at_unequal_lengths(pattern, n, m):
    check(pattern, n, m)


def test_a_users_own_band_is_taken_for_one():
    (part,) = plan(Near(5), 400)
    assert part.bound == Band(5, 5)
    assert part.pattern == Near(5)


def test_only_blocks_at_the_edge_are_masked():
    class Edged(Pattern):
        def __call__(self, q_pos, k_pos):
            return (q_pos // 16 * 7 % 11 == k_pos // 16 % 11) | (q_pos - k_pos == 1)

    n, seen = 480, 0
    for part in plan(Edged(), n):
        if not isinstance(part.bound, Lists) or part.pattern == part.bound:
            continue
        asked = []

        class Spy(Pattern):
            pattern = part.pattern

            def __call__(self, q_pos, k_pos):
                asked.append(k_pos.shape[-1])  # noqa: B023 - asked within this turn
                return self.pattern(q_pos, k_pos)

        spied = dataclasses.replace(part, pattern=Spy())
        chosen = Chosen(part.queries, n), Chosen(None, n)
        tiles = Tiles(spied, part.layout, *chosen, Given((0,)))
        for mask in tiles.masks[0]:
            mask.function(*mask.tensors)
        assert asked == [part.bound.partial * part.bound.size]
        seen += part.bound.partial < part.bound.table.shape[1]
    assert seen


def test_patterns_of_blocks_are_one_part_of_lists(default_costs):
    pattern = BigBird(4096, 64, 3)
    inner, ends = plan(pattern, 4096)
    assert isinstance(inner.bound, Lists)
    assert inner.pattern == inner.bound
    assert inner.bound.table.shape == (62, 3 + 3 + 2)
    assert ends.bound == ends.pattern == Select(Ranges(((0, 64), (4032, 4096))))


def test_blocks_of_a_long_sequence_are_found_in_memory_that_follows_the_pattern():
    import tracemalloc

    tracemalloc.start()
    plan_module._cached_plan.cache_clear()
    (part,) = plan(Near(20), 2**14)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert part.bound == Band(20, 20)
    assert peak < 2**25  # its mask would take 2**28 bytes


def test_a_predicate_of_keras_operations_is_asked_within_a_traced_function():
    class Table(Pattern):
        def __call__(self, q_pos, k_pos):
            return keras.ops.abs(q_pos - k_pos) < 3

    x = np.ones((1, 64, 1, 2), "float32")
    model_input = keras.Input((64, 1, 2))
    from sparse_attn import sparse_attention

    class Layer(keras.layers.Layer):
        def call(self, x):
            return sparse_attention(x, x, x, Table())

    model = keras.Model(model_input, Layer()(model_input))
    model.compile(run_eagerly=False)
    assert model.predict(x, verbose=0).shape == x.shape
    assert plan(Table(), 64).share < 0.5


FAR = [
    Causal() & ~Local(5000),
    Band(left=-5001),
    ~Local(5000) & Atrous(7),
    Global((5000,)) & Local(0),
    Prefix(3) & ~Local(5000),
    Causal() & ~Local(5000) & (Atrous(64) | Blocks(32)),
    Random(2**13, 64, 20) & ~Local(5000),
    BigBird(2**13, 64, 2) & Causal() & ~Local(5000),
    Blocks(3) & Global((5001,)),
    Axial((128, 64)) & ~Local(5000),
    Near(9, (-500, 501)),
    ~Near(5000),
]


@pytest.mark.parametrize("known", [(True, True), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("pattern", [*EXPRESSIONS, *LEAVES, *FAR], ids=repr)
def test_a_pair_is_found_wherever_one_is_allowed(pattern, known):
    n = 6000 if pattern in FAR else 29
    sizes = [n if each else None for each in known]
    pair = allowed_pair(pattern, *sizes)
    some = pattern in FAR or pattern.mask(n).any()
    assert pattern(*np.array(pair)) or (pair == (0, 0) and not some)
    assert all(size is None or x < size for x, size in zip(pair, sizes, strict=True))


@examples(200)
@given(expressions, lengths, lengths)
def test_a_pair_of_any_expression_is_found(pattern, n, m):
    mask = pattern.mask(n, m)
    q_pos, k_pos = allowed_pair(pattern, n, m)
    assert mask[q_pos, k_pos] == mask.any()


def test_a_pair_is_found_in_little_time_and_memory():
    import tracemalloc

    class Nothing(Pattern):
        asked = 0

        def __call__(self, q_pos, k_pos):
            pairs = (q_pos == k_pos) & (q_pos != k_pos)
            Nothing.asked += pairs.size
            return pairs

    assert allowed_pair(Causal() & ~Local(2**19), None, None) == (2**19 + 1, 0)
    assert allowed_pair(Global((10**6,)) & Local(0), None, None) == (10**6, 10**6)
    tracemalloc.start()
    assert allowed_pair(Nothing(), None, None) == (0, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**25
    assert Nothing.asked < 2**28
    before = Nothing.asked
    assert allowed_pair(Nothing() & Local(3), 2**15, 2**15) == (0, 0)
    assert Nothing.asked < before + 2**24  # its mask has 2**30 pairs


def test_lengths_that_a_pattern_cannot_relate():
    class Square(Pattern):
        def __call__(self, q_pos, k_pos):
            return q_pos == k_pos

        def check_lengths(self, n, m):
            if n not in (9, None) or m not in (9, None):
                raise ValueError(f"Square must have lengths of 9. Received: n={n}, m={m}")

    for pattern in (Square(), Square() & Causal(), ~Square(), Causal() | Square()):
        with pytest.raises(ValueError, match=r"lengths of 9. Received: n=8, m=8"):
            plan(pattern, 8)
        with pytest.raises(ValueError, match=r"lengths of 9. Received: n=9, m=4"):
            pattern.mask(9, 4)
        with pytest.raises(ValueError, match=r"lengths of 9. Received: n=None, m=4"):
            plan_at(pattern, keras.ops.convert_to_tensor([3]), 1, 4, dim=8)
        plan(pattern)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plan("Local(3)", 8), TypeError, "`pattern` must be a Pattern, .*'Local"),
        (lambda: plan(Local, 8), TypeError, "`pattern` must be a Pattern"),
        (lambda: plan(Local(3), 0), ValueError, "`n` must be a positive int. Received: n=0"),
        (lambda: plan(Local(3), 8, True), TypeError, "`m` must be a positive int. .*m=True"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_pattern_that_cannot_be_hashed_is_named():
    class Table(Pattern):
        def __init__(self, rows):
            self.rows = rows

        def __call__(self, q_pos, k_pos):
            return q_pos >= k_pos

    with pytest.raises(TypeError, match="`pattern` must be hashable: a frozen dataclass without"):
        plan(Table([1, 2]), 4)


def test_a_bound_of_the_wrong_type_is_named():
    class Odd(Diagonals):
        pass

    bound.register(Odd, lambda pattern: 3)
    with pytest.raises(TypeError, match=r"which is no union. Received: bound\(Odd"):
        plan(Odd(), 4)


# ---- What a part costs beside its pairs --------------------------------------


@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_each_pair_is_scored_exactly_once_with_the_costs_of_parts(pattern, default_costs):
    for n in (1, 13, 128, min(300, longest(pattern))):
        check(pattern, n, n)


def test_a_short_sequence_is_dense_where_parts_cost_more_than_they_save(default_costs):
    pattern = Causal() & (Local(16) | Prefix(4))
    assert [len(plan(pattern, n)) for n in (128, 256, 1024)] == [1, 1, 2]
    assert plan(pattern, 128).share == 1
    assert plan(Local(16), 128).share == 1
    assert plan(Local(16), 256).share < 0.5
    assert plan(Atrous(4), 128).share == 0.25


def test_a_bound_that_is_corrected_counts():
    class Mine(Pattern):
        def __call__(self, q_pos, k_pos):
            return (q_pos - k_pos) ** 2 <= 9

    bound.register(Mine, lambda pattern: Band(100, 100))
    wide = plan(Mine()).scored_pairs
    bound.register(Mine, lambda pattern: Band(3, 3))
    assert plan(Mine()).scored_pairs < wide


@pytest.mark.parametrize("n", [100, 255, 500, 900])
def test_an_own_predicate_costs_what_the_same_pattern_does(n, default_costs):
    assert plan(Near(4), n).share == pytest.approx(plan(Local(4), n).share, rel=0.01)


@pytest.mark.parametrize(
    ("own", "known"),
    [
        (Near(64) | Atrous(64), Local(64) | Atrous(64)),
        (Atrous(64) | Near(64), Atrous(64) | Local(64)),
        (Causal() & (Near(64) | Atrous(64)), Causal() & (Local(64) | Atrous(64))),
        (Near(32) | Global(3), Local(32) | Global(3)),
        (Near(16) | Near(0, (40, 3)) | Local(16), Local(16)),
    ],
    ids=str,
)
def test_an_own_predicate_is_found_beside_other_patterns(own, known, default_costs):
    assert plan(own, 4096).scored_pairs <= 1.1 * plan(known, 4096).scored_pairs
    check(own, 700, 700)
