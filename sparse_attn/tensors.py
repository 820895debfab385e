"""Tensors that are given: those of any framework, arrays and lists of numbers."""

import keras
import numpy as np
from keras import ops

from sparse_attn.checks import received

NUMBERS = "a tensor or an array of numbers"


def to_tensor(name, x, requirement=NUMBERS):
    """`x` as a tensor.

    Args:
        name: the argument's name, for the message.
        x: a tensor, an array, a number, or lists of these.
        requirement: what the message says it must be.

    Raises:
        TypeError: if it is a symbol of Keras, or holds no real numbers.
        ValueError: if it holds lists of different lengths, or numbers too large.
    """
    if isinstance(x, keras.KerasTensor):
        raise TypeError(
            f"`{name}` must be a tensor or an array; in a functional model use a layer of "
            f"`sparse_attn.layers`, or call this inside of your own layer. Received: {x!r}"
        )
    to_array(name, x, requirement)
    try:
        found = ops.convert_to_tensor(x)
    except (OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "overflow" not in str(error):  # memory, a device
            raise
        raise ValueError(received(name, requirement, x)) from error
    except (TypeError, ValueError) as error:
        raise TypeError(received(name, requirement, x)) from error
    if any(kind in str(found.dtype) for kind in ("string", "complex")):
        raise TypeError(received(name, requirement, x))
    return found


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
    if found.dtype.kind in "OSUMmc":
        raise TypeError(received(name, requirement, x))
    return found


def _has_tensors(x):
    if isinstance(x, (list, tuple)):
        return any(map(_has_tensors, x))
    return ops.is_tensor(x) or isinstance(x, (keras.KerasTensor, keras.Variable))
