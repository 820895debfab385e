"""What every layer of the package is: one that names an input which it cannot take."""

import functools
import inspect
import sys
import warnings

import keras

from sparse_attn.tensors import check_dense, to_array
from sparse_attn.tracing import uncompiled

_FRAMEWORKS = {"keras", "sparse_attn", "tensorflow", "torch"}  # this package included


def warn(text):
    """Warn at the user's line, the innermost one that is not in this package or a framework."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _FRAMEWORKS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


class BaseLayer(keras.layers.Layer):
    """A Keras layer whose inputs are looked at before Keras converts them.

    Keras and the frameworks would refuse strings, dicts, ragged and sparse tensors in
    words of their own, or only within some sublayer.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._warned = set()  # of what, once each

    @uncompiled
    def __call__(self, *args, **kwargs):
        positional = dict(zip(self._call_signature.parameters, args, strict=False))
        for name, x in {**positional, **kwargs}.items():
            check_dense(name, x)
            if not (x is None or hasattr(x, "shape")) and self._is_input(name, positional):
                to_array(name, x)
        return super().__call__(*args, **kwargs)

    def _is_input(self, name, positional):
        """Whether an argument must be a tensor: `build` gets its shape, or it came by position."""
        return name in positional or f"{name}_shape" in _shapes_of(type(self))


@functools.cache
def _shapes_of(kind):
    """The shapes that the `build` of a class of layers gets, by their names."""
    return frozenset(inspect.signature(kind.build).parameters)
