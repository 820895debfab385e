"""JAX, where nothing is jitted, where a layer is, and where lengths are names; other tests jit."""

import keras
import numpy as np
import pytest

from sparse_attn import (
    Axial,
    BigBird,
    Causal,
    Local,
    Neighborhood,
    PerHead,
    Prefix,
    Random,
    sparse_attention,
    stream,
)
from sparse_attn.functional import attention_weights
from sparse_attn.layers import SelfAttention
from sparse_attn.reference import dense_attention
from tests.cases import EACH_CLASS
from tests.compare import FLOAT, at_once, close, random_inputs, random_masks, to_numpy

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


# ---- Exported with names for lengths -------------------------------------------


def exported(function, *shapes):
    """A function exported for float32 tensors of these shapes, such as `"b, n, 2, 4"`."""
    scope = jax.export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape, scope=scope), "float32")
        for shape in shapes
    ]
    return jax.export.export(jax.jit(function))(*specs).call


@pytest.mark.parametrize("kind", EACH_CLASS)
def test_patterns_are_exported_with_unknown_lengths(kind):
    patterns = EACH_CLASS[kind]

    def function(q, k, v):
        return [sparse_attention(q, k, v, pattern) for pattern in patterns]

    call = exported(function, "b, n, 2, 4", "b, m, 2, 4", "b, m, 2, 3")
    for n, m in ((13, 29), (50, 50)):
        inputs = random_inputs(n, m)
        for pattern, out in zip(patterns, call(*inputs), strict=True):
            close(to_numpy(out), dense_attention(*inputs, pattern)[0], f"{pattern!r} at {n}, {m}")


@pytest.mark.parametrize("shape", ["b, n, 2, 4", "b, 29, 2, 4"])
@pytest.mark.parametrize("pattern", [Local(3), BigBird(64, 4, 1)], ids=repr)
def test_an_exported_function_has_gradients(pattern, shape):
    call = exported(lambda x: sparse_attention(x, x, x, pattern), shape)
    x, *_ = random_inputs(29, 29, dtype="float32")
    out_grad = random_inputs(29, 29, 1, dtype="float32")[0]
    found = jax.grad(lambda x: (call(x) * out_grad).sum())(x)
    _, _, gradients = dense_attention(x, x, x, pattern, out_grad=out_grad)
    close(to_numpy(found), sum([*gradients.values()][:3]), "gradient", "float32")


@pytest.mark.parametrize(
    "pattern",
    [BigBird(64, 4), Random(64, 4), Neighborhood((16, 4), 1), Local(2) | Axial((4, 16))],
    ids=repr,
)
def test_a_layer_is_exported_with_an_unknown_length(pattern):
    layer = SelfAttention(2, 4, pattern)
    layer.build((None, None, 8))
    call = exported(lambda x: layer(x), "b, n, 8")
    for n in (29, 64):
        x = np.random.default_rng(n).normal(size=(2, n, 8)).astype("float32")
        close(to_numpy(call(x)), to_numpy(at_once(layer)(x)), f"out at {n}")


@pytest.mark.parametrize(
    "pattern", [BigBird(64, 4, 1), Causal() & Neighborhood((16, 4), 1)], ids=repr
)
def test_weights_are_exported_with_unknown_lengths(pattern):
    def function(q, k, v):
        return attention_weights(q, k, pattern) @ v.transpose(0, 2, 1, 3)

    call = exported(function, "b, n, 2, 4", "b, n, 2, 4", "b, n, 2, 3")
    for n in (13, 50):
        inputs = random_inputs(n, n)
        out = to_numpy(call(*inputs)).transpose(0, 2, 1, 3)
        close(out, dense_attention(*inputs, pattern)[0], "out")


@pytest.mark.parametrize(
    "pattern", [Local(3), Axial((4, 16)), Causal() & BigBird(64, 4, 1)], ids=repr
)
def test_queries_of_unknown_length_may_begin_at_a_known_position(pattern):
    def function(q, k, v):
        return sparse_attention(q, k, v, pattern, query_positions=9)

    call = exported(function, "b, n, 2, 4", "b, m, 2, 4", "b, m, 2, 3")
    for n, m in ((1, 10), (7, 30)):
        inputs = random_inputs(n, m)
        expected, _ = dense_attention(*inputs, pattern, query_positions=9 + np.arange(n))
        close(to_numpy(call(*inputs)), expected, f"out at {n}, {m}")


@pytest.mark.parametrize("pattern", [Local(3), Neighborhood((16, 4), 1)], ids=repr)
def test_a_layer_is_exported_with_unknown_axes_of_positions(pattern):
    layer = SelfAttention(2, 4, pattern)
    layer.build((None, None, None, 8))
    call = exported(lambda x: layer(x), "b, y, x, 8")
    for shape in ((2, 5, 4, 8), (2, 16, 4, 8)):
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        close(to_numpy(call(x)), to_numpy(at_once(layer)(x)), "out")


@pytest.mark.parametrize("pattern", [BigBird(16, 4, 1), Axial((4, 4)) & Causal()], ids=repr)
def test_an_exported_function_gives_nan_beyond_the_length_of_a_pattern(pattern):
    call = exported(lambda x: sparse_attention(x, x, x, pattern), "b, n, 2, 4")
    good, bad = (random_inputs(n, n)[0] for n in (16, 17))
    close(to_numpy(call(good)), dense_attention(good, good, good, pattern)[0], "out")
    assert np.isnan(call(bad)).all()
