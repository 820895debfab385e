"""JAX, where nothing is jitted, and where a layer is; elsewhere the tests jit what they compare."""

import keras
import numpy as np
import pytest

from sparse_attn import (
    Causal,
    Local,
    PerHead,
    Prefix,
    sparse_attention,
    stream,
)
from sparse_attn.layers import SelfAttention
from sparse_attn.reference import dense_attention
from tests.compare import FLOAT, close, random_inputs, random_masks, to_numpy

jax = pytest.importorskip("jax", reason="the extra [jax] is not installed")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="jit is JAX's")


@pytest.mark.parametrize(
    ("pattern", "max_score_bytes"),
    [(Local(3) | Prefix(2), 2**30), (PerHead([Local(2), Causal()]), 0)],
    ids=["kept", "streamed"],
)
def test_equals_oracle_without_jit(pattern, max_score_bytes, monkeypatch):
    monkeypatch.setattr(stream, "PIECE_BYTES", 2000)
    n, b = 37, 2  # no block divides it
    q, k, v = random_inputs(n, n, b=b)
    key_mask = random_masks(n, n, b=b)["key_mask"]
    out_grad = np.random.default_rng(1).normal(size=(b, n, 2, 3)).astype(FLOAT)

    def loss(q, k, v):
        options = {"key_mask": key_mask, "max_score_bytes": max_score_bytes}
        out = sparse_attention(q, k, v, pattern, **options)
        return (out * out_grad).sum(), out

    found, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*map(jax.numpy.asarray, (q, k, v)))
    expected, _, gradients = dense_attention(q, k, v, pattern, key_mask=key_mask, out_grad=out_grad)
    for x, y in zip((out, *found), [expected, *gradients.values()], strict=True):
        close(to_numpy(x), y, repr(pattern))


def test_a_jitted_step_of_a_layer_is_traced_once_for_each_length():
    layer, traces = SelfAttention(2, 4, Causal() & Local(3)), []
    layer.build((None, None, 8))
    values = [variable.value for variable in layer.trainable_variables]

    @jax.jit
    def step(values, x):
        traces.append(x.shape)

        def loss(values):
            return (layer.stateless_call(values, [], x)[0] ** 2).mean()

        return jax.value_and_grad(loss)(values)

    for n in (5, 5, 9, 5):
        loss, gradients = step(values, np.ones((1, n, 8), "float32"))
        assert np.isfinite(loss)
        assert all(np.isfinite(x).all() for x in gradients)
    assert traces == [(1, 5, 8), (1, 9, 8)]
