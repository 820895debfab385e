"""Argument checks that every module shares.

A message names the argument, says what it must be, and shows what came.
"""

import difflib
import inspect
import math
import numbers
import operator

LAST = 2**31 - 1  # the last position: positions are int32
_INTS = {None: "an int", 0: "a non-negative int", 1: "a positive int"}


def received(name, requirement, value):
    """The one form of every message."""
    return f"`{name}` must be {requirement}. Received: {name}={value!r}"


def closest(name, names):
    """The one of some names that was probably meant by another, or `None`."""
    names = {each.lower(): each for each in names}
    found = difflib.get_close_matches(name.lower(), names, n=1)
    return names[found[0]] if found else None


def check_int(name, value, minimum=None):
    """Return `value` as a Python int of at least `minimum`, or raise.

    Numpy integers are ints; bools and floats are not.

    Raises:
        TypeError: if `value` is no integer.
        ValueError: if it is less than `minimum`.
    """
    requirement = _INTS.get(minimum, f"an int of at least {minimum}")
    if isinstance(value, bool):
        raise TypeError(received(name, requirement, value))
    try:
        number = operator.index(value)
    except (AttributeError, TypeError):  # arrays and classes have `__index__` too
        raise TypeError(received(name, requirement, value)) from None
    if minimum is not None and number < minimum:
        raise ValueError(received(name, requirement, value))
    return number


def within_int32(number):
    """An int, cut to `[-LAST, LAST]`: no position and no distance lies beyond.

    Parameters of patterns may be any ints; a predicate that meets int32
    tensors cuts them, so that none of them wraps.
    """
    return max(-LAST, min(number, LAST))


def check_bool(name, value):
    """Return `value` if it is `True` or `False`, or raise `TypeError`."""
    if not isinstance(value, bool):
        raise TypeError(received(name, "True or False", value))
    return value


def check_number(name, value):
    """Return `value` as a finite float, or raise as `check_int` does."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(received(name, "a finite number", value))
    if not math.isfinite(value):
        raise ValueError(received(name, "a finite number", value))
    return float(value)


def check_positive(name, value):
    """Return `value` as a finite float above 0, or raise as `check_int` does."""
    requirement = "a positive number"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(received(name, requirement, value))
    if not 0 < value < math.inf:
        raise ValueError(received(name, requirement, value))
    return float(value)


def check_rate(name, value):
    """Return `value` as a float in [0, 1), or raise as `check_int` does."""
    requirement = "a number in [0, 1)"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(received(name, requirement, value))
    if not 0 <= float(value) < 1:
        raise ValueError(received(name, requirement, value))
    return float(value)


_KINDS = {
    "bool": "bool, True = may be attended",
    "int": "of an int dtype",
    "float": "of a float dtype",
}


def check_tensor(name, x, kind, *shapes):
    """Return the tensor `x` of any framework, after a check of its dtype and shape.

    Args:
        name: the argument's name, for the message.
        x: anything with `dtype` and `shape`.
        kind: "bool", "int" or "float".
        *shapes: the shapes it may have. In one, `None` is any size, a tuple
            holds the sizes allowed; sizes of `x` that are unknown pass.

    Raises:
        TypeError: if the dtype is not of that kind.
        ValueError: if `x` has none of the shapes.
    """
    if kind not in str(x.dtype):
        dtype = getattr(x.dtype, "name", str(x.dtype).removeprefix("torch."))
        raise TypeError(f"`{name}` must be {_KINDS[kind]}. Received: {name}.dtype={dtype}")
    found = tuple(x.shape)
    if shapes and not any(_fits(found, shape) for shape in shapes):
        wanted = " or ".join(_shape_text(shape) for shape in shapes)
        raise ValueError(f"`{name}` must have shape {wanted}. Received: {name}.shape={found}")
    return x


def _fits(found, shape):
    if len(found) != len(shape):
        return False
    for size, allowed in zip(found, shape, strict=True):
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        if size is not None and None not in allowed and size not in allowed:
            return False
    return True


def _shape_text(shape):
    sizes = [s if isinstance(s, tuple) else (s,) for s in shape]
    told = ["any" if None in s else " or ".join(map(str, dict.fromkeys(s))) for s in sizes]
    return f"({', '.join(told)})"


def takes(function, count):
    """Whether a function can be called with so many arguments, as far as it tells."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # one of those written in C that tell nothing
        return True
    return True
