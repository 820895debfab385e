"""Layers that tell attention where things are."""

import math

import keras
from keras import initializers, ops

from sparse_attn.checks import check_bool, check_int, check_positive, check_tensor, received
from sparse_attn.layers.arguments import read_object
from sparse_attn.layers.base import BaseLayer
from sparse_attn.layers.saving import HasPolicies
from sparse_attn.reshaping import rearrange
from sparse_attn.scores import PositionBias, tensors_of
from sparse_attn.tensors import to_tensor, values_of
from sparse_attn.tracing import all_of, gather, on_one_axis, require, size_of, value_of


@keras.saving.register_keras_serializable(package="sparse_attn")
class PositionEmbedding(HasPolicies, BaseLayer):
    """A trained vector for each position, to be added to what stands there.

    An `Embedding` sublayer of the positions `start_index, start_index + 1, ...`.

    Args:
        sequence_length: how many positions have a vector, a positive int.
        initializer: of the vectors.
        add: whether the layer returns the sum of its input and the vectors. Unlike
            `x + y` of symbols, it keeps the Keras mask, as `keras.layers.add` does.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        inputs: `(b, n, features)`; only its shape matters, unless `add`.
        start_index: the position of the first of them, a non-negative int, or an
            int tensor such as the number of positions generated so far.

    Returns:
        `(b, n, features)`: the vectors, the same for each row of the batch; with `add`
        the sum.

    Raises:
        TypeError, ValueError: for an argument that is not as said above, and for
            positions beyond `sequence_length`. Where these are not known before,
            TensorFlow raises its own error while it runs; with XLA, and compiled or
            exported from JAX, all of the output is NaN.

    References:
        - [BERT, Devlin et al., 2018](https://arxiv.org/abs/1810.04805)

    Example:

    >>> import keras
    >>> from sparse_attn.layers import PositionEmbedding
    >>> x = keras.ops.ones((2, 10, 8))
    >>> tuple(PositionEmbedding(100)(x).shape)
    (2, 10, 8)
    >>> tokens = keras.Input((None,), dtype="int32")
    >>> x = keras.layers.Embedding(256, 8, mask_zero=True)(tokens)
    >>> x = PositionEmbedding(100, add=True)(x)  # or keras.layers.add; `+` drops the mask
    """

    def __init__(self, sequence_length, initializer="glorot_uniform", add=False, **kwargs):
        super().__init__(**kwargs)
        self.add = check_bool("add", add)
        self.supports_masking = True
        self.sequence_length = check_int("sequence_length", sequence_length, minimum=1)
        self.initializer = read_object(initializers, "initializer", initializer)

    def build(self, inputs_shape=None):
        _check_rank(inputs_shape)
        self.embedding = keras.layers.Embedding(
            self.sequence_length,
            inputs_shape[-1],
            embeddings_initializer=self.initializer,
            **self.computing("embedding"),
            name="embedding",
        )
        self.embedding.build(inputs_shape[:-1])

    def _check(self, inputs, start_index):
        _check_rank(
            getattr(inputs, "shape", None), self.embedding.output_dim if self.built else None
        )
        return _check_start(start_index, inputs.shape[1], self.sequence_length)

    def call(self, inputs, start_index=0):
        start_index = self._check(inputs, start_index)
        positions, last = _positions(inputs, start_index), self.sequence_length - 1
        # Beyond the end frameworks would give NaN, the last vector or an error of their own.
        found = self.embedding(ops.clip(positions, 0, last))[None]
        found = ops.broadcast_to(found, ops.shape(inputs))
        found = ops.cast(inputs, found.dtype) + found if self.add else found
        if isinstance(start_index, int) and isinstance(inputs.shape[1], int):
            return found
        told = f"The positions must lie within `sequence_length`, {self.sequence_length}."
        return require(found, all_of((positions >= 0) & (positions <= last)), told)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def compute_output_spec(self, inputs, start_index=0):
        self._check(inputs, start_index)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        config = {
            **super().get_config(),
            "sequence_length": self.sequence_length,
            "initializer": initializers.serialize(self.initializer),
            "add": self.add,
        }
        return self.with_policies(config, *([self.embedding] if self.built else []))


@keras.saving.register_keras_serializable(package="sparse_attn")
class SinePositionEncoding(BaseLayer):
    """Sines and cosines of each position, to be added to what stands there.

    Feature `2 i` is `sin(position * w)` and feature `2 i + 1` is
    `cos(position * w)`, where `w = max_wavelength ** (-2 i / features)`.

    Args:
        max_wavelength: a positive number; the longest wave is `2 pi` times as
            long, in positions.
        add: whether the layer returns the sum of its input and the waves, with the
            Keras mask; see `PositionEmbedding`.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        inputs: `(b, n, features)`; only its shape matters, unless `add`.
        start_index: the position of the first of them, a non-negative int or an
            int tensor.

    Returns:
        `(b, n, features)`, the same for each row of the batch; with `add` the sum.

    Raises:
        TypeError, ValueError: for an argument that is not as said above.

    References:
        - [Attention Is All You Need, Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
    """

    def __init__(self, max_wavelength=10_000, add=False, **kwargs):
        super().__init__(**kwargs)
        self.add = check_bool("add", add)
        self.supports_masking = True
        self.max_wavelength = check_positive("max_wavelength", max_wavelength)

    def build(self, inputs_shape=None):
        _check_rank(inputs_shape)

    def call(self, inputs, start_index=0):
        _check_rank(getattr(inputs, "shape", None))
        features = inputs.shape[-1]
        positions = _positions(inputs, _check_start(start_index, inputs.shape[1]))
        angles = _angles(positions, (features + 1) // 2, features, self.max_wavelength)
        waves = ops.stack([ops.sin(angles), ops.cos(angles)], axis=-1)
        waves = ops.reshape(waves, (-1, 2 * angles.shape[-1]))[:, :features]
        waves = ops.cast(waves, self.compute_dtype)[None]
        if self.add:
            return ops.cast(inputs, self.compute_dtype) + waves
        return ops.broadcast_to(waves, ops.shape(inputs))

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def compute_output_spec(self, inputs, start_index=0):
        _check_rank(getattr(inputs, "shape", None))
        _check_start(start_index, inputs.shape[1])
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        config = {"max_wavelength": self.max_wavelength, "add": self.add}
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable(package="sparse_attn")
class RotaryEmbedding(BaseLayer):
    """Turns the features of queries and keys by angles that grow with the position.

    Feature `i` of the first half and feature `i` of the second are the two sides
    of a plane, which is turned by `position * max_wavelength ** (-2 i / d)`. The
    product of a query and a key then depends on how far apart they are. As the
    `rotary_embedding` of an attention layer it is applied to the queries and the
    keys of all heads; values are left as they are.

    Args:
        max_wavelength: a positive number.
        scaling_factor: a positive number by which positions are divided, for
            sequences longer than those of the training.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        inputs: `(b, n, h, d)` or `(b, n, d)`, `d` even.
        start_index: the position of the first, a non-negative int or an int tensor.
        positions: `(n,)` or `(b, n)` ints, in place of `start_index, start_index + 1, ...`.

    Returns:
        A tensor of the shape of `inputs`.

    Raises:
        TypeError, ValueError: for an argument that is not as said above.

    References:
        - [RoFormer, Su et al., 2021](https://arxiv.org/abs/2104.09864)

    Example:

    >>> from sparse_attn import Local
    >>> from sparse_attn.layers import RotaryEmbedding, SelfAttention
    >>> layer = SelfAttention(2, 16, Local(10), rotary_embedding=RotaryEmbedding())
    """

    def __init__(self, max_wavelength=10_000, scaling_factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.max_wavelength = check_positive("max_wavelength", max_wavelength)
        self.scaling_factor = check_positive("scaling_factor", scaling_factor)

    def build(self, inputs_shape=None):
        self._check_shape(inputs_shape)

    def _check_shape(self, inputs_shape):
        features = inputs_shape[-1] if inputs_shape else None
        if features is None or len(inputs_shape) not in (3, 4) or features % 2:
            raise ValueError(
                "`inputs` must have shape (batch, length, heads, features) or (batch, length, "
                f"features), an even number of features. Received: shape={inputs_shape}"
            )

    def _check(self, inputs, start_index, positions):
        shape = getattr(inputs, "shape", None)
        self._check_shape(shape)
        if positions is None:
            return _check_start(start_index, shape[1]), None
        return 0, _check_positions(positions, start_index, shape)

    def call(self, inputs, start_index=0, positions=None):
        inputs = to_tensor("inputs", inputs)
        start_index, positions = self._check(inputs, start_index, positions)
        features = inputs.shape[-1]
        positions = _positions(inputs, start_index) if positions is None else positions
        positions = ops.cast(positions, "float32") / self.scaling_factor
        angles = _angles(positions, features // 2, features, self.max_wavelength)
        if len(inputs.shape) == 4:  # the same for all heads
            angles = rearrange(angles, "... n w -> ... n 1 w")
        cos, sin = (ops.cast(x, inputs.dtype) for x in (ops.cos(angles), ops.sin(angles)))
        first, second = ops.split(inputs, 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return ops.concatenate(turned, axis=-1)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def compute_output_spec(self, inputs, start_index=0, positions=None):
        self._check(inputs, start_index, positions)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "max_wavelength": self.max_wavelength,
            "scaling_factor": self.scaling_factor,
        }


@keras.saving.register_keras_serializable(package="sparse_attn")
class RelativePositionBias(HasPolicies, BaseLayer, PositionBias):
    """A trained number for each head and distance, added to the scores, as in T5.

    An `Embedding` sublayer of buckets of distances: one for each short distance,
    and beyond these wider and wider ones, the last for `max_distance` and more.
    Give it to an attention layer or to `sparse_attention` as `score_mod`; it is
    worked out at the pairs that are scored, and no others. Layers may share one, as
    those of T5 do: a `.keras` file keeps it one, while `clone_model` and
    `model_from_json` give each layer one of its own.

    Args:
        num_heads: a positive int, that of the queries.
        num_buckets: an int of at least 2; 4 where `bidirectional`.
        max_distance: an int, more than the distances with a bucket of their own.
        bidirectional: whether keys ahead of a query have half of the buckets; if
            not, they all have that of distance 0, as behind a causal pattern.
        embeddings_initializer: of the numbers.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        q_pos: `(n,)` ints, positions of queries.
        k_pos: `(m,)` ints, positions of keys.

    Returns:
        The `(num_heads, n, m)` biases, to look at.

    Raises:
        TypeError, ValueError: for an argument that is not as said above.

    References:
        - [T5, Raffel et al., 2019](https://arxiv.org/abs/1910.10683)

    Example:

    >>> from sparse_attn import Local
    >>> from sparse_attn.layers import RelativePositionBias, SelfAttention
    >>> layer = SelfAttention(2, 16, Local(10), score_mod=RelativePositionBias(2))
    """

    by_distance = True
    defined_everywhere = True

    def __init__(
        self,
        num_heads,
        num_buckets=32,
        max_distance=128,
        bidirectional=True,
        embeddings_initializer="uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = check_int("num_heads", num_heads, minimum=1)
        self.bidirectional = check_bool("bidirectional", bidirectional)
        self.num_buckets = check_int("num_buckets", num_buckets, 4 if bidirectional else 2)
        self.max_distance = check_int("max_distance", max_distance, minimum=1)
        if self.max_distance <= self._exact:
            requirement = f"more than {self._exact}, the distances with a bucket of their own"
            raise ValueError(received("max_distance", requirement, max_distance))
        self.embeddings_initializer = read_object(
            initializers, "embeddings_initializer", embeddings_initializer
        )

    @property
    def _one_sided(self):
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    @property
    def _exact(self):
        return self._one_sided // 2

    def build(self, q_pos_shape=None, k_pos_shape=None):
        self.embedding = keras.layers.Embedding(
            self.num_buckets,
            self.num_heads,
            embeddings_initializer=self.embeddings_initializer,
            **self.computing("embedding"),
            name="embedding",
        )
        self.embedding.build((None,))
        self.built = True

    @property
    def tensors(self):
        """The table `(num_buckets, num_heads)`, alone in a tuple."""
        if not self.built:
            self.build()
        if self.embedding.quantization_mode is None:
            return (self.embedding.embeddings,)
        return (self.embedding(ops.arange(self.num_buckets, dtype="int32")),)

    def buckets(self, distance):
        """The buckets of distances `k_pos - q_pos`, ints of the same shape."""
        far = ops.abs(distance) if self.bidirectional else ops.maximum(-distance, 0)
        wide, exact = self._one_sided, self._exact
        ratio = ops.cast(ops.maximum(far, exact), "float32") / exact
        steps = ops.log(ratio) / math.log(self.max_distance / exact) * (wide - exact)
        beyond = ops.minimum(exact + ops.cast(steps, "int32"), wide - 1)
        bucket = ops.where(far < exact, far, beyond)
        return ops.where(distance > 0, bucket + wide, bucket) if self.bidirectional else bucket

    def bias(self, q_pos, k_pos, head, table):
        place = on_one_axis(self.buckets, k_pos - q_pos) * self.num_heads + head
        return gather(ops.reshape(table, (-1,)), place, axis=0)

    def call(self, q_pos, k_pos):
        heads = ops.arange(self.num_heads, dtype="int32")[:, None, None]
        pair = {"q_pos": q_pos, "k_pos": k_pos}
        for name, x in pair.items():
            if not hasattr(x, "shape"):
                raise TypeError(received(name, "a tensor of ints", x))
            pair[name] = check_tensor(name, to_tensor(name, x, "ints"), "int", (None,))
        q_pos, k_pos = (ops.cast(x, "int32") for x in pair.values())
        return self.bias(q_pos[:, None], k_pos[None, :], heads, *tensors_of([self])[0])

    def compute_output_shape(self, q_pos_shape, k_pos_shape):
        return (self.num_heads, q_pos_shape[0], k_pos_shape[0])

    def get_config(self):
        config = {
            **super().get_config(),
            "num_heads": self.num_heads,
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "bidirectional": self.bidirectional,
            "embeddings_initializer": initializers.serialize(self.embeddings_initializer),
        }
        return self.with_policies(config, *([self.embedding] if self.built else []))


def _check_rank(shape, features=None):
    """Refuse inputs of another rank, or of other features than those of the layer, if any."""
    if shape is None:
        raise TypeError(received("inputs", "a tensor (batch, length, features)", None))
    if len(shape) != 3 or shape[-1] is None or features not in (None, shape[-1]):
        told = "features known" if features is None else f"with {features} features"
        raise ValueError(
            f"`inputs` must have shape (batch, length, features), {told}. "
            f"Received: shape={tuple(shape)}"
        )


def _check_start(start_index, length=None, limit=None):
    """The argument as an int or an int32 tensor; an int, or a tensor at hand, is looked at."""
    start_index = known = values_of(start_index)
    if isinstance(start_index, keras.KerasTensor) or ops.is_tensor(start_index):
        check_tensor("start_index", start_index, "int", ())
        known = value_of(start_index)
        if known is None:
            return start_index
    known = check_int("start_index", known, minimum=0)
    last = known + (length if isinstance(length, int) else 1)
    if limit is not None and last > limit:
        raise ValueError(
            f"The positions must lie within `sequence_length`, {limit}. "
            f"Received: start_index={known}, length={length}"
        )
    if last > 2**31:
        requirement = "in [0, 2**31), up to the last position"
        raise ValueError(received("start_index", requirement, known))
    return start_index if ops.is_tensor(start_index) else known


def _check_positions(positions, start_index, shape):
    if not isinstance(start_index, int) or start_index:
        raise ValueError(received("start_index", "0 where there are `positions`", start_index))
    if not isinstance(positions, keras.KerasTensor):
        positions = to_tensor("positions", positions, "ints")
    return check_tensor("positions", positions, "int", (shape[1],), (shape[0], shape[1]))


def _positions(inputs, start_index):
    return ops.arange(size_of(inputs, 1), dtype="int32") + ops.cast(start_index, "int32")


def _angles(positions, waves, features, max_wavelength):
    """`(..., n, waves)`: how far each wave has come at each of `(..., n)` positions."""
    exponents = ops.arange(waves, dtype="float32") * (2 / features)
    return ops.cast(positions, "float32")[..., None] * max_wavelength**-exponents
