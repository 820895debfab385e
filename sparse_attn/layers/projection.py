"""The Dense layer that attention layers are made of."""

import keras
import numpy as np
from keras import ops


class Projection(keras.layers.Dense):
    """A Dense layer whose weights may also come as those of an `EinsumDense` of Keras.

    There, in a Keras attention layer, a kernel has an axis for the heads,
    `(features, heads, dim)` or `(heads, dim, *features)`, and a bias may have one too. Here
    they are one. Files are written in Keras' shapes, which tell the number of heads.

    Args:
        in_axes: the axes that Keras' kernel has in place of the features of the inputs, a
            tuple of ints; `None` for these.
        out_axes: likewise of the outputs, a tuple of ints.
        **kwargs: as for `Dense`, without `units`.
    """

    def __init__(self, in_axes, out_axes, **kwargs):
        super().__init__(int(np.prod(out_axes)), **kwargs)
        self._in_axes, self._out_axes = in_axes, out_axes
        # Why weights of a file were refused: Keras looks for them at all attributes that hold
        # this layer, and reports what it met at the last, where there are none.
        self._refusal = None

    @property
    def shapes(self):
        """For the kernel and the bias, if there is one, a variable and its shape in Keras."""
        in_axes = self._kernel.shape[:1] if self._in_axes is None else self._in_axes
        found = [(self._kernel, (*in_axes, *self._out_axes))]
        return found if self.bias is None else [*found, (self.bias, tuple(self._out_axes))]

    def save_own_variables(self, store):
        if not self.built or self.quantization_mode is not None:
            super().save_own_variables(store)
            return
        own = {}
        super().save_own_variables(own)
        for (name, value), (_, shape) in zip(own.items(), self.shapes, strict=True):
            store[name] = ops.reshape(value, shape)

    def load_own_variables(self, store):
        if self.built and self.quantization_mode is None:
            store = {name: store[name] for name in store.keys()}  # noqa: SIM118
            if self._refusal and not store:
                raise ValueError(self._refusal)
            try:
                for name, (variable, shape) in zip("01", self.shapes, strict=False):
                    if name in store:
                        store[name] = as_own(store[name], variable, shape)
            except ValueError as error:
                self._refusal = str(error)
                raise
        super().load_own_variables(store)
        self._refusal = None

    def quantize(self, mode=None, type_check=True, **how):
        type_check = type_check and type(self) is not Projection
        super().quantize(mode, type_check=type_check, **how)


def as_own(value, variable, shape):
    """The value of a variable in its own shape, given in that or in Keras' `shape`."""
    found, own = tuple(np.shape(value)), tuple(variable.shape)
    if found not in (own, shape):
        wanted = " or ".join(map(str, dict.fromkeys([own, shape])))
        raise ValueError(
            f"The weight {variable.path!r} must have shape {wanted}; no other shape of as many "
            f"numbers is taken for it. Received: shape={found}"
        )
    return value if found == own else ops.reshape(ops.convert_to_tensor(value), own)
