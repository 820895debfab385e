"""Tensors that are given: those of any framework, arrays and lists of numbers."""

import keras
import numpy as np
from keras import ops

from sparse_attn.checks import received
from sparse_attn.tracing import is_dense, read_variable

NUMBERS = "a tensor or an array of numbers"
DENSE = (
    "dense, neither ragged nor sparse nor nested: pad it, as `to_tensor()` of a RaggedTensor "
    "does, and give a mask"
)


def to_tensor(name, x, requirement=NUMBERS):
    """`x` as a tensor.

    Args:
        name: the argument's name, for the message.
        x: a tensor, an array, a variable, a number, or lists of these.
        requirement: what the message says it must be.

    Raises:
        TypeError: if it is a symbol of Keras or not dense, or holds no real numbers.
        ValueError: if it holds lists of different lengths, or numbers too large.
    """
    if isinstance(x, keras.KerasTensor):
        raise TypeError(
            f"`{name}` must be a tensor or an array; in a functional model use a layer of "
            f"`sparse_attn.layers`, or call this inside of your own layer. Received: {x!r}"
        )
    to_array(name, x, requirement)
    x = values_of(x)
    check_dense(name, x)
    try:
        found = ops.convert_to_tensor(x)
    except (OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "overflow" not in str(error):  # memory, a device
            raise
        raise ValueError(received(name, requirement, x)) from error
    except (TypeError, ValueError) as error:
        raise TypeError(received(name, requirement, x)) from error
    if not _is_real(found.dtype):
        raise TypeError(received(name, requirement, x))
    return found


def check_dense(name, x, requirement=NUMBERS):
    """Raise `TypeError` if a tensor or symbol is not dense, or holds no real numbers."""
    if isinstance(x, keras.KerasTensor):
        dense = not x.ragged  # products by a number call themselves sparse
    else:
        dense = not ops.is_tensor(x) or is_dense(x)
    if not dense:
        raise TypeError(received(name, DENSE, x))
    if not _is_real(getattr(x, "dtype", "")):
        raise TypeError(received(name, requirement, x))


def _is_real(dtype):
    if isinstance(dtype, np.dtype):
        return dtype.kind not in "OSUMmc"
    return not any(kind in str(dtype) for kind in ("string", "complex"))


def values_of(x):
    """`x` with the values of variables in their place, also within lists."""
    if isinstance(x, (list, tuple)):
        return [values_of(each) for each in x] if _has_tensors(x) else x
    return read_variable(x) if is_variable(x) else x


def is_variable(x):
    """Whether it is a variable of Keras, or one of TensorFlow's own."""
    return isinstance(x, keras.Variable) or hasattr(x, "assign_add")


def to_array(name, x, requirement=NUMBERS):
    """The numbers of `x` as an array, or `None` if tensors have them, which may be traced.

    Args and errors are those of `to_tensor`.
    """
    if _has_tensors(x):
        return None
    try:
        found = np.asarray(x)
    except ValueError:
        raise ValueError(received(name, f"{requirement}, its rows of one length", x)) from None
    if not _is_real(found.dtype):
        raise TypeError(received(name, requirement, x))
    return found


def _has_tensors(x):
    if isinstance(x, (list, tuple)):
        return any(map(_has_tensors, x))
    return ops.is_tensor(x) or isinstance(x, (keras.KerasTensor, keras.Variable))
