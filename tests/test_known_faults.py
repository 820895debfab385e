"""Faults of earlier sparse attention layers, each of which must not return."""

import keras
import numpy as np
import pytest

from sparse_attn import Atrous, Causal, Local, Strided, plan, sparse_attention
from sparse_attn.functional import attention_weights
from sparse_attn.layers import AtrousSelfAttention, LocalSelfAttention, StridedSelfAttention
from sparse_attn.reference import dense_attention
from tests.compare import FLOAT, random_inputs, to_numpy
from tests.test_plan import counts

EXACT = 1e-12 if FLOAT == "float64" else 1e-6
LAYERS = [
    lambda: AtrousSelfAttention(2, 4, 4),
    lambda: LocalSelfAttention(2, 4, 4),
    lambda: StridedSelfAttention(2, 4, 4),
]


@pytest.mark.parametrize("pattern", [Atrous(4), Local(4), Strided(4), Causal()], ids=repr)
def test_the_softmax_is_not_uniform(pattern):
    # Less 1e10, every float32 score is the same.
    q, k, v = (x.astype("float32") for x in random_inputs(16, 16))
    mask = np.ones((2, 16), bool)
    weights = to_numpy(attention_weights(3 * q, k, pattern, key_mask=mask))
    row = weights[0, 0, 8][pattern.mask(16)[8]]
    assert row.max() > 2 * row.min()
    out = to_numpy(sparse_attention(3 * q, k, v, pattern, key_mask=mask))
    expected, _ = dense_attention(3 * q, k, v, pattern, key_mask=mask)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("n", [5, 13, 17])
@pytest.mark.parametrize("pattern", [Atrous(4), Local(4), Strided(4)], ids=repr)
def test_padding_that_the_layout_adds_takes_no_part(pattern, n):
    # Keys at -100 q would get all the weight where padded zeros joined the softmax.
    v = np.ones((1, n, 1, 2))
    q = np.ones((1, n, 1, 2))
    out = to_numpy(sparse_attention(q, -100 * q, v, pattern))
    np.testing.assert_allclose(out, v, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("n", [16, 64])
def test_no_extra_block_where_the_length_divides(n):
    assert plan(Atrous(4), n).scored_pairs == n * n // 4
    (part,) = plan(Atrous(4), n)
    assert to_numpy(part.layout.split_queries(keras.ops.zeros((1, n, 1, 1)))[0]).size == n


def test_the_local_half_of_strided_is_not_dilated():
    # Rate 4 once gave the local half distances of -12, -8, ... 12, and no neighbours.
    mask = Strided(4).mask(32)
    distance = np.arange(32)[None, :] - np.arange(32)[:, None]
    assert mask[np.abs(distance) <= 4].all()
    np.testing.assert_array_equal(mask, (np.abs(distance) <= 4) | (distance % 4 == 0))


@pytest.mark.parametrize("n", [8, 32, 33])
def test_no_pair_of_strided_is_counted_twice(n):
    # Neither the centre nor the strided keys within the window.
    np.testing.assert_array_equal(counts(plan(Strided(4), n), n, n), Strided(4).mask(n))
    zeros = np.zeros((1, n, 1, 2))
    identity = np.eye(n)[None, :, None, :]
    weights = to_numpy(sparse_attention(zeros, zeros, identity, Strided(4)))[0, :, 0]
    mask = Strided(4).mask(n)
    np.testing.assert_allclose(
        weights, mask / mask.sum(axis=1, keepdims=True), rtol=EXACT, atol=EXACT
    )


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_masks_are_finite_in_float16(make, dtype):
    # 1e10 is infinite in float16.
    layer = make()
    layer = type(layer).from_config({**layer.get_config(), "dtype": dtype})
    x = np.random.default_rng(0).normal(size=(2, 13, 6)).astype("float16")
    mask = np.arange(13) < np.array([[9], [0]])
    out = to_numpy(keras.ops.cast(layer(x, mask=mask), "float32"))
    assert np.isfinite(out).all()
    bias = to_numpy(keras.ops.cast(layer.output_dense.bias, "float32"))
    np.testing.assert_array_equal(out[1], np.broadcast_to(bias, (13, 6)))


@pytest.mark.parametrize("make", LAYERS)
def test_keys_and_values_are_projected_once(make, monkeypatch):
    # Windows of the input were once unfolded first, and projected 2k + 1 times.
    layer, projected = make(), []
    layer.build((None, None, 6))
    original = keras.layers.Dense.call

    def call(self, inputs, *arguments, **options):
        projected.append((self.name, tuple(inputs.shape)))
        return original(self, inputs, *arguments, **options)

    monkeypatch.setattr(keras.layers.Dense, "call", call)
    layer(np.zeros((2, 24, 6), "float32"))
    assert projected == [
        ("query", (2, 24, 6)),
        ("key", (2, 24, 6)),
        ("value", (2, 24, 6)),
        ("attention_output", (2, 24, 8)),
    ]
