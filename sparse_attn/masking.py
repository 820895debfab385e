"""Masks: the one place where they meet scores, and zero what must not count.

A mask is a bool tensor; True = may be attended. Everything here is finite in
every float type: a masked score is `LOWEST` in float32 or wider, and a row
without any allowed key comes out as zeros, not as a mean or a NaN.
"""

from functools import partial

import keras
from keras import ops

from sparse_attn.checks import check_int, check_tensor
from sparse_attn.reshaping import rearrange
from sparse_attn.tensors import to_tensor, values_of

LOWEST = -1e30  # a score that no float32 score survives, with room to add to it
MASKED = -1e29  # below this a log-sum-exp is that of a fully masked row


def check_mask(name, mask, *shapes):
    """Return `mask` as a bool tensor, after a check of its dtype and shape; `None` passes."""
    if mask is None:
        return None
    return check_tensor(name, to_tensor(name, mask, "a mask of bools"), "bool", *shapes)


def sequence_mask(lengths, maxlen):
    """The padding mask of sequences of these lengths.

    Args:
        lengths: int tensor or array of any shape `(...)`, valid positions from the left.
        maxlen: int or int tensor, the padded length.

    Returns:
        A bool tensor `(..., maxlen)`: True at valid positions.

    Raises:
        TypeError: if `lengths` does not hold ints.

    Example:

    >>> from sparse_attn.masking import sequence_mask
    >>> [[bool(x) for x in row] for row in sequence_mask([1, 3], 3)]
    [[True, False, False], [True, True, True]]
    """
    lengths = to_tensor("lengths", lengths, "ints")
    check_tensor("lengths", lengths, "int")
    if isinstance(maxlen, (int, float, bool)):
        maxlen = check_int("maxlen", maxlen, minimum=0)
    else:
        maxlen = check_tensor("maxlen", to_tensor("maxlen", maxlen, "an int"), "int", ())
    return ops.arange(maxlen, dtype=lengths.dtype) < lengths[..., None]


def zero_masked(x, mask):
    """`x` with zeros where the mask is False, whatever stood there (NaN too).

    Args:
        x: a tensor `(*mask_shape, ...)`.
        mask: a bool tensor of its leading axes, some perhaps of size 1, or `None`
            to change nothing.
    """
    if mask is None:
        return x
    x, mask = values_of(x), values_of(mask)
    mask = ops.reshape(mask, ops.shape(mask) + (1,) * (len(x.shape) - len(mask.shape)))
    if keras.backend.standardize_dtype(x.dtype) == "bool":  # for which ONNX has no "where"
        return x & mask
    return ops.where(mask, x, ops.zeros((), x.dtype))


def additive_mask(mask, dtype):
    """A mask as a table to add to scores: 0 where it is True, `LOWEST` elsewhere.

    Args:
        mask: a bool tensor.
        dtype: any float type of the range of float32: not float16.
    """
    return ops.where(mask, ops.zeros((), dtype), ops.full((), LOWEST, dtype))


def larger(x, y):
    """The larger of two tensors at each place; Keras' `maximum` narrows float64 on PyTorch."""
    return ops.where(x > y, x, y)


def at_least_lowest(x):
    """`x`, but no less than `LOWEST`: finite where it was `-inf`; NaN stays."""
    return ops.where(x < LOWEST, ops.full((), LOWEST, x.dtype), x)


def is_not_masked(x):
    """Whether a score or a log-sum-exp is that of an allowed pair, or of a row that has one.

    NaN is not masked: it is somebody's fault, and must be seen.
    """
    return ops.logical_not(x <= MASKED)


def masked_softmax(scores, mask=None, axis=-1):
    """Softmax over the allowed entries.

    Args:
        scores: a float tensor.
        mask: a bool tensor that broadcasts with it, or `None`.
        axis: int, the axis to normalise.

    Returns:
        Weights of the shape and dtype of `scores`. They sum to 1 along `axis`,
        or are all 0 where nothing is allowed. Computed in float32 or wider.

    Raises:
        TypeError: if `mask` is not bool.

    Example:

    >>> import numpy as np
    >>> from sparse_attn.masking import masked_softmax
    >>> weights = masked_softmax(np.zeros(3, "float32"), np.array([True, True, False]))
    >>> [float(x) for x in weights]
    [0.5, 0.5, 0.0]
    """
    scores = to_tensor("scores", scores)
    dtype = scores.dtype
    scores = ops.cast(scores, wide(dtype))
    normalise = softmax if axis in (-1, len(scores.shape) - 1) else partial(ops.softmax, axis=axis)
    if mask is None:
        return ops.cast(normalise(scores), dtype)
    mask = check_mask("mask", mask)
    # What stood in a masked entry must not matter, be it NaN.
    scores = ops.where(mask, scores, ops.full((), LOWEST, scores.dtype))
    weights = ops.where(mask, normalise(scores), ops.zeros((), scores.dtype))
    return ops.cast(weights, dtype)


def softmax(scores):
    """Softmax over the last axis, of any number of axes; TensorFlow's has at most 5.

    Keras warns if the last has one entry, which here may be right.
    """
    keys = scores.shape[-1]
    if isinstance(keys, int) and keys == 1:  # a tensor where PyTorch traces: 1 for now
        return ops.exp(scores - scores)  # PyTorch wants a link to them, though its gradient is 0
    if len(scores.shape) <= 5:
        return ops.softmax(scores, axis=-1)
    found = ops.softmax(rearrange(scores, "b h t ... j -> b h t (...) j"), axis=-1)
    return ops.reshape(found, ops.shape(scores))


def wide(dtype):
    """float32, or `dtype` itself if that is wider."""
    return "float64" if keras.backend.standardize_dtype(dtype) == "float64" else "float32"
