"""Costs are counted right, receptive fields are those of matrix powers."""

import dataclasses
import inspect
import tracemalloc

import keras
import numpy as np
import pytest
from hypothesis import given

from sparse_attn import (
    Atrous,
    BigBird,
    Causal,
    Fixed,
    Full,
    Local,
    Longformer,
    Neighborhood,
    PerHead,
    Random,
    Strided,
    plan,
    sparse_attention,
)
from sparse_attn.costs import Cost, count_pairs
from tests.cases import (
    EXPRESSIONS,
    LEAVES,
    UNEQUAL,
    Diagonals,
    Near,
    examples,
    expressions,
    lengths,
)

SOME = [Local(20), Causal() & Strided(16), Longformer(9, 2), BigBird(300, 16), Near(3)]


def mask_or_skip(pattern, n, m=None):
    try:
        return pattern.mask(n, m)
    except ValueError:
        pytest.skip("the pattern has no meaning at these lengths")


@pytest.mark.parametrize("n", [1, 7, 13, 60, 257])
@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_pairs_are_those_of_the_mask(pattern, n):
    mask = mask_or_skip(pattern, n)
    found = pattern.cost(n)
    assert found.pairs == mask.sum()
    assert found.density == mask.mean()
    assert found.scored_pairs == plan(pattern, n).scored_pairs >= found.pairs


@pytest.mark.parametrize(("n", "m"), UNEQUAL)
@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_pairs_of_unequal_lengths(pattern, n, m):
    mask = mask_or_skip(pattern, n, m)
    assert count_pairs(pattern, n, m) == mask.sum()


@examples(100)
@given(expressions, lengths)
def test_pairs_of_random_expressions(pattern, n):
    assert count_pairs(pattern, n, n) == pattern.mask(n).sum()


@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_pairs_with_the_costs_that_users_have(pattern, default_costs):
    assert pattern.cost(300).pairs == pattern.mask(300).sum()


@pytest.mark.parametrize(
    "pattern",
    [Local(256), Longformer(256, 2), Causal() & Fixed(128, 4), Neighborhood((256, 256), 3)],
    ids=repr,
)
def test_counting_takes_memory_of_the_pattern(pattern, default_costs):
    tracemalloc.start()
    assert 0 < pattern.cost(65536, num_heads=8).density < 0.02
    assert tracemalloc.get_traced_memory()[1] < 2**28  # 65536 ** 2 bools are 16 times that
    tracemalloc.stop()


def test_a_cost_follows_from_its_pairs(default_costs):
    found = Local(100).cost(2000, num_heads=4, head_dim=32, batch=3)
    assert found.forward_flops == 4 * 32 * 4 * 3 * found.scored_pairs
    assert found.dense.pairs == found.dense.scored_pairs == 2000**2
    assert found.dense.dense is None
    assert found.forward_bytes < found.training_bytes < found.dense.training_bytes
    assert found == Local(100).cost(2000, 4, 32, "float32", 3)
    half = Local(100).cost(2000, 4, 32, "bfloat16", 3)
    assert half.forward_bytes < found.forward_bytes
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.pairs = 3


def test_dense_costs_what_dense_does(default_costs):
    found = Full().cost(1024, num_heads=2)
    assert found.beats_dense_from is None
    assert dataclasses.replace(found, dense=None) == found.dense


@pytest.mark.parametrize(
    "pattern",
    [Local(64), Causal(), Causal() & Strided(64), Longformer(64, 2), BigBird(4096), Near(9)],
)
def test_the_length_at_which_a_pattern_beats_dense(pattern, default_costs):
    start = pattern.cost(4096).beats_dense_from
    assert plan(pattern, start).scored_pairs < start**2
    assert plan(pattern, start - 1).scored_pairs == (start - 1) ** 2


def test_where_no_length_beats_dense(default_costs):
    assert Random(50, 4, 20).cost(50).beats_dense_from is None
    assert Diagonals().cost(128).beats_dense_from is None
    assert (~Local(10)).cost(300).beats_dense_from != 1  # where it allows nothing
    assert str(Full().cost(50)).endswith("Beats dense at no length that was tried.")


def test_heads_of_their_own_add_up(default_costs):
    patterns = [Local(64), Atrous(16), Local(64)]
    found = PerHead(patterns).cost(1000)
    alone = [pattern.cost(1000) for pattern in patterns]
    assert found.pairs == sum(x.pairs for x in alone) == PerHead(patterns).mask(1000).sum()
    assert found.scored_pairs == sum(x.scored_pairs for x in alone)
    assert found.density == PerHead(patterns).mask(1000).mean()
    assert found.forward_flops == sum(x.forward_flops for x in alone)
    assert PerHead(patterns).cost(1000, num_heads=6).forward_flops == 2 * found.forward_flops
    assert PerHead([Local(64)] * 2).cost(1000) == dataclasses.replace(
        Local(64).cost(1000, num_heads=2),
        pairs=2 * alone[0].pairs,
        scored_pairs=2 * alone[0].scored_pairs,
        dense=PerHead([Full()] * 2).cost(1000).dense,
    )


def test_a_cost_is_printed_as_a_table(default_costs):
    lines = str(Local(256).cost(4096, num_heads=8)).splitlines()
    assert lines[0].split() == ["pattern", "dense", "ratio"]
    assert lines[1].split() == ["pairs", "2,035,456", "16,777,216", "0.121"]
    assert lines[4].split() == ["forward", "flops", "5.37", "G", "34.4", "G", "0.156"]
    start = Local(256).cost(9).beats_dense_from
    assert lines[-1] == f"The shortest length that beats dense: {start:,}."
    assert isinstance(Local(256).cost(9), Cost)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "`n` must be a positive int. Received: n=0"),
        ({"n": 4.5}, TypeError, "`n` must be a positive int. Received: n=4.5"),
        ({"n": 9, "num_heads": 0}, ValueError, "`num_heads` must be a positive int"),
        ({"n": 9, "head_dim": None}, TypeError, "`head_dim` must be a positive int"),
        ({"n": 9, "batch": -1}, ValueError, "`batch` must be a positive int"),
        ({"n": 9, "dtype": "int8"}, ValueError, "`dtype` must be one of .* Received: .*int8"),
        ({"n": 9, "dtype": np.float32}, TypeError, "`dtype` must be one of"),
    ],
)
def test_wrong_arguments_of_a_cost(arguments, error, message):
    with pytest.raises(error, match=message):
        Local(3).cost(**arguments)


def test_every_method_calls_the_length_n():
    for pattern in (Local(3), PerHead([Local(3), Full()])):
        assert pattern.cost(n=20) == pattern.cost(20)
        for method in ("mask", "text", "svg", "plot", "cost", "receptive_field"):
            assert "n" in inspect.signature(getattr(pattern, method)).parameters


def test_a_length_that_the_pattern_cannot_relate():
    with pytest.raises(ValueError, match="made for lengths up to 300"):
        BigBird(300, 16).cost(301)
    with pytest.raises(ValueError, match="multiple of 2"):
        PerHead([Local(1), Full()]).cost(10, num_heads=3)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow counts them")
@pytest.mark.parametrize(
    "pattern",
    [
        Local(100),
        Longformer(64, 2),
        BigBird(2048),
        Causal() & Strided(32),
        Full(),
        Neighborhood((40, 50), 3),
    ],
    ids=repr,
)
def test_operations_are_those_of_the_graph(pattern, default_costs):
    import tensorflow as tf

    n, heads, dim, batch = 2000, 4, 32, 2
    function = tf.function(lambda q, k, v: sparse_attention(q, k, v, pattern))
    spec = tf.TensorSpec((batch, n, heads, dim), "float32")
    graph = function.get_concrete_function(spec, spec, spec).graph
    counted = 0
    for node in graph.get_operations():
        if node.type == "Einsum":
            counted += einsum_flops(node)
    assert counted == pytest.approx(
        pattern.cost(n, heads, dim, batch=batch).forward_flops, rel=0.25
    )


def einsum_flops(node):
    """Two for each combination of the letters."""
    equation, sizes = node.get_attr("equation").decode(), {}
    for letters, tensor in zip(equation.split("->")[0].split(","), node.inputs, strict=True):
        sizes.update(zip(letters, tensor.shape, strict=True))
    return 2 * np.prod(list(sizes.values()), dtype=float)


# ---- Receptive fields --------------------------------------------------------


def powers(mask):
    """What is reached through 0, 1, 2, ... layers, until no more is: a list of `(n, n)` bools."""
    step = (mask | np.eye(len(mask), dtype=bool)).astype(int)
    found = [np.eye(len(mask), dtype=bool)]
    while True:
        after = step @ found[-1] > 0
        if (after == found[-1]).all():
            return found
        found.append(after)


@pytest.mark.parametrize("n", [1, 7, 60, 130])
@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_a_receptive_field_is_that_of_matrix_powers(pattern, n):
    reached = powers(mask_or_skip(pattern, n))
    for layers in (0, 1, 3, 200):
        field = pattern.receptive_field(layers, n)
        expected = reached[min(layers, len(reached) - 1)]
        assert field.layers == layers
        np.testing.assert_array_equal(field.reached, expected.sum(axis=1))
        assert field.share == pytest.approx(expected.mean())
        assert field.layers_to_settle == len(reached) - 1
        assert field.layers_to_all == (len(reached) - 1 if reached[-1].all() else None)


@pytest.mark.parametrize(
    "pattern", [Local(300), Local(1), Causal(), Causal() & Local(40)], ids=repr
)
def test_a_receptive_field_of_windows_is_fast_and_that_of_all_bits(pattern, monkeypatch):
    fast = pattern.receptive_field(2, 700)
    monkeypatch.setattr("sparse_attn.costs._are_windows", lambda runs, n: False)
    slow = pattern.receptive_field(2, 700)
    np.testing.assert_array_equal(fast.reached, slow.reached)
    assert (fast.layers_to_settle, fast.layers_to_all) == (
        slow.layers_to_settle,
        slow.layers_to_all,
    )
    assert fast.share == slow.share


def test_a_receptive_field_of_sources_in_several_turns(monkeypatch):
    whole = Longformer(5, (3, 90)).receptive_field(1, 200)
    monkeypatch.setattr("sparse_attn.costs.WORDS_AT_ONCE", 1)
    monkeypatch.setattr("sparse_attn.costs.PAIRS_AT_ONCE", 100)
    again = Longformer(5, (3, 90)).receptive_field(1, 200)
    np.testing.assert_array_equal(whole.reached, again.reached)
    assert whole.layers_to_all == again.layers_to_all == 2


def test_the_receptive_field_of_heads_is_that_of_all():
    field = PerHead([Local(1), Atrous(10)]).receptive_field(1, 100)
    np.testing.assert_array_equal(
        field.reached, (Local(1) | Atrous(10)).receptive_field(1, 100).reached
    )


@pytest.mark.parametrize(
    ("layers", "n", "error", "message"),
    [
        (-1, 9, ValueError, "`layers` must be a non-negative int. Received: layers=-1"),
        (1.5, 9, TypeError, "`layers` must be a non-negative int"),
        (1, 0, ValueError, "`n` must be a positive int"),
    ],
)
def test_wrong_arguments_of_a_receptive_field(layers, n, error, message):
    with pytest.raises(error, match=message):
        Local(3).receptive_field(layers, n)
