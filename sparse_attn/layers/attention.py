"""What all attention layers are: Dense layers around one function."""

import math

import keras
from keras import constraints, initializers, ops, regularizers

from sparse_attn.checks import check_bool, check_int, check_rate, check_tensor, received, takes
from sparse_attn.functional import attention_weights, check_segments, sparse_attention
from sparse_attn.layers.arguments import (
    read_features,
    read_layer,
    read_object,
    read_pattern,
    read_score_mod,
    read_window,
    save_score_mod,
)
from sparse_attn.layers.projection import Projection, as_shaped
from sparse_attn.layers.saving import HasPolicies, save_pattern, save_shared
from sparse_attn.masking import zero_masked
from sparse_attn.patterns import Causal, Full, Local, PerHead
from sparse_attn.reshaping import rearrange
from sparse_attn.stream import MAX_SCORE_BYTES
from sparse_attn.tensors import to_tensor
from sparse_attn.tracing import size_of, uncompiled


class Attention(HasPolicies, keras.layers.Layer):
    """Attention of `num_heads` heads of queries over `key_heads` heads of keys and values.

    Inputs may have several axes between the batch and the features, such as
    the rows and columns of an image: positions are counted through all of
    them, row by row.
    """

    def __init__(
        self,
        num_heads,
        key_heads,
        key_dim,
        value_dim,
        output_shape,
        /,
        *,
        pattern=None,
        score_mod=None,
        rotary_embedding=None,
        dropout=0.0,
        use_bias=True,
        sliding_window=None,
        flash_attention=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        use_gate=False,
        seed=None,
        max_score_bytes=MAX_SCORE_BYTES,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self._widths = {}  # the features of each input, once they are known
        self._num_heads, self._key_heads = num_heads, key_heads
        self._key_dim, self._value_dim = key_dim, value_dim
        self._given_pattern = read_pattern(pattern)
        self._sliding_window = read_window(sliding_window)
        self.pattern = self._given_pattern
        if sliding_window is not None:
            window = Local(self._sliding_window - 1)
            self.pattern = window if self.pattern == Full() else window & self.pattern
        if isinstance(self.pattern, PerHead):
            self.pattern.groups(num_heads)  # as many heads as it can share out
        self.score_mod = read_score_mod(score_mod, num_heads)
        self.rotary_embedding = read_layer("rotary_embedding", rotary_embedding)
        self.dropout = check_rate("dropout", dropout)
        self.use_bias = check_bool("use_bias", use_bias)
        self.use_gate = check_bool("use_gate", use_gate)
        self._output_features = read_features(output_shape)
        if flash_attention is not None and check_bool("flash_attention", flash_attention):
            raise ValueError(
                "`flash_attention` must be None or False: there is no fused kernel for patterns, "
                "on any backend; tiles are small without one. Received: flash_attention=True"
            )
        self.kernel_initializer = read_object(
            initializers, "kernel_initializer", kernel_initializer
        )
        self.bias_initializer = read_object(initializers, "bias_initializer", bias_initializer)
        self.kernel_regularizer = read_object(
            regularizers, "kernel_regularizer", kernel_regularizer
        )
        self.bias_regularizer = read_object(regularizers, "bias_regularizer", bias_regularizer)
        # Of the sublayers, as in Keras' own layers, and not of this one.
        self.sublayer_activity_regularizer = read_object(
            regularizers, "activity_regularizer", activity_regularizer
        )
        self.kernel_constraint = read_object(constraints, "kernel_constraint", kernel_constraint)
        self.bias_constraint = read_object(constraints, "bias_constraint", bias_constraint)
        self.seed = None if seed is None else check_int("seed", seed)
        self.max_score_bytes = check_int("max_score_bytes", max_score_bytes, minimum=0)

    @property
    def sliding_window(self):
        return self._sliding_window

    # Keras saves weights by the names of attributes, public ones first: these are those of its
    # own attention layers, so that their files can be loaded.

    @property
    def query_dense(self):
        """The `Dense` layer that projects queries."""
        return self._query_dense

    @property
    def key_dense(self):
        """The `Dense` layer that projects keys."""
        return self._key_dense

    @property
    def value_dense(self):
        """The `Dense` layer that projects values."""
        return self._value_dense

    @property
    def output_dense(self):
        """The `Dense` layer that projects what the heads give."""
        return self._output_dense

    def build(self, query_shape=None, value_shape=None, key_shape=None):
        key_shape = value_shape if key_shape is None else key_shape
        self._check_shapes(query_shape, value_shape, key_shape)
        shapes = {"query": query_shape, "value": value_shape, "key": key_shape}
        self._widths = {name: shape[-1] for name, shape in shapes.items()}
        value_width = self._num_heads * self._value_dim
        features = math.prod(self._features_of(query_shape))
        self._query_dense = self._dense(self._num_heads * self._key_dim, "query", query_shape)
        self._key_dense = self._dense(self._key_heads * self._key_dim, "key", key_shape)
        if self.use_gate:
            self._gate_dense = self._dense(value_width, "gate", query_shape, activation="sigmoid")
        self._value_dense = self._dense(self._key_heads * self._value_dim, "value", value_shape)
        inner_shape = (*query_shape[:-1], value_width)
        self._output_dense = self._dense(features, "attention_output", inner_shape)
        if self.dropout:  # a layer for the sake of its generator, as in Keras' own layers
            self._dropout_layer = keras.layers.Dropout(self.dropout, seed=self.seed)
        for mod in _as_list(self.score_mod):
            if isinstance(mod, keras.layers.Layer) and not mod.built and takes(mod.build, 0):
                mod.build()
        rotary = self.rotary_embedding
        if rotary is not None and not rotary.built:
            rotary.build((*query_shape[:1], None, self._num_heads, self._key_dim))

    def _dense(self, units, name, shape, activation=None):
        layer = Projection(
            units,
            activation=activation,
            use_bias=self.use_bias,
            # A fresh initializer each: one instance would give equal weights.
            kernel_initializer=_copy(self.kernel_initializer),
            bias_initializer=_copy(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            activity_regularizer=self.sublayer_activity_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            **self.computing(name),
            name=name,
        )
        layer.build(shape)
        return layer

    def set_weights(self, weights):
        """Set the weights from arrays, which may have the shapes of Keras' attention layers."""
        own = self.weights
        if len(weights) == len(own):
            weights = [as_shaped(x, y.shape) for x, y in zip(weights, own, strict=True)]
        super().set_weights(weights)

    @uncompiled
    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        segment_ids=None,
    ):
        flags = {"use_causal_mask": use_causal_mask}
        flags["return_attention_scores"] = return_attention_scores
        masks = query_mask, value_mask, key_mask, attention_mask
        key, masks, segment_ids = self._read(query, value, key, masks, segment_ids, flags)
        q_axes, k_axes = ops.shape(query)[1:-1], ops.shape(key)[1:-1]
        known = query.shape[:-1]
        *rows, attention_mask = masks
        query_mask, value_mask, key_mask = (
            _flat_positions(mask, x) for mask, x in zip(rows, (query, value, key), strict=True)
        )
        query, key, value = (rearrange(x, "b ... d -> b (...) d") for x in (query, key, value))
        key_mask = both(key_mask, value_mask)
        pattern = Causal() & self.pattern if use_causal_mask else self.pattern
        options = {
            "query_mask": query_mask,
            "key_mask": key_mask,
            "attention_mask": self._flat_pairs(attention_mask, q_axes, k_axes),
            "segment_ids": segment_ids,
            "score_mod": self.score_mod,
        }
        # Zeros first: NaN in padding would reach the kernels' gradients.
        query = zero_masked(query, query_mask)
        key, value = zero_masked(key, key_mask), zero_masked(value, key_mask)
        q = _by_heads(self._query_dense(query), query, self._num_heads)
        k = _by_heads(self._key_dense(key), key, self._key_heads)
        v = _by_heads(self._value_dense(value), value, self._key_heads)
        if self.rotary_embedding is not None:
            q, k = self._turned(q), self._turned(k)
        q, k, v = (ops.cast(x, self.compute_dtype) for x in (q, k, v))  # each has its own policy
        own = {"max_score_bytes": self.max_score_bytes}
        if self.dropout and training:
            own |= {"dropout": self.dropout, "seed": self._dropout_layer.seed_generator}
        out = rearrange(
            sparse_attention(q, k, v, pattern, **options, **own), "b n h e -> b n (h e)"
        )
        if self.use_gate:
            out = out * self._gate_dense(query)
        out = self._output_dense(out)
        batch = size_of(out, 0)
        features = self._features_of((*known, query.shape[-1]))
        if len(q_axes) > 1 or len(features) > 1:
            out = ops.reshape(out, (batch, *q_axes, *features))
        if not return_attention_scores:
            return out
        weights = attention_weights(q, k, pattern, **options)
        if len(q_axes) > 1 or len(k_axes) > 1:
            weights = ops.reshape(weights, (batch, self._num_heads, *q_axes, *k_axes))
        return out, weights

    def _turned(self, x):
        found = self.rotary_embedding(x)
        pairs = list(zip(found.shape, x.shape, strict=False))
        if len(found.shape) != 4 or any(None not in pair and pair[0] != pair[1] for pair in pairs):
            raise ValueError(
                "`rotary_embedding` must give tensors of the shape that it gets, "
                f"{tuple(x.shape)}. Received: {tuple(found.shape)}"
            )
        return found

    def _flat_pairs(self, mask, q_axes, k_axes):
        """The mask of pairs as `(n, m)`, `(b|1, n, m)` or `(b|1, h|1, n, m)`."""
        if mask is None or len(q_axes) == len(k_axes) == 1:
            return mask
        lead = ops.shape(mask)[: len(mask.shape) - len(q_axes) - len(k_axes)]
        mask = ops.broadcast_to(mask, (*lead, *q_axes, *k_axes))
        return ops.reshape(mask, (*lead, _product(q_axes), _product(k_axes)))

    def _read(self, query, value, key, masks, segment_ids, flags):
        """What a call was given, of numbers or symbols: `key`, the masks as bools, segments."""
        key = value if key is None else key
        for name, flag in flags.items():
            if isinstance(flag, str):  # Keras takes ints too
                raise TypeError(received(name, "True or False", flag))
        self._check_shapes(*(getattr(x, "shape", None) for x in (query, value, key)))
        of_query, of_value, of_key = (x.shape[:-1] for x in (query, value, key))
        query_mask, value_mask, key_mask, attention_mask = masks
        masks = (
            read_mask("query_mask", query_mask, of_positions(of_query)),
            read_mask("value_mask", value_mask, of_positions(of_value)),
            read_mask("key_mask", key_mask, of_positions(of_key)),
            read_mask("attention_mask", attention_mask, *self._mask_shapes(of_query, of_key)),
        )
        sizes = (query.shape[0], *(_length((*shape, 1)) for shape in (of_query, of_key)))
        return key, masks, check_segments(segment_ids, *sizes, symbols=True)

    def _mask_shapes(self, q_shape, k_shape):
        pairs = tuple((1, size) for size in (*q_shape[1:], *k_shape[1:]))
        batch, heads = (1, q_shape[0]), (1, self._num_heads)
        return pairs, (batch, *pairs), (batch, heads, *pairs)

    def _features_of(self, query_shape):
        return (query_shape[-1],) if self._output_features is None else self._output_features

    def _check_shapes(self, query_shape, value_shape, key_shape):
        for name, shape in (("query", query_shape), ("value", value_shape), ("key", key_shape)):
            if shape is None:
                raise TypeError(received(name, "a tensor (batch, length, features)", None))
        of_key, of_value = tuple(key_shape[1:-1]), tuple(value_shape[1:-1])
        same = len(of_key) == len(of_value) and all(
            None in pair or pair[0] == pair[1] for pair in zip(of_key, of_value, strict=True)
        )
        if not same:
            raise ValueError(
                "The lengths of `key` and `value` must be equal. "
                f"Received: key shape={tuple(key_shape)}, value shape={tuple(value_shape)}"
            )
        for name, shape in (("query", query_shape), ("value", value_shape), ("key", key_shape)):
            if len(shape) < 3 or shape[-1] is None:
                requirement = "(batch, length, features), features known"
                raise ValueError(
                    f"`{name}` must have shape {requirement}. Received: shape={tuple(shape)}"
                )
            if shape[-1] != self._widths.get(name, shape[-1]):
                raise ValueError(
                    f"`{name}` must have the features that the layer was built for, "
                    f"{self._widths[name]}. Received: shape={tuple(shape)}"
                )
            if None not in (shape[0], query_shape[0]) and shape[0] != query_shape[0]:
                raise ValueError(
                    f"`{name}` must have the batch size of `query`, {query_shape[0]}. "
                    f"Received: shape={tuple(shape)}"
                )
        self.pattern.check_lengths(*map(_length, (query_shape, key_shape)))

    def compute_mask(self, query, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        self._check_shapes(query_shape, value_shape, key_shape or value_shape)
        return (*query_shape[:-1], *self._features_of(query_shape))

    def compute_output_spec(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        segment_ids=None,
    ):
        flags = {"use_causal_mask": use_causal_mask}
        flags["return_attention_scores"] = return_attention_scores
        masks = query_mask, value_mask, key_mask, attention_mask
        key, *_ = self._read(query, value, key, masks, segment_ids, flags)
        shape = (*query.shape[:-1], *self._features_of(query.shape))
        out = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return out
        pairs = (query.shape[0], self._num_heads, *query.shape[1:-1], *key.shape[1:-1])
        return out, keras.KerasTensor(pairs, dtype=self.compute_dtype)

    def get_config(self):
        output_shape = self._output_features
        if output_shape is not None:
            output_shape = output_shape[0] if len(output_shape) == 1 else list(output_shape)
        config = {
            **super().get_config(),
            "pattern": save_pattern(self._given_pattern),
            "score_mod": save_score_mod(self.score_mod),
            "rotary_embedding": save_shared(self.rotary_embedding),
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "output_shape": output_shape,
            "sliding_window": self._sliding_window,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": regularizers.serialize(self.sublayer_activity_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
            "use_gate": self.use_gate,
            "seed": self.seed,
            "max_score_bytes": self.max_score_bytes,
        }
        if not self.built:
            return self.with_policies(config)
        own = [self._query_dense, self._key_dense, self._value_dense, self._output_dense]
        own += [self._gate_dense] if self.use_gate else []
        return self.with_policies(config, *own)


def _by_heads(x, like, heads):
    """`(b, n, (h d))` to `(b, n, h, d)`, where `b` and `n` are those of `like`.

    An exporter to ONNX, asked for the sizes of a product itself, answers with
    those of the matrix that TensorFlow makes of it, `((b n), (h d))`.
    """
    batch, n = size_of(like, 0), size_of(like, 1)
    return ops.reshape(x, (batch, n, heads, x.shape[-1] // heads))


def _as_list(score_mod):
    return score_mod if isinstance(score_mod, (list, tuple)) else [score_mod]


def read_mask(name, mask, *shapes):
    """A mask of one of these shapes, of numbers or symbols, as one of bools; `None` passes."""
    if mask is None:
        return None
    if isinstance(mask, keras.KerasTensor):
        mask = keras.KerasTensor(mask.shape, "bool")
    else:
        mask = ops.cast(to_tensor(name, mask, "a mask of bools or numbers"), "bool")
    return check_tensor(name, mask, "bool", *shapes)


def of_positions(shape):
    """The shape of a mask of positions `(b, ...)`: all rows may have the same."""
    return ((1, shape[0]), *shape[1:])


def _flat_positions(mask, like):
    """`(b|1, ...)` as the `(b, n)` of these inputs."""
    if mask is None:
        return None
    return rearrange(ops.broadcast_to(mask, ops.shape(like)[:-1]), "b ... -> b (...)")


def both(first, second):
    """What two masks allow, of which each may be `None`."""
    if first is None or second is None or first is second:
        return second if first is None else first
    return first & second


def _length(shape):
    """The number of positions of inputs of a shape, or `None` while it is unknown."""
    sizes = shape[1:-1]  # JAX exports unknown ones by names, which nothing can be compared with
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _product(sizes):
    total = sizes[0]
    for size in sizes[1:]:
        total = total * size
    return total


def _copy(initializer):
    if not isinstance(initializer, initializers.Initializer):
        return initializer  # a plain function
    return initializer.__class__.from_config(initializer.get_config())
