"""`sparse_attention` against the oracle: values, log-sum-exp and gradients."""

import sys

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    Prefix,
    Random,
    SoftCap,
    StreamingLLM,
    Strided,
    merge_attention,
    sparse_attention,
    stream,
)
from sparse_attn.functional import attention_weights
from sparse_attn.reference import dense_attention
from tests.cases import EXPRESSIONS, LEAVES, LENGTHS, UNEQUAL, examples, expressions, lengths
from tests.compare import (
    BACKEND,
    FLOAT,
    assert_equals_oracle,
    close,
    outputs_and_gradients,
    random_inputs,
    random_masks,
    to_numpy,
)

SOME = [
    Full(),
    Causal(),
    Local(3),
    Causal() & Strided(4),
    Causal() & (Local(2) | Prefix(2)),
    Blocks(4),
    ~Local(2),
]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("pattern", LEAVES, ids=repr)
def test_equals_oracle(pattern, n):
    assert_equals_oracle(pattern, n, n, **random_masks(n, n))


@pytest.mark.parametrize("n", [1, 7, 13, 257])
@pytest.mark.parametrize("pattern", EXPRESSIONS, ids=repr)
def test_combinations_equal_oracle(pattern, n):
    assert_equals_oracle(pattern, n, n, **random_masks(n, n))


@pytest.mark.parametrize(("n", "m"), UNEQUAL)
@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_unequal_lengths_equal_oracle(pattern, n, m):
    assert_equals_oracle(pattern, n, m, **random_masks(n, m))


@given(expressions, lengths, lengths, st.integers(0, 100), st.floats(0, 1))
@examples(100)
def test_any_expression_equals_oracle(pattern, n, m, seed, share):
    assert_equals_oracle(pattern, n, m, seed, **random_masks(n, m, seed, share=share))


@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_without_masks(pattern):
    assert_equals_oracle(pattern, 29, 29)


@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_lse_is_optional_and_changes_nothing(pattern):
    q, k, v = random_inputs(29, 29)
    out, _ = sparse_attention(q, k, v, pattern, return_lse=True)
    np.testing.assert_array_equal(to_numpy(sparse_attention(q, k, v, pattern)), to_numpy(out))


@pytest.mark.parametrize("scale", [0.1, 1, 3.0])
def test_scale(scale):
    assert_equals_oracle(Local(3), 13, 13, scale=scale)


# ---- Masks and biases for every pair -----------------------------------------


OF_PAIRS = [(13, 12), (2, 13, 12), (1, 2, 13, 12), (2, 2, 13, 12)]
WITH_ONES = [(1, 12), (13, 1), (1, 1), (1, 13, 12), (2, 1, 12), (2, 2, 1, 12), (1, 1, 13, 1)]


@pytest.mark.parametrize("shape", OF_PAIRS + WITH_ONES, ids=str)
@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_attention_mask(pattern, shape):
    mask = np.random.default_rng(3).random(shape) < 0.6
    assert_equals_oracle(pattern, 13, 12, attention_mask=mask, **random_masks(13, 12))


@pytest.mark.parametrize("shape", OF_PAIRS + WITH_ONES, ids=str)
@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_bias_and_its_gradient(pattern, shape):
    bias = np.random.default_rng(3).normal(size=shape)
    assert_equals_oracle(pattern, 13, 12, bias=bias, **random_masks(13, 12))


@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_everything_at_once(pattern, positions):
    rng = np.random.default_rng(3)
    masks = {**random_masks(13, 12), "attention_mask": rng.random((13, 12)) < 0.6}
    bias = rng.normal(size=(2, 1, 13, 12))
    assert_equals_oracle(pattern, 13, 12, query_positions=positions, bias=bias, **masks)


@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_a_bias_of_minus_infinity_is_a_mask(pattern):
    q, k, v = random_inputs(13, 13)
    mask = np.random.default_rng(3).random((13, 13)) < 0.4
    bias = np.where(mask, 0, -np.inf)
    out, lse = sparse_attention(q, k, v, pattern, bias=bias, return_lse=True)
    expected, expected_lse = sparse_attention(
        q, k, v, pattern, attention_mask=mask, return_lse=True
    )
    close(to_numpy(out), to_numpy(expected), "out")
    close(to_numpy(lse), to_numpy(expected_lse), "lse")


# ---- Positions of a decoder --------------------------------------------------


@pytest.mark.parametrize("positions", [0, 5, 40, np.array([3, 3, 0, 12]), np.array([50, 1, 9, 28])])
@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_query_positions(pattern, positions):
    masks = random_masks(4, 29)
    assert_equals_oracle(pattern, 4, 29, query_positions=positions, **masks)


@pytest.mark.parametrize("pattern", [Causal() & p for p in SOME], ids=repr)
def test_decoding_step_by_step_equals_the_whole(pattern):
    n = 21
    q, k, v = random_inputs(n, n)
    whole = to_numpy(sparse_attention(q, k, v, pattern))
    for i in range(n):
        step = sparse_attention(q[:, i : i + 1], k, v, pattern, query_positions=i)
        close(to_numpy(step)[:, 0], whole[:, i], f"step {i} of {pattern!r}")


BEYOND_INT32 = [
    Local(sys.maxsize),
    Local((0, 2**31)),
    Local(2**30),
    Local(2**40) & Atrous(3),
    Causal() & ~Local(2**31),
    Band(-(2**40), 2**41),
    Band(2**40, -(2**33), 7),
    ~Atrous(2**40),
    Strided(2**40),
    Dilated(2**20, 2**20),
    Blocks(2**31, 2**33),
    Blocks(4, 2**33),
    ~Blocks(2**40),
    ~Prefix(2**31),
    Prefix(2**40) & Local(3),
    Global(2**40),
    Longformer(2**33, 1),
    Fixed(2**33, 2),
    ~Fixed(2**40),
    StreamingLLM(2**35, 4),
    Random(20, 2**40, 3),
    Grid((2**40, 3), (Band(), Band(1, 1), Band(0, 0))),
    Axial((2**16, 2**16)),
    Axial((3, 2**40)),
    Neighborhood((2**40, 2), 2**33),
    Neighborhood((2, 2**40), 2**33),
]


@pytest.mark.parametrize("positions", [None, "array"])
@pytest.mark.parametrize("pattern", BEYOND_INT32, ids=repr)
def test_parameters_may_be_any_ints(pattern, positions):
    options = {} if positions is None else {"query_positions": np.arange(12)}
    assert_equals_oracle(pattern, 12, 12, **options, **random_masks(12, 12))


@pytest.mark.parametrize("pattern", [Local(2**30), Local(2**20) & Atrous(2)], ids=repr)
def test_no_keys_are_gathered_beyond_those_there_are(pattern):
    q, k, v = random_inputs(2, 12)
    found = sparse_attention(q, k, v, pattern, query_positions=np.array([5, 2**31 - 1]))
    expected, _ = dense_attention(q, k, v, pattern, query_positions=np.array([5, 2**31 - 1]))
    close(to_numpy(found), expected, "out")


# ---- Padding and rows with nothing to attend to ------------------------------


@pytest.mark.parametrize("poison", [np.nan, 1e30, np.inf])
@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_what_padding_holds_changes_nothing(pattern, poison):
    n = 29
    q, k, v = random_inputs(n, n)
    masks = random_masks(n, n)
    cotangents = [np.random.default_rng(8).normal(size=(*q.shape[:3], v.shape[-1]))]

    def function(q, k, v):
        return [sparse_attention(q, k, v, pattern, **masks)]

    expected, expected_gradients = outputs_and_gradients(function, (q, k, v), cotangents)
    q[~masks["query_mask"]] = poison
    k[~masks["key_mask"]] = poison
    v[~masks["key_mask"]] = poison
    found, gradients = outputs_and_gradients(function, (q, k, v), cotangents)
    np.testing.assert_array_equal(found[0], expected[0])
    for gradient, same in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_array_equal(gradient, same)


HIDDEN = np.zeros((2, 29), bool)
HIDDEN[0, [3, 8, 9, 28]] = HIDDEN[1, :5] = True  # keys that no query may attend to
BY_PAIRS = np.random.default_rng(4).random((2, 2, 29, 29)) < 0.7
BY_PAIRS &= ~HIDDEN[:, None, None]
HIDING = {
    "attention_mask": {"attention_mask": BY_PAIRS[:, 0]},
    "attention_mask by head": {"attention_mask": BY_PAIRS},
    "bias": {"bias": np.where(BY_PAIRS, 0.5, -np.inf)},
    "segments": {"segment_ids": (np.zeros((2, 29), int), 7 * HIDDEN.astype(int))},
    "query_mask": {
        "query_mask": np.arange(29) >= np.array([[9], [12]]),
        "key_mask": np.arange(29) >= np.array([[9], [0]]),
    },
}


@pytest.mark.parametrize(
    ("poison", "max_score_bytes", "g"),
    [(np.nan, 2**30, 2), (np.inf, 0, 1)],
    ids=["kept", "streamed"],
)
@pytest.mark.parametrize("options", HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("pattern", [*SOME[:5], Longformer(2, 1), Random(29, 4, 2)], ids=repr)
def test_a_key_that_no_query_may_see_may_hold_anything(
    pattern, options, poison, max_score_bytes, g
):
    n = 29
    mask = np.broadcast_to(pattern.mask(n), (2, 2, n, n))
    if "query_mask" in options:
        mask = mask & options["query_mask"][:, None, :, None]
        mask = mask & options["key_mask"][:, None, None]
    else:
        mask = mask & ~HIDDEN[:, None, None]
        for name in ("attention_mask", "bias"):
            if name in options:
                found = options[name][:, None] if options[name].ndim == 3 else options[name]
                mask = mask & (found > -np.inf if name == "bias" else found)
    hidden = ~mask.any(axis=2)  # by each head of queries
    hidden = hidden if g == 2 else hidden.all(axis=1, keepdims=True)
    assert hidden.any()
    _check_that_keys_do_not_matter(
        pattern, n, hidden, poison, g=g, max_score_bytes=max_score_bytes, **options
    )


def _check_that_keys_do_not_matter(pattern, n, hidden, poison, g=2, query=slice(None), **options):
    """Outputs and gradients stay bit for bit, whatever the `(b, g, m)` hidden keys hold."""
    q, k, v = random_inputs(n, n, g=g)
    q = q[:, query]
    cotangents = [np.random.default_rng(8).normal(size=(*q.shape[:3], v.shape[-1]))]

    def function(q, k, v):
        return [sparse_attention(q, k, v, pattern, **options)]

    expected = outputs_and_gradients(function, (q, k, v), cotangents)
    assert all(np.isfinite(x).all() for xs in expected for x in xs)
    where = np.moveaxis(hidden, 1, 2)[..., None]
    k, v = np.where(where, poison, k), np.where(where, poison, v)
    found = outputs_and_gradients(function, (q, k, v), cotangents)
    for x, y in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        np.testing.assert_array_equal(x, y)
    options.pop("max_score_bytes")
    out, _, gradients = dense_attention(q, k, v, pattern, out_grad=cotangents[0], **options)
    close(found[0][0], out, "out")
    for name, gradient in zip(("query", "key", "value"), found[1], strict=True):
        close(gradient, gradients[name], name)


@pytest.mark.parametrize(
    ("pattern", "first", "hidden"),
    [
        (Prefix(4), 0, slice(4, None)),
        (Causal(), 0, slice(13, None)),
        (Causal() & (Local(3) | Prefix(2)), 0, slice(13, None)),
        (~Local(20), 0, slice(8, 9)),
        (Band(None, -1), 0, slice(12, None)),
        (Causal() & Local(3), 7, slice(20, None)),
        (Causal() & Local(3), 7, slice(0, 4)),
        (Strided(4) & Causal(), 7, slice(20, None)),
        (Neighborhood((29,), 2), 7, slice(22, None)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("max_score_bytes", [2**30, 0], ids=["kept", "streamed"])
def test_a_key_that_the_pattern_shows_to_no_query_may_hold_anything(
    pattern, first, hidden, max_score_bytes
):
    mask = np.zeros((2, 2, 29), bool)
    mask[..., hidden] = True
    positions = {"query_positions": first} if first else {}
    options = {"max_score_bytes": max_score_bytes, "query": slice(13), **positions}
    _check_that_keys_do_not_matter(pattern, 29, mask, np.nan, **options)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("pattern", [*SOME, Causal() & ~Local(2)], ids=repr)
def test_a_query_with_no_key_gives_zero(pattern, dtype, dropout):
    n = 13
    inputs = [x.astype("float32") for x in random_inputs(n, n)]
    key_mask = np.ones((2, n), bool)
    key_mask[1] = False  # nothing at all in one sequence
    cotangents = [np.ones((2, n, 2, 3), "float32"), np.zeros((2, n, 2), "float32")]

    def function(*inputs):
        inputs = [keras.ops.cast(x, dtype) for x in inputs]
        out, lse = sparse_attention(
            *inputs, pattern, key_mask=key_mask, dropout=dropout, seed=1, return_lse=True
        )
        return keras.ops.cast(out, "float32"), lse

    (out, lse), gradients = outputs_and_gradients(function, inputs, cotangents)
    assert (out[1] == 0).all()
    assert (lse[1] == -np.inf).all()
    empty = ~pattern.mask(n).any(axis=1)
    assert (out[0][empty] == 0).all()
    assert (lse[0][empty] == -np.inf).all()
    assert np.isfinite(lse[0][~empty]).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_masked_keys_lose_against_the_lowest_of_scores(pattern):
    n = 13
    q = np.full((1, n, 1, 4), 1e9, "float32")
    k = -1e9 * (1 + np.arange(n, dtype="float32"))[None, :, None, None] * np.ones((1, n, 1, 4), "f")
    mask = np.arange(n)[None] % 3 != 0
    out = to_numpy(sparse_attention(q, k, np.ones((1, n, 1, 2), "f"), pattern, key_mask=mask))
    expected = (pattern.mask(n) & mask).any(axis=1)
    np.testing.assert_array_equal(out[0, :, 0, 0], expected.astype("float32"))


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_lengths_of_zero(n, m):
    q, k, v = random_inputs(n, m)
    out, lse = sparse_attention(q, k, v, Causal() & Local(3), return_lse=True)
    np.testing.assert_array_equal(to_numpy(out), np.zeros((2, n, 2, 3)))
    np.testing.assert_array_equal(to_numpy(lse), np.full((2, n, 2), -np.inf))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("n", "m"), [(0, 11), (5, 0), (0, 0)])
def test_all_that_a_call_may_have_at_lengths_of_zero(n, m, dtype):
    """Modifications add in float32, and the largest of no position is none."""
    q, k, v = (keras.ops.cast(x, dtype) for x in random_inputs(n, m, dtype="float32"))
    out, lse = sparse_attention(
        q, k, v,
        Causal() & (Global(7) | Neighborhood((2, 6, 5), 1)),
        query_mask=np.ones((2, n), bool),
        key_mask=np.ones((2, m), bool),
        attention_mask=np.ones((2, n, m), bool),
        bias=np.zeros((2, n, m), "float32"),
        segment_ids=(np.zeros((2, n), int), np.zeros((2, m), int)),
        score_mod=[SoftCap(2.0), lambda s, i, j, h: s * 2],
        query_positions=np.arange(n) + 3,
        return_lse=True,
    )  # fmt: skip
    assert keras.backend.standardize_dtype(out.dtype) == dtype
    np.testing.assert_array_equal(to_numpy(keras.ops.cast(out, FLOAT)), np.zeros((2, n, 2, 3)))
    np.testing.assert_array_equal(to_numpy(lse), np.full((2, n, 2), -np.inf))


def test_a_pattern_that_allows_nothing():
    assert_equals_oracle(Causal() & ~Causal(), 8, 8)


# ---- Half precision ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_half_precision(pattern, dtype):
    n = 64
    q, k, v = random_inputs(n, n, dtype="float32")
    masks = random_masks(n, n)
    halves = [keras.ops.cast(x, dtype) for x in (q, k, v)]
    out, lse = sparse_attention(*halves, pattern, return_lse=True, **masks)
    assert keras.backend.standardize_dtype(out.dtype) == dtype
    assert keras.backend.standardize_dtype(lse.dtype) == "float32"
    rounded = [to_numpy(keras.ops.cast(x, "float32")) for x in halves]
    expected, expected_lse = dense_attention(*rounded, pattern, **masks)
    close(to_numpy(keras.ops.cast(out, "float32")), expected, "out", dtype)
    close(to_numpy(lse), expected_lse, "lse", dtype)


# ---- Dropout -----------------------------------------------------------------


@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_dropout_has_the_right_expectation_and_leaves_lse(pattern):
    n = 13
    q, k, v = (x.astype("float32") for x in random_inputs(n, n))
    masks = random_masks(n, n)
    expected, expected_lse = dense_attention(q, k, v, pattern, **masks)
    seed = keras.random.SeedGenerator(0)
    outs = []
    for _ in range(60):  # many independent draws at once, as a large batch
        many = [np.repeat(x, 20, axis=0) for x in (q, k, v)]
        wide = {name: np.repeat(mask, 20, axis=0) for name, mask in masks.items()}
        out, lse = sparse_attention(*many, pattern, dropout=0.3, seed=seed, return_lse=True, **wide)
        outs.append(to_numpy(out).reshape(2, 20, *out.shape[1:]).mean(axis=1))
    close(to_numpy(lse)[::20], expected_lse, "lse", "float32")
    spread = np.std(outs, axis=0) / len(outs) ** 0.5 + 1e-6
    assert (np.abs(np.mean(outs, axis=0) - expected) / spread).max() < 6


def test_dropout_drops_each_weight_with_its_probability():
    n = 64
    value = np.eye(n, dtype="float32")[None, :, None, :]  # out shows the weights themselves
    zeros = np.zeros((1, n, 1, 4), "float32")
    for pattern in (Full(), Local(8), Causal() & Strided(8)):
        out = to_numpy(sparse_attention(zeros, zeros, value, pattern, dropout=0.25, seed=7))
        allowed = pattern.mask(n)
        kept = out[0, :, 0, :] > 0
        assert not kept[~allowed].any()
        share = kept[allowed].mean()
        assert abs(share - 0.75) < 5 * (0.75 * 0.25 / allowed.sum()) ** 0.5
        weights = allowed / allowed.sum(axis=1, keepdims=True) / 0.75
        np.testing.assert_allclose(out[0, :, 0, :][kept], weights[kept], rtol=1e-5)


def test_dropout_is_the_same_for_the_same_seed():
    inputs = random_inputs(29, 29)
    one, again, other = (
        to_numpy(sparse_attention(*inputs, Strided(3), dropout=0.5, seed=seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0


def test_parts_do_not_drop_alike(monkeypatch):
    seeds, uniform = [], keras.random.uniform

    def recorded(shape, *, seed, **options):
        seeds.append(tuple(to_numpy(seed.next()).tolist()))
        return uniform(shape, seed=seed, **options)

    monkeypatch.setattr(keras.random, "uniform", recorded)
    monkeypatch.setattr(stream, "PIECE_BYTES", 5000)
    sparse_attention(*random_inputs(200, 200), Strided(20), dropout=0.5, seed=1)
    assert len(seeds) > 8
    assert len(set(seeds)) == len(seeds)


def test_gradient_under_dropout_is_that_of_the_weights_kept():
    q, k, v = random_inputs(13, 13)
    rng = np.random.default_rng(0)
    cotangent = rng.normal(size=(2, 13, 2, 3))

    def function(*inputs):
        return [sparse_attention(*inputs, Causal() & Strided(3), dropout=0.4, seed=3)]

    _, gradients = outputs_and_gradients(function, (q, k, v), [cotangent])
    step = 1e-6 if FLOAT == "float64" else 1e-2
    for position, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape).astype(FLOAT)
        losses = []
        for sign in (1, -1):
            moved = [q, k, v]
            moved[position] = moved[position] + sign * step * direction
            losses.append((to_numpy(function(*moved)[0]) * cotangent).sum())
        expected = (losses[0] - losses[1]) / (2 * step)
        tolerance = 1e-6 if FLOAT == "float64" else 5e-2
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=tolerance)


# ---- Merging -----------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 6, 13])
def test_merge_over_two_sets_of_keys_equals_attention_over_both(cut):
    q, k, v = random_inputs(7, 13)
    rng = np.random.default_rng(4)
    masks = random_masks(7, 13)
    first = np.zeros((7, 13), bool)
    first[:, :cut] = True
    out, lse = dense_attention(q, k, v, Full(), **masks)
    cotangents = (
        rng.normal(size=out.shape),
        np.where(np.isfinite(lse), rng.normal(size=lse.shape), 0),
    )

    def function(q, k, v):
        return merge_attention(
            [
                sparse_attention(q, k, v, Full(), attention_mask=mask, return_lse=True, **masks)
                for mask in (first, ~first)
            ]
        )

    expected, expected_lse, expected_gradients = dense_attention(
        q, k, v, Full(), out_grad=cotangents[0], lse_grad=cotangents[1], **masks
    )
    found, gradients = outputs_and_gradients(function, (q, k, v), cotangents)
    close(found[0], expected, "out")
    close(found[1], expected_lse, "lse")
    for name, gradient in zip(expected_gradients, gradients, strict=True):
        close(gradient, expected_gradients[name], name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_merge_where_a_query_has_no_keys(dtype):
    out = keras.ops.cast(np.array([[[[1.0]], [[np.nan]]], [[[3.0]], [[4.0]]]]), dtype)
    lse = keras.ops.cast(np.array([[[0.0], [-np.inf]], [[1.0], [-np.inf]]]), dtype)
    other = keras.ops.cast(np.array([[[5.0], [-np.inf]], [[-np.inf], [2.0]]]), dtype)
    merged, merged_lse = merge_attention([(out, lse), (keras.ops.ones_like(out) * 7, other)])
    weight = 1 / (1 + np.exp(5))
    expected = [[weight + 7 * (1 - weight), 0], [3, 7]]
    found = to_numpy(keras.ops.cast(merged, "float32"))[..., 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    expected = [[np.log(1 + np.exp(5)), -np.inf], [1, 2]]
    np.testing.assert_allclose(to_numpy(merged_lse)[..., 0], expected, rtol=1e-3)
    assert keras.backend.standardize_dtype(merged_lse.dtype) == "float32"


PAIR = np.zeros((2, 3, 1, 4), "float32"), np.zeros((2, 3, 1), "float32")


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], ValueError, r"`parts` must be a non-empty list of pairs \(out, lse\). .*parts=\[\]"),
        (None, TypeError, "`parts` must be a non-empty list of pairs .*parts=None"),
        ([PAIR[0]], TypeError, r"`parts\[0\]` must be a pair \(out, lse\)"),
        (
            [PAIR, PAIR[::-1]],
            ValueError,
            r"`parts\[1\]\[0\]` must have shape \(2, 3, 1, 4\). .*shape=\(2, 3, 1\)",
        ),
        (
            [(PAIR[0], PAIR[0])],
            ValueError,
            r"`parts\[0\]\[1\]` must have shape \(2, 3, 1\). .*shape=\(2, 3, 1, 4\)",
        ),
        (
            [(PAIR[0].astype("int32"), PAIR[1])],
            TypeError,
            r"`parts\[0\]\[0\]` must be of a float dtype. .*dtype=int32",
        ),
    ],
)
def test_merge_refuses_bad_parts(parts, error, message):
    with pytest.raises(error, match=message):
        merge_attention(parts)


# ---- The weights themselves --------------------------------------------------


@pytest.mark.parametrize("pattern", SOME, ids=repr)
def test_weights_times_values_are_the_output(pattern):
    q, k, v = random_inputs(13, 12)
    masks = random_masks(13, 12)
    weights = to_numpy(attention_weights(q, k, pattern, **masks))
    out = to_numpy(sparse_attention(q, k, v, pattern, **masks))
    close(np.einsum("bhij,bjhe->bihe", weights, v), out, "out")
    assert (weights[:, :, ~pattern.mask(13, 12)] == 0).all()


# ---- Bad input ---------------------------------------------------------------

Q, K, V = random_inputs(6, 7, dtype="float32")
BOOLS = np.ones((2, 6), bool)


class Answers(Pattern):
    """Answers with whatever it was made with."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, q_pos, k_pos):
        return self.answer(q_pos, k_pos)


BAD = [
    (lambda: sparse_attention(Q, K, V, "local"), TypeError, "`pattern` must be a Pattern.*'local'"),
    (
        lambda: sparse_attention(Q[0], K, V, Full()),
        ValueError,
        r"`query` must have shape \(any, any, any, any\). Received: query.shape=\(6, 2, 4\)",
    ),
    (
        lambda: sparse_attention(Q, K[:, :, :1], V, Full()),
        ValueError,
        r"`value` must have shape \(2, 7, 1, any\). Received: value.shape=\(2, 7, 2, 3\)",
    ),
    (
        lambda: sparse_attention(Q, K, V[:, :5], Full()),
        ValueError,
        r"`value` must have shape \(2, 7, 2, any\). Received: value.shape=\(2, 5, 2, 3\)",
    ),
    (
        lambda: sparse_attention(Q.astype("int32"), K, V, Full()),
        TypeError,
        "`query` must be of a float dtype. Received: query.dtype=int32",
    ),
    (
        lambda: sparse_attention(Q, K.astype("float16"), V, Full()),
        TypeError,
        "`key` must be of the dtype of `query`, float32. Received: key.dtype=float16",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), key_mask=BOOLS),
        ValueError,
        r"`key_mask` must have shape \(2, 7\). Received: key_mask.shape=\(2, 6\)",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_mask=BOOLS.astype("int32")),
        TypeError,
        "`query_mask` must be bool, True = may be attended. Received: query_mask.dtype=int32",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), attention_mask=np.ones((3, 6, 7), bool)),
        ValueError,
        r"shape \(1 or 6, 1 or 7\) or \(1 or 2, 1 or 6, 1 or 7\) "
        r"or \(1 or 2, 1 or 2, 1 or 6, 1 or 7\)",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), attention_mask=np.ones((6, 7), "float32")),
        TypeError,
        "`attention_mask` must be bool",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), segment_ids=np.zeros((2, 6), int)),
        ValueError,
        r"`segment_ids` must have shape \(2, 7\). .*shape=\(2, 6\)",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), segment_ids=(np.zeros((2, 6), int),)),
        ValueError,
        "`segment_ids` must be ints .*a pair of them for queries and keys",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), segment_ids=(np.zeros((2, 6)),) * 2),
        TypeError,
        r"`segment_ids\[0\]` must be of an int dtype. .*dtype=float",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), bias=np.ones((7, 6))),
        ValueError,
        r"`bias` must have shape .* Received: bias.shape=\(7, 6\)",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), dropout=1.0),
        ValueError,
        r"`dropout` must be a number in \[0, 1\). Received: dropout=1.0",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), dropout="0.1"),
        TypeError,
        r"`dropout` must be a number in \[0, 1\). Received: dropout='0.1'",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), dropout=0.1, seed=0.5),
        TypeError,
        "`seed` must be an int. Received: seed=0.5",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), scale=np.ones(4)),
        TypeError,
        "`scale` must be a finite number. Received: scale=array",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), scale=float("nan")),
        ValueError,
        "`scale` must be a finite number. Received: scale=nan",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), return_lse=1),
        TypeError,
        "`return_lse` must be True or False. Received: return_lse=1",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_positions=np.array([0, 1, -1, 2, 3, 4])),
        ValueError,
        r"`query_positions` must be in \[0, 2\*\*31\)",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_positions=2**32 + 3),
        ValueError,
        r"`query_positions` must be in \[0, 2\*\*31\), .* Received: query_positions=4294967299",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_positions=-1),
        ValueError,
        "`query_positions` must be a non-negative int. Received: query_positions=-1",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_positions=np.arange(5)),
        ValueError,
        r"`query_positions` must have shape \(\) or \(6\). .*shape=\(5,\)",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_positions=np.int64(-5)),
        ValueError,
        r"`query_positions` must be a non-negative int",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_positions=2**31 - 1),
        ValueError,
        r"`query_positions` must be in \[0, 2\*\*31\), up to the last query",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_positions=[None] * 6),
        TypeError,
        "`query_positions` must be an int or an array of ints",
    ),
    (
        lambda: sparse_attention(None, K, V, Full()),
        TypeError,
        "`query` must be a tensor or an array of numbers. Received: query=None",
    ),
    (
        lambda: sparse_attention(Q, "a", V, Full()),
        TypeError,
        "`key` must be a tensor or an array of numbers. Received: key='a'",
    ),
    (
        lambda: sparse_attention(Q[:, :, :0], K[:, :, :0], V[:, :, :0], Full()),
        ValueError,
        r"`query` must have at least one head and one feature. .*shape=\(\d, 6, 0, 4\)",
    ),
    (
        lambda: sparse_attention(Q[..., :0], K[..., :0], V, Full()),
        ValueError,
        r"`query` must have at least one head and one feature. .*shape=\(\d, 6, 2, 0\)",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), bias=np.zeros((6, 7), bool)),
        TypeError,
        "`bias` must be numbers; to forbid pairs give `attention_mask`. .*dtype=bool",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), bias="x"),
        TypeError,
        "`bias` must be a tensor or an array of numbers. Received: bias='x'",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_positions=np.ones(6)),
        TypeError,
        "`query_positions` must be of an int dtype",
    ),
    (
        lambda: sparse_attention(keras.Input((6, 2, 4)), K, V, Full()),
        TypeError,
        "`query` must be a tensor or an array; in a functional model use a layer",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), key_mask=keras.Input((7,), dtype="bool")),
        TypeError,
        "`key_mask` must be a tensor or an array; in a functional model use a layer",
    ),
    (
        lambda: attention_weights(Q, K, Full(), segment_ids=[keras.Input((6,), dtype="int32")] * 2),
        TypeError,
        r"`segment_ids\[0\]` must be a tensor or an array; in a functional model use a layer",
    ),
    *[
        (
            lambda name=name: sparse_attention(Q, K, V, Full(), **{name: keras.Input((6, 7))}),
            TypeError,
            f"`{name}` must be a tensor or an array; in a functional model use a layer",
        )
        for name in ("query_mask", "attention_mask", "bias", "query_positions")
    ],
    *[
        (
            lambda x=x: sparse_attention(x, K, V, Full()),
            TypeError,
            "`query` must be a tensor or an array of numbers. Received: query=",
        )
        for x in (keras.layers.Dense(2), np.float32, keras.Input, [[[[1j]]]], Q.astype(complex))
    ],
    (
        lambda: sparse_attention(Q, K, V, Full(), bias=[[1j] * 7] * 6),
        TypeError,
        "`bias` must be a tensor or an array of numbers. Received: bias=",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_positions=[-1, 0, 1, 2, 3, 4]),
        ValueError,
        r"`query_positions` must be in \[0, 2\*\*31\). Received: query_positions=\[-1, 0",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), query_mask=[[True], [True, False]]),
        ValueError,
        "`query_mask` must be a mask of bools, its rows of one length",
    ),
    (
        lambda: sparse_attention(Q, K, V, Full(), key_mask="a"),
        TypeError,
        "`key_mask` must be a mask of bools. Received: key_mask='a'",
    ),
    (
        lambda: sparse_attention(Q, K, V, Answers(lambda q, k: q - k)),
        TypeError,
        r"Answers.* must answer with bools. Received: dtype=int64",
    ),
    (
        lambda: sparse_attention(
            Q, K, V, Answers(lambda q, k: q - k), query_positions=np.arange(6)
        ),
        TypeError,
        "must be bool, True = may be attended. .*dtype=int32",
    ),
    (
        lambda: sparse_attention(Q, K, V, Answers(lambda q, k: np.ones((3, 3), bool))),
        ValueError,
        r"Answers.* must answer with a shape that broadcasts to \(2, 7\). .*shape=\(3, 3\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_atrous_of_one_is_full():
    q, k, v = random_inputs(13, 13)
    close(
        to_numpy(sparse_attention(q, k, v, Atrous(1))),
        to_numpy(sparse_attention(q, k, v, Full())),
        "out",
    )


@pytest.mark.parametrize("as_tensor", [False, True])
def test_segments_may_have_any_ints_for_numbers(as_tensor):
    if as_tensor and BACKEND == "jax":
        pytest.skip("JAX's ints are of 32 bits")
    q, k, v = random_inputs(8, 8, b=1)
    ids = np.array([[1] * 4 + [1 + 2**32] * 4])
    given = keras.ops.convert_to_tensor(ids) if as_tensor else ids
    found = sparse_attention(q, k, v, Full(), segment_ids=given)
    expected, _ = dense_attention(q, k, v, Full(), segment_ids=ids)
    close(to_numpy(found), expected, "out")
    other = np.array([[1, 1 + 2**32, 1, 1]], "int64")
    found = sparse_attention(q, k[:, :4], v[:, :4], Full(), segment_ids=(ids, other))
    expected, _ = dense_attention(q, k[:, :4], v[:, :4], Full(), segment_ids=(ids, other))
    close(to_numpy(found), expected, "out")


@pytest.mark.parametrize(
    "pattern", [BigBird(8, 2), Neighborhood((2, 4), 1), Axial((2, 4)) & Local(3)]
)
def test_query_positions_beyond_what_a_pattern_is_made_for(pattern):
    q, k, v = random_inputs(3, 8)
    sparse_attention(q, k, v, pattern, query_positions=5)
    for positions in (6, np.array([1, 2, 8])):
        with pytest.raises(ValueError, match=r"`query_positions` must be in \[0, 8\)"):
            sparse_attention(q, k, v, pattern, query_positions=positions)
