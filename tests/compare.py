"""Comparing with the oracle, on whichever backend is in use."""

import keras
import numpy as np

from sparse_attn import sparse_attention
from sparse_attn.reference import dense_attention

BACKEND = keras.backend.backend()
# JAX computes in float32 unless told otherwise for the whole process.
FLOAT = "float32" if BACKEND == "jax" else "float64"
TOLERANCE = {"float64": 1e-9, "float32": 2e-4, "float16": 2e-2, "bfloat16": 1.5e-1}


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)


def at_once(function):
    """The function jitted, on JAX: it would compile each operation for each shape by itself."""
    if BACKEND != "jax":
        return function
    import jax

    return jax.jit(function)


def outputs_and_gradients(function, inputs, cotangents):
    """The outputs of a function of tensors, and the gradients of `sum(output * cotangent)`.

    A cotangent of a place where the output is infinite must be 0, and the
    place then counts as 0.
    """

    def loss(*tensors):
        outs = function(*tensors)
        total = 0.0
        for out, cotangent in zip(outs, cotangents, strict=True):
            cotangent = keras.ops.convert_to_tensor(cotangent, dtype=out.dtype)
            finite = keras.ops.isfinite(out)
            total = total + keras.ops.sum(keras.ops.where(finite, out, 0) * cotangent)
        return total, outs

    if BACKEND == "tensorflow":
        import tensorflow as tf

        tensors = [tf.convert_to_tensor(x) for x in inputs]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total, outs = loss(*tensors)
        gradients = tape.gradient(
            total, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
    elif BACKEND == "jax":
        import jax

        tensors = [jax.numpy.asarray(x) for x in inputs]
        of_all = tuple(range(len(tensors)))
        gradients, outs = at_once(jax.grad(loss, argnums=of_all, has_aux=True))(*tensors)
    else:
        import torch

        tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in inputs]
        total, outs = loss(*tensors)
        gradients = torch.autograd.grad(total, tensors, materialize_grads=True)
        outs = [out.detach() for out in outs]
    return [to_numpy(out) for out in outs], [to_numpy(gradient) for gradient in gradients]


def gradients_of(function):
    """The gradients of `sum(function(*tensors))`, as a function that has gradients itself."""

    def loss(*tensors):
        return keras.ops.sum(function(*tensors))

    def of_tensors(*tensors):
        if BACKEND == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                tape.watch(tensors)
                total = loss(*tensors)
            return tape.gradient(total, tensors)
        if BACKEND == "jax":
            import jax

            return jax.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
        import torch

        return torch.autograd.grad(loss(*tensors), tensors, create_graph=True)

    return of_tensors


def random_inputs(n, m, seed=0, b=2, h=2, d=4, e=3, dtype=FLOAT, g=None):
    """Query, key and value, these of `g` heads."""
    rng = np.random.default_rng(seed)
    g = h if g is None else g
    shapes = ((b, n, h, d), (b, m, g, d), (b, m, g, e))
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def random_masks(n, m, seed=0, b=2, share=0.7):
    rng = np.random.default_rng(seed + 100)
    return {"query_mask": rng.random((b, n)) < share, "key_mask": rng.random((b, m)) < share}


def assert_equals_oracle(
    pattern, n, m, seed=0, transform=lambda function: function, h=2, g=None, **options
):
    """Output, lse and gradients equal the oracle's, under the options given.

    Where a `score_mod` is given, so is `oracle`: what is the same of numpy, as options.
    """
    q, k, v = random_inputs(n, m, seed, h=h, g=g)
    rng = np.random.default_rng(seed + 200)
    bias = options.pop("bias", None)
    oracle_options = {**options, "bias": bias}
    for name in ("max_score_bytes", "score_mod"):
        oracle_options.pop(name, None)
    oracle_options |= oracle_options.pop("oracle", {})
    options.pop("oracle", None)
    _, lse = dense_attention(q, k, v, pattern, **oracle_options)
    out_grad = rng.normal(size=(*q.shape[:3], v.shape[-1])).astype(FLOAT)
    lse_grad = np.where(np.isfinite(lse), rng.normal(size=lse.shape), 0).astype(FLOAT)
    out, lse, expected = dense_attention(
        q, k, v, pattern, out_grad=out_grad, lse_grad=lse_grad, **oracle_options
    )
    inputs = [q, k, v] if bias is None else [q, k, v, bias.astype(FLOAT)]

    def function(q, k, v, bias=None):
        return sparse_attention(q, k, v, pattern, bias=bias, return_lse=True, **options)

    found, gradients = outputs_and_gradients(transform(function), inputs, (out_grad, lse_grad))
    close(found[0], out, f"out of {pattern!r}")
    np.testing.assert_array_equal(found[0] == 0, out == 0, err_msg=f"zeros of {pattern!r}")
    close(found[1], lse, f"lse of {pattern!r}")
    for name, gradient in zip(expected, gradients, strict=False):
        close(gradient, expected[name], f"gradient of {pattern!r} by {name}")


def close(found, expected, what, dtype=FLOAT):
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=what)
