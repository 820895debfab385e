"""einops' `rearrange`, for graphs of TensorFlow that do not know all sizes yet.

There einops would take each unknown size out of the shape by itself, and
multiply and divide it, whether the axis is reshaped or not: half of a graph
would be such nodes. Here einops reckons with names of sizes instead, and the
graph gets what its reshapes need, the sizes all from one node.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import einops
from einops import array_api
from keras import ops

from sparse_attn.tracing import sizes_of


def rearrange(x, pattern, /, **lengths):
    """`einops.rearrange` of a tensor or an array; lengths of axes are ints or int tensors."""
    if None not in tuple(x.shape):
        return einops.rearrange(x, pattern, **lengths)
    names = {name: n if isinstance(n, int) else _Size(name) for name, n in lengths.items()}
    return array_api.rearrange(_Unsized(x, lengths), pattern, **names).tensor


@dataclass(frozen=True)
class _Size:
    """A size that is not known yet: a name, or what is worked out of others.

    einops keeps what it found for a shape as long as the process runs, so
    a size holds no tensor.
    """

    of: int | str | Callable
    parts: tuple = ()

    def __mul__(self, other):
        return self if other == 1 else _Size(operator.mul, (self, other))

    __rmul__ = __mul__

    def __floordiv__(self, other):
        return self if other == 1 else _Size(operator.floordiv, (self, other))

    def __rfloordiv__(self, other):
        return _Size(operator.floordiv, (other, self))

    def value(self, known):
        """The size as a tensor, `known` being those of the names."""
        if not self.parts:
            return known[self.of]
        parts = (x.value(known) if isinstance(x, _Size) else x for x in self.parts)
        return self.of(*parts)


class _Unsized:
    """A tensor as the array API has it, its own namespace; its sizes may be names."""

    def __init__(self, tensor, lengths):
        self.tensor, self._given, self._lengths = tensor, tensor, lengths
        self.shape = tuple(_Size(axis) if n is None else n for axis, n in enumerate(tensor.shape))
        self.ndim = len(self.shape)

    @functools.cached_property
    def _values(self):
        return {**dict(enumerate(sizes_of(self._given))), **self._lengths}

    def __array_namespace__(self):
        return self

    def reshape(self, _, shape):
        sizes = [n.value(self._values) if isinstance(n, _Size) else n for n in shape]
        self.tensor = ops.reshape(self.tensor, sizes)
        return self

    def permute_dims(self, _, axes):
        self.tensor = ops.transpose(self.tensor, axes)
        return self
