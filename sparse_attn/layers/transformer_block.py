"""A transformer block: attention and a feed-forward network, each with a residual."""

import keras
from keras import activations, initializers, ops

from sparse_attn.checks import check_bool, check_int, check_positive, check_rate, received
from sparse_attn.functional import check_segments
from sparse_attn.layers.arguments import (
    read_object,
    read_pattern,
    read_size,
    save_score_mod,
)
from sparse_attn.layers.attention import (
    are_flags,
    both,
    check_axes,
    copy_initializer,
    length_of,
    of_positions,
    read_mask,
    refuse_second_input,
)
from sparse_attn.layers.base import BaseLayer
from sparse_attn.layers.dropped_masks import warn_of_dropped_mask
from sparse_attn.layers.multi_head_attention import GroupedQueryAttention, MultiHeadAttention
from sparse_attn.layers.saving import HasPolicies, save_pattern, save_shared
from sparse_attn.masking import zero_masked
from sparse_attn.patterns import Causal
from sparse_attn.stream import MAX_SCORE_BYTES
from sparse_attn.tensors import to_tensor
from sparse_attn.tracing import require


@keras.saving.register_keras_serializable(package="sparse_attn")
class TransformerBlock(HasPolicies, BaseLayer):
    """Self-attention along the pairs of a pattern, and then a feed-forward network.

    With `norm_first`, and `drop` for dropout:

        x = x + drop(attention(norm(x)))
        x = x + drop(output(activation(hidden(norm(x)))))

    and without it `x = norm(x + drop(...))`, twice. It passes on the Keras mask, which
    `x + y` of symbols would drop, and what padded positions hold does not matter.

    Args:
        num_heads: number of heads, a positive int.
        key_dim: features of a head's queries, keys and values, a positive int.
        pattern: a `Pattern`; `Full()` for `None`.
        hidden_dim: features between the two layers of the feed-forward network, a
            positive int.
        causal: whether no position may attend to a later one; the pattern then is
            `Causal() & pattern`.
        norm_first: whether to normalise what goes into attention and the feed-forward
            network, and not the sums.
        activation: of the feed-forward network, as for `keras.layers.Dense`.
        dropout: the share of attention weights, and of what attention and the
            feed-forward network give, to drop in training, in [0, 1).
        epsilon: a positive number, that of the layer normalisations.
        num_key_value_heads: a positive int that divides `num_heads`: heads of keys and
            values, which are shared; `num_heads` by default.
        score_mod, rotary_embedding, use_bias, kernel_initializer, bias_initializer,
            max_score_bytes: as for `MultiHeadAttention`; biases and initializers are
            those of the feed-forward network too.
        seed: an int, for dropout.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        inputs: `(b, n, features)`, or with several axes of positions.
        mask, inputs_mask: `(b|1, n)`, True = valid; Keras fills in one of them. Where
            there are both, a position must be valid in both.
        attention_mask, segment_ids: as for `MultiHeadAttention`.
        training: whether to apply dropout.

    Returns:
        A tensor of the shape of `inputs`.

    Raises:
        TypeError, ValueError: for an argument that is not as said above; the
            message names it.

    References:
        - [Attention Is All You Need, Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
        - [On Layer Normalization in the Transformer Architecture, Xiong et al.,
          2020](https://arxiv.org/abs/2002.04745)

    Example:

    >>> import keras
    >>> from sparse_attn import Local, Prefix
    >>> from sparse_attn.layers import PositionEmbedding, TransformerBlock
    >>> tokens = keras.Input((None,), dtype="int32")
    >>> x = keras.layers.Embedding(256, 32, mask_zero=True)(tokens)
    >>> x = PositionEmbedding(1000, add=True)(x)
    >>> for _ in range(2):
    ...     x = TransformerBlock(2, 16, Local(10) | Prefix(4), 64, causal=True)(x)
    >>> model = keras.Model(tokens, keras.layers.Dense(256)(x))
    >>> tuple(model(keras.ops.ones((1, 100), "int32")).shape)
    (1, 100, 256)
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        pattern,
        hidden_dim,
        causal=False,
        norm_first=True,
        activation="gelu",
        dropout=0.0,
        epsilon=1e-5,
        num_key_value_heads=None,
        score_mod=None,
        rotary_embedding=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        seed=None,
        max_score_bytes=MAX_SCORE_BYTES,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.hidden_dim = read_size("hidden_dim", hidden_dim)
        self.causal = check_bool("causal", causal)
        self.norm_first = check_bool("norm_first", norm_first)
        self.activation = read_object(activations, "activation", activation)
        self.dropout = check_rate("dropout", dropout)
        self.epsilon = check_positive("epsilon", epsilon)
        self.seed = None if seed is None else check_int("seed", seed)
        self._plain_pattern = read_pattern(pattern)
        self.num_key_value_heads = (
            None
            if num_key_value_heads is None
            else read_size("num_key_value_heads", num_key_value_heads)
        )
        options = {
            "pattern": Causal() & self._plain_pattern if self.causal else self._plain_pattern,
            "score_mod": score_mod,
            "rotary_embedding": rotary_embedding,
            "dropout": dropout,
            "use_bias": use_bias,
            "kernel_initializer": kernel_initializer,
            "bias_initializer": bias_initializer,
            "seed": seed,
            "max_score_bytes": max_score_bytes,
            "dtype": self.dtype_policy,
            "name": "attention",
        }
        if self.num_key_value_heads is None:
            self.attention = MultiHeadAttention(num_heads, key_dim, **options)
        else:
            sizes = read_size("key_dim", key_dim), read_size("num_heads", num_heads)
            if sizes[1] % self.num_key_value_heads:
                requirement = f"a divisor of `num_heads`, {sizes[1]}"
                raise ValueError(received("num_key_value_heads", requirement, num_key_value_heads))
            self.attention = GroupedQueryAttention(*sizes, self.num_key_value_heads, **options)
        self.attention._key_names = "inputs", "inputs"  # in messages
        self.attention._warned.add("dropped mask")  # the block does so, in its own name

    @property
    def num_heads(self):
        return self.attention._num_heads

    @property
    def key_dim(self):
        return self.attention._key_dim

    @property
    def pattern(self):
        """The pattern of its attention, with `Causal()` where it is `causal`."""
        return self.attention.pattern

    def build(self, inputs_shape=None):
        self._check_shape(inputs_shape)
        self.attention.build(inputs_shape, inputs_shape)
        self.attention_norm = self._norm("attention_norm", inputs_shape)
        self.feedforward_norm = self._norm("feedforward_norm", inputs_shape)
        self.feedforward_hidden = self._dense(
            "feedforward_hidden", self.hidden_dim, inputs_shape, self.activation
        )
        hidden_shape = (*inputs_shape[:-1], self.hidden_dim)
        self.feedforward_output = self._dense("feedforward_output", inputs_shape[-1], hidden_shape)
        # No two of the three dropouts of a block drop alike.
        seeds = [None if self.seed is None else self.seed + i for i in (1, 2)]
        self.dropouts = [
            keras.layers.Dropout(self.dropout, seed=seed, dtype=self.dtype_policy)
            for seed in (seeds if self.dropout else ())
        ]

    def _norm(self, name, shape):
        layer = keras.layers.LayerNormalization(
            epsilon=self.epsilon, **self.computing(name), name=name
        )
        layer.build(shape)
        return layer

    def _dense(self, name, units, shape, activation=None):
        layer = keras.layers.Dense(
            units,
            activation=activation,
            use_bias=self.attention.use_bias,
            # A fresh initializer each: one instance would give equal weights.
            kernel_initializer=copy_initializer(self.attention.kernel_initializer),
            bias_initializer=copy_initializer(self.attention.bias_initializer),
            **self.computing(name),
            name=name,
        )
        layer.build(shape)
        return layer

    def call(
        self,
        inputs,
        mask=None,
        inputs_mask=None,
        attention_mask=None,
        segment_ids=None,
        training=None,
    ):
        *masks, attention_mask, segment_ids, conditions = self._read(
            inputs, mask, inputs_mask, attention_mask, segment_ids
        )
        mask = both(*masks)
        masks = {"query_mask": mask, "value_mask": mask}
        pairs = {"attention_mask": attention_mask, "segment_ids": segment_ids}

        def attend(x):
            return self.attention(x, x, **masks, **pairs, training=training)

        def feed_forward(x):
            return self.feedforward_output(self.feedforward_hidden(x))

        # Zeros first: NaN in padding would reach the gradients of all weights.
        x = zero_masked(ops.cast(to_tensor("inputs", inputs), self.compute_dtype), mask)
        norms = self.attention_norm, self.feedforward_norm
        for number, (function, norm) in enumerate(zip((attend, feed_forward), norms, strict=True)):
            found = function(norm(x) if self.norm_first else x)
            if self.dropout:
                found = self.dropouts[number](found, training=training)
            x = x + ops.cast(found, self.compute_dtype)
            if not self.norm_first:
                x = ops.cast(norm(x), self.compute_dtype)
        for condition, told in conditions:
            x = require(x, condition, told)
        return x

    def _read(self, inputs, mask, inputs_mask, attention_mask, segment_ids):
        """The masks as bools, the segments, of numbers or symbols, and conditions: see `are_flags`.

        Its attention would refuse what is wrong as well, but in the name of another layer.
        """
        shape = getattr(inputs, "shape", None)
        self._check_shape(shape)
        refuse_second_input(self, shape, mask)
        check_axes("inputs", tuple(shape), self.pattern)
        axes, n = tuple(shape)[:-1], length_of(shape)
        segment_ids = check_segments(segment_ids, axes[0], n, n, symbols=True)
        pairs = self.attention._mask_shapes(axes, axes)
        masks = {
            "mask": (mask, of_positions(axes)),
            "inputs_mask": (inputs_mask, of_positions(axes)),
            "attention_mask": (attention_mask, *pairs),
        }
        conditions = [are_flags(name, x) for name, (x, *_) in masks.items()]
        found = [read_mask(name, *wanted) for name, wanted in masks.items()]
        return *found, segment_ids, [each for each in conditions if each is not None]

    def _check_shape(self, shape):
        if shape is None:
            raise TypeError(received("inputs", "a tensor (batch, length, features)", None))
        if len(shape) < 3 or shape[-1] is None:
            raise ValueError(
                "`inputs` must have shape (batch, length, features), features known. "
                f"Received: shape={tuple(shape)}"
            )

    def compute_mask(self, inputs, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, inputs_shape):
        self._check_shape(inputs_shape)
        return self.attention.compute_output_shape(inputs_shape, inputs_shape)

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        inputs_mask=None,
        attention_mask=None,
        segment_ids=None,
        training=None,
    ):
        *masks, segment_ids, _ = self._read(inputs, mask, inputs_mask, attention_mask, segment_ids)
        if all(x is None for x in masks):
            warn_of_dropped_mask(self, "inputs", inputs)
        self.attention.compute_output_spec(
            *(inputs, inputs),
            query_mask=masks[0],
            value_mask=masks[1],
            attention_mask=masks[2],
            segment_ids=segment_ids,
        )
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        attention = self.attention
        config = {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "pattern": save_pattern(self._plain_pattern),
            "hidden_dim": self.hidden_dim,
            "causal": self.causal,
            "norm_first": self.norm_first,
            "activation": activations.serialize(self.activation),
            "dropout": self.dropout,
            "epsilon": self.epsilon,
            "num_key_value_heads": self.num_key_value_heads,
            "score_mod": save_score_mod(attention.score_mod),
            "rotary_embedding": save_shared(attention.rotary_embedding),
            "use_bias": attention.use_bias,
            "kernel_initializer": initializers.serialize(attention.kernel_initializer),
            "bias_initializer": initializers.serialize(attention.bias_initializer),
            "seed": self.seed,
            "max_score_bytes": attention.max_score_bytes,
        }
        of_attention = attention.with_policies({}, *(attention._projections if self.built else []))
        if of_attention:
            config["attention_policies"] = of_attention["policies"]
        if not self.built:
            return self.with_policies(config)
        own = [self.attention_norm, self.feedforward_norm]
        own += [self.feedforward_hidden, self.feedforward_output]
        return self.with_policies(config, *own)

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        policies = config.pop("attention_policies", None)
        layer = super().from_config(config)
        if policies:
            layer.attention._computing = keras.saving.deserialize_keras_object(policies)
        return layer
