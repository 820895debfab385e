"""Rounding, and what is the same to the last bit: see docs/numerics.md."""

import functools

import keras
import numpy as np
import pytest
from keras import ops

from sparse_attn import (
    Atrous,
    Blocks,
    Causal,
    Full,
    Local,
    Longformer,
    Neighborhood,
    Strided,
    plan,
    sparse_attention,
    stream,
    tracing,
)
from sparse_attn.masking import LOWEST
from sparse_attn.reference import dense_attention
from tests.compare import BACKEND, at_once, random_inputs, to_numpy

# Floors, in roundings of the values themselves: in half precision dense attention's own errors
# are larger than these.
FLOOR = {"float64": 8, "float32": 8, "bfloat16": 2, "float16": 2}
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
DTYPES = [dtype for dtype in EPSILON if BACKEND != "jax" or dtype != "float64"]
PATTERNS = [  # one of each kind of layout, and unions of them
    Full(),
    Causal(),
    Local(16),
    Causal() & Strided(16),
    Atrous(4),
    Blocks(32),
    Longformer(8, 2),
    Neighborhood((16, 16), 2),
]
N, HEADS, DIM = 256, 2, 32


def dense(query, key, value, mask):
    """Attention as one would write it: the framework's products, and a softmax in float32."""
    dtype = keras.backend.standardize_dtype(query.dtype)
    query, key, value = (ops.transpose(x, (0, 2, 1, 3)) for x in (query, key, value))
    scores = ops.matmul(query * ops.cast(DIM**-0.5, dtype), ops.swapaxes(key, -1, -2))
    scores = ops.cast(scores, "float64" if dtype == "float64" else "float32")
    scores = ops.where(mask, scores, ops.full((), LOWEST, scores.dtype))
    highest = ops.stop_gradient(ops.max(scores, axis=-1, keepdims=True))
    weights = ops.exp(scores - highest)
    total = ops.sum(weights, axis=-1, keepdims=True)
    out = ops.matmul(ops.cast(weights / total, dtype), value)
    lse = (highest + ops.log(total))[..., 0]
    return ops.transpose(out, (0, 2, 1, 3)), ops.transpose(lse, (0, 2, 1))


def results(function, inputs, cotangents):
    """Outputs, and gradients by inputs, as the framework has them: a list of float64 arrays."""

    def loss(*tensors):
        outs = function(*tensors)
        terms = [
            ops.sum(ops.cast(out, "float32") * ops.convert_to_tensor(x, "float32"))
            for out, x in zip(outs, cotangents, strict=True)
        ]
        return sum(terms[1:], terms[0]), outs

    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            total, outs = loss(*inputs)
        gradients = tape.gradient(total, inputs)
    elif BACKEND == "jax":
        import jax

        gradients, outs = at_once(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    else:
        import torch

        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        total, outs = loss(*inputs)
        gradients = torch.autograd.grad(total, inputs)
        outs = [x.detach() for x in outs]
    return [np.asarray(to_numpy(x)).astype("float64") for x in (*outs, *gradients)]


@functools.cache
def case(pattern, dtype, mean):
    """Inputs of a dtype, the cotangents, what is right, and what dense attention makes of them."""
    rng = np.random.default_rng(0)
    shape = (1, N, HEADS, DIM)
    inputs = [
        ops.cast(ops.convert_to_tensor(rng.normal(size=shape) + x, "float32"), dtype)
        for x in (0, 0, mean)
    ]
    out_grad = to_numpy(ops.cast(ops.cast(rng.normal(size=shape), dtype), "float32"))
    lse_grad = rng.normal(size=shape[:3]).astype("float32")
    exact = [np.asarray(to_numpy(x)).astype("float64") for x in inputs]
    out, lse, gradients = dense_attention(*exact, pattern, out_grad=out_grad, lse_grad=lse_grad)
    cotangents = out_grad, lse_grad
    compared = results(functools.partial(dense, mask=pattern.mask(N)), inputs, cotangents)
    return inputs, cotangents, [out, lse, *gradients.values()], compared


@pytest.mark.parametrize("max_score_bytes", [2**30, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("mean", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_errors_are_at_most_twice_those_of_dense_attention(pattern, dtype, mean, max_score_bytes):
    """A mean of the values far from 0 cancels in the gradients, where rounding shows."""
    inputs, cotangents, exact, compared = case(pattern, dtype, mean)

    def function(q, k, v):
        options = {"max_score_bytes": max_score_bytes, "return_lse": True}
        return sparse_attention(q, k, v, pattern, **options)

    found = results(function, inputs, cotangents)
    names = ("out", "lse", "query", "key", "value")
    for name, x, of_dense, right in zip(names, found, compared, exact, strict=True):
        for size in (_root_mean_square, _greatest):
            floor = FLOOR[dtype] * EPSILON[dtype] * size(right)
            assert size(x - right) <= 2 * size(of_dense - right) + floor, (name, size)


def _root_mean_square(x):
    return np.sqrt(np.mean(x * x))


def _greatest(x):
    return np.abs(x).max()


@pytest.mark.parametrize("leading", [(1, 1), (1, 1, 1), (2, 1), (1,)])
@pytest.mark.parametrize(("n", "keys", "dim"), [(2, 49, 5), (4, 57, 16), (16, 63, 4), (1, 49, 64)])
def test_a_single_product_in_bfloat16(leading, n, keys, dim):
    """TensorFlow's with several leading axes of size 1 is wrong, on a CPU with AMX."""
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-1, 2, (*leading, size, dim)) for size in (n, keys))
    axes = " ".join("abc"[: len(leading)])

    def product(x, y):
        return tracing.product(x, y, f"{axes} i d, {axes} k d -> {axes} i k")

    functions = [at_once(product)]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        for shapes in ((x.shape, y.shape), ([None] * x.ndim, [None] * y.ndim)):
            specs = [tf.TensorSpec(shape, "bfloat16") for shape in shapes]
            functions.append(tf.function(product, input_signature=specs))
    tensors = [ops.cast(ops.convert_to_tensor(z), "bfloat16") for z in (x, y)]
    for function in functions:
        found = to_numpy(ops.cast(function(*tensors), "float32"))
        np.testing.assert_array_equal(found, x @ np.swapaxes(y, -1, -2))


def test_products_of_half_precision_are_added_up_in_more():
    """256 products: added up in float16, they were 13 roundings off."""
    rng = np.random.default_rng(0)
    inputs = [ops.cast(rng.normal(size=(1, 64, 1, 256)), "float16") for _ in range(3)]
    q, k, v = (np.asarray(to_numpy(x)).astype("float64") for x in inputs)
    found = np.asarray(to_numpy(sparse_attention(*inputs, Full()))).astype("float64")
    np.testing.assert_allclose(found, dense_attention(q, k, v, Full())[0], atol=0.0015)


# ---- To the last bit -----------------------------------------------------------


def bits(pattern, inputs, **options):
    """Outputs and gradients of a call, as arrays."""
    cotangents = [
        np.sin(np.arange(np.prod(shape))).reshape(shape)
        for shape in (inputs[0].shape, inputs[0].shape[:3])
    ]
    options = {"return_lse": True, **options}
    function = functools.partial(sparse_attention, pattern=pattern, **options)
    return results(function, [ops.convert_to_tensor(x) for x in inputs], cotangents)


def same(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("max_score_bytes", [2**30, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_call_gives_the_same_bits_each_time(pattern, max_score_bytes):
    inputs = random_inputs(N, N, b=2, d=16, e=16, dtype="float32")
    first = bits(pattern, inputs, max_score_bytes=max_score_bytes)
    for _ in range(3):
        same(bits(pattern, inputs, max_score_bytes=max_score_bytes), first)


def test_dropout_gives_the_same_bits_for_a_seed():
    inputs = random_inputs(N, N, b=2, d=16, e=16, dtype="float32")
    options = {"dropout": 0.3, "seed": 5}
    same(*(bits(Local(16), inputs, **options) for _ in range(2)))


def same_bits(pattern):
    """How many results are equal to the last bit: all, or output and log-sum-exp.

    On JAX, XLA fuses the backward pass otherwise for other shapes. PyTorch adds up a product in
    another order if the tensors lie in memory otherwise, as those of several parts may.
    """
    several = BACKEND == "torch" and len(plan(pattern, N).parts) > 1
    return 2 if several or BACKEND == "jax" else 5


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_recomputed_weights_are_those_that_were_kept(pattern):
    """To the last bit, where both are one piece: as here, of few positions."""
    inputs = random_inputs(N, N, b=2, d=16, e=16, dtype="float32")
    kept, recomputed = (bits(pattern, inputs, max_score_bytes=x) for x in (2**30, 0))
    count = same_bits(pattern)
    same(recomputed[:count], kept[:count])
    for x, y in zip(recomputed, kept, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_score_bytes", [2**30, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_row_of_a_batch_does_not_depend_on_the_others(pattern, max_score_bytes):
    """To the last bit, where both are one piece."""
    inputs = random_inputs(N, N, b=3, d=16, e=16, dtype="float32")
    options = {"max_score_bytes": max_score_bytes}
    shape = inputs[0].shape
    cotangents = [np.sin(np.arange(np.prod(x))).reshape(x) for x in (shape, shape[:3])]

    def run(rows):
        function = functools.partial(sparse_attention, pattern=pattern, return_lse=True, **options)
        return results(
            function,
            [ops.convert_to_tensor(x[rows]) for x in inputs],
            [x[rows] for x in cotangents],
        )

    alone, together = run(slice(1, 2)), [x[1:2] for x in run(slice(None))]
    count = same_bits(pattern)
    same(alone[:count], together[:count])
    for x, y in zip(alone, together, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_many_pieces_give_the_same_bits_each_time(monkeypatch):
    monkeypatch.setattr(stream, "PIECE_BYTES", 2**16)
    inputs = random_inputs(N, N, b=2, d=16, e=16, dtype="float32")
    for pattern in (Causal() & Strided(16), Longformer(8, 2)):
        for size in (2**30, 0):
            first = bits(pattern, inputs, max_score_bytes=size)
            same(bits(pattern, inputs, max_score_bytes=size), first)
