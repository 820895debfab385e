"""The Dense layer that attention layers are made of."""

import math

import keras
from keras import ops


class Projection(keras.layers.Dense):
    """A Dense layer that loads what an `EinsumDense` of a Keras attention layer has saved.

    There a kernel has an axis for the heads, `(features, heads, dim)` or
    `(heads, dim, features)`. Here the two are one.
    """

    def load_own_variables(self, store):
        if self.built and self.quantization_mode is None:
            store = {name: store[name] for name in store.keys()}  # noqa: SIM118
            own = [x for x in (self._kernel, self.bias) if x is not None]
            for name, variable in zip(map(str, range(len(own))), own, strict=True):
                if name in store:
                    store[name] = as_shaped(store[name], variable.shape)
        super().load_own_variables(store)

    def quantize(self, mode=None, type_check=True, **how):
        type_check = type_check and type(self) is not Projection
        super().quantize(mode, type_check=type_check, **how)


def as_shaped(value, shape):
    """An array in a shape that holds as many numbers; as it is where it has not as many."""
    fits = math.prod(value.shape) == math.prod(shape)
    return ops.reshape(ops.convert_to_tensor(value), shape) if fits else value
