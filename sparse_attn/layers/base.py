"""What every layer of the package is: one that names an input which it cannot take."""

import keras

from sparse_attn.tensors import check_dense, to_array
from sparse_attn.tracing import uncompiled


class BaseLayer(keras.layers.Layer):
    """A Keras layer whose inputs are looked at before Keras converts them.

    Keras and the frameworks would refuse strings, ragged and sparse tensors in
    words of their own, or only within some sublayer.
    """

    @uncompiled
    def __call__(self, *args, **kwargs):
        positional = dict(zip(self._call_signature.parameters, args, strict=False))
        for name, x in {**positional, **kwargs}.items():
            if isinstance(x, (str, list, tuple)) and name in positional:
                to_array(name, x)
            check_dense(name, x)
        return super().__call__(*args, **kwargs)
