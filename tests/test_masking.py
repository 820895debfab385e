"""Masks: padding, softmax over what is allowed, zeros elsewhere."""

import keras
import numpy as np
import pytest

from sparse_attn.masking import masked_softmax, sequence_mask, zero_masked
from tests.compare import BACKEND, FLOAT, at_once, close, outputs_and_gradients, to_numpy


def test_sequence_mask():
    lengths = np.array([[0, 2], [3, 9]])
    expected = np.arange(4) < lengths[..., None]
    found = to_numpy(sequence_mask(lengths, 4))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected)


def softmax_by_rows(scores, mask):
    weights = np.zeros_like(scores)
    for row in np.ndindex(scores.shape[:-1]):
        allowed = mask[row]
        if allowed.any():
            exponentials = np.exp(scores[row][allowed])
            weights[row][allowed] = exponentials / exponentials.sum()
    return weights


def test_masked_softmax_and_its_gradient():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 4, 5)).astype(FLOAT)
    mask = rng.random((3, 4, 5)) < 0.4
    mask[0, 0] = False
    expected = softmax_by_rows(scores, mask)
    cotangent = rng.normal(size=scores.shape)
    (found,), (gradient,) = outputs_and_gradients(
        lambda scores: [masked_softmax(scores, mask)], [scores], [cotangent]
    )
    close(found, expected, "weights")
    assert (found[~mask] == 0).all()
    mean = (expected * cotangent).sum(axis=-1, keepdims=True)
    close(gradient, expected * (cotangent - mean), "gradient")


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_masked_scores_may_be_anything(poison):
    scores = np.array([[1.0, poison, 2.0], [poison] * 3])
    mask = np.array([[True, False, True], [False] * 3])
    found = to_numpy(masked_softmax(scores, mask))
    np.testing.assert_allclose(found, softmax_by_rows(np.where(mask, scores, 0), mask))


def test_masked_softmax_along_another_axis():
    scores = np.random.default_rng(0).normal(size=(4, 3))
    mask = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1]], bool)
    close(
        to_numpy(masked_softmax(scores, mask, axis=0)), softmax_by_rows(scores.T, mask.T).T, "axis"
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_fully_masked_rows_in_every_dtype(dtype):
    scores = keras.ops.cast(np.full((2, 3), 30.0), dtype)
    weights = masked_softmax(scores, np.array([[False] * 3, [True, True, False]]))
    assert keras.backend.standardize_dtype(weights.dtype) == dtype
    weights = to_numpy(keras.ops.cast(weights, "float32"))
    np.testing.assert_array_equal(weights, [[0, 0, 0], [0.5, 0.5, 0]])


def test_without_a_mask_it_is_softmax():
    scores = np.random.default_rng(0).normal(size=(2, 3)).astype("float32")
    np.testing.assert_allclose(
        to_numpy(masked_softmax(scores)), to_numpy(keras.ops.softmax(scores)), rtol=1e-6
    )


def test_lists_may_hold_tensors_that_are_traced():
    def function(a, b):
        return sequence_mask([a, b], 4), masked_softmax(np.zeros(2), [a > 1, b > 1])

    if BACKEND == "tensorflow":
        import tensorflow as tf

        function = tf.function(function)
    mask, weights = at_once(function)(*(keras.ops.convert_to_tensor(x) for x in (1, 3)))
    np.testing.assert_array_equal(to_numpy(mask), [[True] + [False] * 3, [True] * 3 + [False]])
    np.testing.assert_array_equal(to_numpy(weights), [0, 1])


def test_lengths_too_large_for_ints_are_refused_or_right():
    lengths = [2**31 + 1, 2]
    if BACKEND == "tensorflow":  # whose ints are as wide as they must be
        assert to_numpy(sequence_mask(lengths, 3)).tolist() == [[True] * 3, [True, True, False]]
        return
    with pytest.raises(ValueError, match=r"`lengths` must be ints\. .*2147483649"):
        sequence_mask(lengths, 3)


def test_zero_masked():
    x = np.full((2, 3, 4), np.nan, "float32")
    x[0, 1] = 5
    mask = np.zeros((2, 3), bool)
    mask[0, 1] = True
    expected = np.zeros((2, 3, 4))
    expected[0, 1] = 5
    np.testing.assert_array_equal(
        to_numpy(zero_masked(keras.ops.convert_to_tensor(x), mask)), expected
    )
    assert zero_masked(x, None) is x


def test_gradient_of_zero_masked_is_zero_where_masked():
    x = np.array([[1.0, np.nan]])
    mask = np.array([[True, False]])
    _, (gradient,) = outputs_and_gradients(
        lambda x: [zero_masked(x, mask)], [x.astype(FLOAT)], [np.ones((1, 2))]
    )
    assert gradient.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: masked_softmax(np.zeros(2), np.array([1.0, 0])),
            TypeError,
            f"`mask` must be bool, True = may be attended. Received: mask.dtype={FLOAT}",
        ),
        (
            lambda: sequence_mask(np.array([1.5]), 3),
            TypeError,
            "`lengths` must be of an int dtype. Received: lengths.dtype=float",
        ),
        (
            lambda: sequence_mask(np.array([1]), -3),
            ValueError,
            "`maxlen` must be a non-negative int. Received: maxlen=-3",
        ),
        (
            lambda: sequence_mask([[1], [2, 3]], 3),
            ValueError,
            r"`lengths` must be ints, its rows of one length. Received: lengths=\[\[1\]",
        ),
        (
            lambda: sequence_mask("a", 3),
            TypeError,
            "`lengths` must be ints. Received: lengths='a'",
        ),
        (
            lambda: sequence_mask(keras.Input((3,), dtype="int32"), 3),
            TypeError,
            "`lengths` must be a tensor or an array; in a functional model use a layer",
        ),
        (
            lambda: masked_softmax("a"),
            TypeError,
            "`scores` must be a tensor or an array of numbers. Received: scores='a'",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
