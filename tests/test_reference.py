"""The oracle itself, against attention written as loops and gradients by differences."""

import numpy as np
import pytest

from sparse_attn import Causal, Local
from sparse_attn.reference import dense_attention
from tests.compare import random_inputs, random_masks


def by_loops(q, k, v, pattern, query_mask, key_mask, bias):
    b, n, h, d = q.shape
    out, lse = np.zeros((b, n, h, v.shape[-1])), np.full((b, n, h), -np.inf)
    for z, i, g in np.ndindex(b, n, h):
        keys = [j for j in range(k.shape[1]) if pattern(i, j) and key_mask[z, j]]
        if keys and query_mask[z, i]:
            scores = np.array([q[z, i, g] @ k[z, j, g] / d**0.5 + bias[z, g, i, j] for j in keys])
            weights = np.exp(scores)
            lse[z, i, g] = np.log(weights.sum())
            out[z, i, g] = weights / weights.sum() @ v[z, keys, g]
    return out, lse


def test_values_equal_loops():
    n, m = 5, 6
    q, k, v = random_inputs(n, m, dtype="float64")
    masks = random_masks(n, m)
    bias = np.random.default_rng(5).normal(size=(2, 2, n, m))
    pattern = Causal() & Local(2)
    out, lse = dense_attention(q, k, v, pattern, bias=bias, **masks)
    expected, expected_lse = by_loops(q, k, v, pattern, bias=bias, **masks)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-12)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias"])
def test_gradients_equal_differences(name):
    n, m = 4, 5
    inputs = dict(zip(("query", "key", "value"), random_inputs(n, m, dtype="float64"), strict=True))
    rng = np.random.default_rng(5)
    inputs["bias"] = rng.normal(size=(1, 2, n, m))
    masks = random_masks(n, m)
    options = {"pattern": Local(2), **masks}
    _, lse = dense_attention(**inputs, **options)
    out_grad = rng.normal(size=(2, n, 2, 3))
    lse_grad = np.where(np.isfinite(lse), rng.normal(size=lse.shape), 0)

    def loss(x):
        out, lse = dense_attention(**{**inputs, name: x}, **options)
        return (out * out_grad).sum() + (np.where(np.isfinite(lse), lse, 0) * lse_grad).sum()

    _, _, gradients = dense_attention(**inputs, **options, out_grad=out_grad, lse_grad=lse_grad)
    x = inputs[name]
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-5
        difference = (loss(x + step) - loss(x - step)) / 2e-5
        assert abs(difference - gradients[name][index]) < 1e-8
