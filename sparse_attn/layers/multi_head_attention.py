"""Multi-head attention over a pattern: four Dense layers around one function."""

import math

import keras
from einops import rearrange
from keras import constraints, initializers, regularizers
from keras.layers import Dense

from sparse_attn.checks import check_bool, check_int, check_rate, received
from sparse_attn.functional import attention_weights, sparse_attention
from sparse_attn.masking import check_mask, zero_masked
from sparse_attn.patterns import Causal, Full, check_pattern
from sparse_attn.stream import MAX_SCORE_BYTES


@keras.saving.register_keras_serializable(package="sparse_attn")
class MultiHeadAttention(keras.layers.Layer):
    """Multi-head attention whose pairs of positions a pattern chooses.

    Queries, keys and values are projected by `Dense` sublayers (`query`,
    `key`, `value`), attend over the pairs of the pattern, and are projected
    back (`attention_output`). Time and memory follow the pattern.

    Keras masks are picked up and passed on: padded positions are not attended
    to, and what they hold does not matter. A position with nothing to attend
    to gives 0 before the last projection.

    Args:
        num_heads: number of heads, a positive int.
        key_dim: features of a head's queries and keys, a positive int.
        pattern: a `Pattern`; `Full()` by default.
        value_dim: features of a head's values, `key_dim` by default.
        dropout: the share of attention weights to drop in training, in [0, 1).
        use_bias: whether the Dense sublayers have biases.
        output_shape: features of the output, an int or a tuple of ints; those
            of the query by default.
        kernel_initializer, bias_initializer: of the Dense sublayers.
        kernel_regularizer, bias_regularizer, activity_regularizer: likewise.
        kernel_constraint, bias_constraint: likewise.
        seed: an int, for dropout.
        max_score_bytes: an int: if the scores of this layer take more, they are
            not kept for the backward pass but worked out again. See
            `sparse_attention`, also for an unknown length or batch.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        query: `(b, n, features)`.
        value: `(b, m, features)`.
        key: `(b, m, features)`, `value` by default.
        query_mask: `(b, n)` bools, True = valid; Keras fills it in.
        value_mask, key_mask: `(b, m)` bools, True = valid; Keras fills them in.
        attention_mask: `(n, m)`, `(b|1, n, m)` or `(b|1, h|1, n, m)` bools, True
            = may be attended; of size n * m by nature, prefer a pattern.
        return_attention_scores: whether to return the weights too. They are
            `(b, h, n, m)`: computed densely, whatever the pattern, and without
            dropout. The output is the same as without them.
        training: whether to apply dropout.
        use_causal_mask: whether to use `Causal() & pattern`.
        segment_ids: `(b, n)` ints, or a pair of them for queries and keys: only
            what has the same number may attend, as for several documents in
            one sequence.

    Returns:
        `(b, n, *output_shape)`, or a pair of it and the weights.

    Raises:
        TypeError, ValueError: for an argument that is not as said above; the
            message names it.

    References:
        - [Attention Is All You Need, Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)

    Example:

    >>> import numpy as np
    >>> from sparse_attn import Causal, Local
    >>> from sparse_attn.layers import MultiHeadAttention
    >>> layer = MultiHeadAttention(2, 16, pattern=Causal() & Local(10))
    >>> x = np.ones((1, 100, 32), "float32")
    >>> tuple(layer(x, x).shape)
    (1, 100, 32)
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        pattern=None,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        seed=None,
        max_score_bytes=MAX_SCORE_BYTES,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_heads = check_int("num_heads", num_heads, minimum=1)
        self.key_dim = check_int("key_dim", key_dim, minimum=1)
        self.pattern = read_pattern(pattern)
        self.value_dim = (
            self.key_dim if value_dim is None else check_int("value_dim", value_dim, minimum=1)
        )
        self.dropout = check_rate("dropout", dropout)
        self.use_bias = check_bool("use_bias", use_bias)
        self.output_features = _features(output_shape)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        # Of the sublayers, as in Keras' own layer, and not of this one.
        self.sublayer_activity_regularizer = regularizers.get(activity_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.seed = None if seed is None else check_int("seed", seed)
        self.max_score_bytes = check_int("max_score_bytes", max_score_bytes, minimum=0)
        if self.dropout:
            self.seed_generator = keras.random.SeedGenerator(self.seed)

    def build(self, query_shape, value_shape, key_shape=None):
        key_shape = value_shape if key_shape is None else key_shape
        self._check_shapes(query_shape, value_shape, key_shape)
        inner, value_inner = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        output_shape = self._output_features(query_shape)
        self.query_dense = self._dense(inner, "query")
        self.key_dense = self._dense(inner, "key")
        self.value_dense = self._dense(value_inner, "value")
        self.output_dense = self._dense(math.prod(output_shape), "attention_output")
        self.query_dense.build(query_shape)
        self.key_dense.build(key_shape)
        self.value_dense.build(value_shape)
        self.output_dense.build((*query_shape[:-1], value_inner))

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
        if key is None:
            key, key_mask = value, value_mask if key_mask is None else key_mask
        pattern = Causal() & self.pattern if use_causal_mask else self.pattern
        masks = {
            "query_mask": check_mask("query_mask", query_mask, query.shape[:2]),
            "key_mask": _both(
                check_mask("key_mask", key_mask, key.shape[:2]),
                check_mask("value_mask", value_mask, value.shape[:2]),
            ),
            "attention_mask": attention_mask,
            "segment_ids": segment_ids,
        }
        q = self._project(self.query_dense, query, masks["query_mask"])
        k = self._project(self.key_dense, key, masks["key_mask"])
        v = self._project(self.value_dense, value, masks["key_mask"])
        options = {"max_score_bytes": self.max_score_bytes}
        if self.dropout and training:
            options |= {"dropout": self.dropout, "seed": self.seed_generator}
        out = sparse_attention(q, k, v, pattern, **masks, **options)
        out = self.output_dense(rearrange(out, "b n h e -> b n (h e)"))
        features = self._output_features(query.shape)
        if len(features) > 1:
            out = keras.ops.reshape(out, (*keras.ops.shape(out)[:2], *features))
        if not return_attention_scores:
            return out
        return out, attention_weights(q, k, pattern, **masks)

    def _project(self, dense, x, mask):
        # Zeros first: NaN in padding would reach the kernel's gradient.
        return rearrange(dense(zero_masked(x, mask)), "b n (h d) -> b n h d", h=self.num_heads)

    def _dense(self, units, name):
        return Dense(
            units,
            use_bias=self.use_bias,
            # A fresh initializer each: one instance would give equal weights.
            kernel_initializer=_copy(self.kernel_initializer),
            bias_initializer=_copy(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            activity_regularizer=self.sublayer_activity_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            name=name,
        )

    def _output_features(self, query_shape):
        return (query_shape[-1],) if self.output_features is None else self.output_features

    def _check_shapes(self, query_shape, value_shape, key_shape):
        for name, shape in (
            ("query", query_shape),
            ("value", value_shape),
            ("key", key_shape),
        ):
            if len(shape) != 3 or shape[-1] is None:
                requirement = "(batch, length, features), features known"
                raise ValueError(
                    f"`{name}` must have shape {requirement}. Received: shape={tuple(shape)}"
                )
        for name, shape in (("value", value_shape), ("key", key_shape)):
            if None not in (shape[0], query_shape[0]) and shape[0] != query_shape[0]:
                raise ValueError(
                    f"`{name}` must have the batch size of `query`, {query_shape[0]}. "
                    f"Received: shape={tuple(shape)}"
                )
        if None not in (key_shape[1], value_shape[1]) and key_shape[1] != value_shape[1]:
            raise ValueError(
                f"`key` must be as long as `value`. "
                f"Received: key shape={tuple(key_shape)}, value shape={tuple(value_shape)}"
            )
        self.pattern.check_lengths(query_shape[1], key_shape[1])

    def compute_mask(self, query, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        self._check_shapes(query_shape, value_shape, key_shape or value_shape)
        return (*query_shape[:-1], *self._output_features(query_shape))

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
        key = value if key is None else key
        self._check_shapes(query.shape, value.shape, key.shape)
        (b, n), m = query.shape[:2], value.shape[1]
        check_mask("query_mask", query_mask, (b, n))
        check_mask("key_mask", key_mask, (b, m))
        check_mask("value_mask", value_mask, (b, m))
        pairs = ((n, m), ((1, b), n, m), ((1, b), (1, self.num_heads), n, m))
        check_mask("attention_mask", attention_mask, *pairs)
        features = self._output_features(query.shape)
        out = keras.KerasTensor((b, n, *features), dtype=self.compute_dtype)
        if not return_attention_scores:
            return out
        return out, keras.KerasTensor((b, self.num_heads, n, m), dtype=self.compute_dtype)

    def get_config(self):
        output_shape = self.output_features
        if output_shape is not None:
            output_shape = output_shape[0] if len(output_shape) == 1 else list(output_shape)
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "pattern": keras.saving.serialize_keras_object(self.pattern),
            "value_dim": self.value_dim,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "output_shape": output_shape,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": regularizers.serialize(self.sublayer_activity_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
            "seed": self.seed,
            "max_score_bytes": self.max_score_bytes,
        }


def read_pattern(pattern):
    """The pattern that a constructor was given: one, its config, or `None` for `Full()`."""
    if isinstance(pattern, dict):
        pattern = keras.saving.deserialize_keras_object(pattern)
    return check_pattern("pattern", Full() if pattern is None else pattern)


def _features(output_shape):
    if output_shape is None:
        return None
    if isinstance(output_shape, (tuple, list)) and output_shape:
        return tuple(check_int("output_shape", size, minimum=1) for size in output_shape)
    if isinstance(output_shape, (tuple, list)):
        raise ValueError(
            received("output_shape", "a positive int or a tuple of them", output_shape)
        )
    return (check_int("output_shape", output_shape, minimum=1),)


def _both(first, second):
    if first is None or second is None or first is second:
        return second if first is None else first
    return first & second


def _copy(initializer):
    if not isinstance(initializer, initializers.Initializer):
        return initializer  # a plain function
    return initializer.__class__.from_config(initializer.get_config())
