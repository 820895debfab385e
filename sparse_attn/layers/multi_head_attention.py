"""Multi-head and grouped-query attention over a pattern, as drop-ins for Keras' own layers."""

import keras

from sparse_attn.checks import check_int, received
from sparse_attn.layers.arguments import read_size
from sparse_attn.layers.attention import Attention
from sparse_attn.stream import MAX_SCORE_BYTES


@keras.saving.register_keras_serializable(package="sparse_attn")
class MultiHeadAttention(Attention):
    """Multi-head attention whose pairs of positions a pattern chooses.

    Takes the place of `keras.layers.MultiHeadAttention`: the arguments, the
    calls and the weights are those of that layer, and `pattern` says which
    pairs may attend. Queries, keys and values are projected by `Dense`
    sublayers (`query`, `key`, `value`), attend over the pairs of the pattern,
    and are projected back (`attention_output`). Time and memory follow the
    pattern.

    Keras masks are picked up and passed on, and masks given by name are
    honoured: padded positions are not attended to, and what they hold does not
    matter. A position with nothing to attend to gives 0 before the last
    projection, with the scores returned or without.

    Args:
        num_heads: number of heads, a positive int.
        key_dim: features per head of queries and keys, a positive int: all heads
            together are `num_heads * key_dim` wide.
        value_dim: features per head of values, `key_dim` by default.
        dropout: the share of attention weights to drop in training, in [0, 1).
        use_bias: whether the Dense sublayers have biases.
        output_shape: features of the output, an int or a tuple of ints; those
            of the query by default.
        attention_axes: `None`, or all axes between the batch and the features. A
            pattern relates all of them; move others into the batch.
        sliding_window: a positive int, short for `Local(sliding_window - 1)`,
            which is joined to the pattern by "and".
        flash_attention: `None` or `False`: there is no fused kernel for patterns.
        kernel_initializer, bias_initializer: of the Dense sublayers.
        kernel_regularizer, bias_regularizer, activity_regularizer: likewise.
        kernel_constraint, bias_constraint: likewise.
        use_gate: whether what the heads give is multiplied by
            `sigmoid(Dense(query))`, before the last projection.
        seed: an int, for dropout.
        pattern: a `Pattern`; `Full()` by default.
        score_mod: what is done to the scores, as for `sparse_attention`; it may be a
            layer, such as `RelativePositionBias`.
        rotary_embedding: a layer that is applied to the queries and to the keys of
            all heads, `(b, n, h, d)`, such as `RotaryEmbedding()`; or `None`.
        max_score_bytes: an int: if the scores of this layer take more, they are
            not kept for the backward pass but worked out again. See
            `sparse_attention`, also for an unknown length or batch.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        query: `(b, n, features)`, or with more axes than one for the positions,
            which are counted through all of them, row by row. Then so have the
            masks, the output and the weights.
        value: `(b, m, features)`, likewise.
        key: `(b, m, features)`, `value` by default.
        query_mask: `(b|1, n)`, True = valid; Keras fills it in.
        value_mask, key_mask: `(b|1, m)`, True = valid; Keras fills them in.
        attention_mask: `(n, m)`, `(b|1, n, m)` or `(b|1, h|1, n, m)`, True = may be
            attended, where `n` and `m` may be 1 as well; of size n * m by nature,
            prefer a pattern. `(b, 1, m)` is a mask of keys. Masks may hold numbers
            too: floats 0 and 1, or ints that count as True unless they are 0. What
            is to be added to scores, such as -1e9, is an error. Where the numbers
            are not known yet, TensorFlow raises it while it runs; with XLA and in
            compiled JAX the output is NaN.
        return_attention_scores: whether to return the weights too. They are
            `(b, h, n, m)`: computed densely, whatever the pattern, and without
            dropout. The output is the same as without them.
        training: whether to apply dropout.
        use_causal_mask: whether to use `Causal() & pattern`.
        segment_ids: `(b, n)` ints, or a pair of them for queries and keys: only
            what has the same number may attend, as for several documents in
            one sequence.
        query_positions: where the queries are not at `0, 1, 2, ...`, as those of a
            decoder: an int, the position of the first of them, or `(n,)` ints. The
            pattern, the `score_mod` and the `rotary_embedding`, which then must take
            `positions`, follow it; keys stay at `0, 1, 2, ...`. Without it, one
            query for several keys under a causal pattern sees the first key alone:
            a layer warns of that once.

    Returns:
        `(b, n, *output_shape)`, or a pair of it and the weights.

    Raises:
        TypeError, ValueError: for an argument that is not as said above; the
            message names it.

    References:
        - [Attention Is All You Need, Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)
        - [Gated Attention, Qiu et al., 2025](https://arxiv.org/abs/2505.06708)

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
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
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
        pattern=None,
        score_mod=None,
        rotary_embedding=None,
        max_score_bytes=MAX_SCORE_BYTES,
        **kwargs,
    ):
        num_heads, key_dim = read_size("num_heads", num_heads), read_size("key_dim", key_dim)
        super().__init__(
            num_heads,
            num_heads,
            key_dim,
            key_dim if value_dim is None else read_size("value_dim", value_dim),
            output_shape,
            pattern=pattern,
            score_mod=score_mod,
            rotary_embedding=rotary_embedding,
            dropout=dropout,
            use_bias=use_bias,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            use_gate=use_gate,
            seed=seed,
            max_score_bytes=max_score_bytes,
            **kwargs,
        )
        self.attention_axes = _read_axes(attention_axes)

    @property
    def num_heads(self):
        return self._num_heads

    @property
    def key_dim(self):
        return self._key_dim

    @property
    def value_dim(self):
        return self._value_dim

    def _check_shapes(self, query_shape, value_shape, key_shape):
        super()._check_shapes(query_shape, value_shape, key_shape)
        if self.attention_axes is None:
            return
        rank = len(query_shape)
        axes = sorted(axis % rank for axis in self.attention_axes if -rank <= axis < rank)
        if axes != list(range(1, rank - 1)):
            raise ValueError(
                "`attention_axes` must be None or all axes between the batch and the features, "
                f"since a pattern relates all of their positions: here {(*range(1, rank - 1),)}. "
                f"Move others into the batch. Received: attention_axes={self.attention_axes}"
            )

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "attention_axes": self.attention_axes,
        }


def _read_axes(axes):
    if axes is None:
        return None
    try:
        return tuple(
            check_int("attention_axes", axis)
            for axis in (axes if isinstance(axes, (list, tuple)) else [axes])
        )
    except TypeError:
        raise TypeError(
            received("attention_axes", "None, an int or a tuple of ints", axes)
        ) from None


@keras.saving.register_keras_serializable(package="sparse_attn")
class GroupedQueryAttention(Attention):
    """Attention in which several heads of queries share a head of keys and values.

    Takes the place of `keras.layers.GroupQueryAttention`, as
    `MultiHeadAttention` does of that layer's. Keys and values are not repeated
    in memory. With one head of keys this is multi-query attention.

    Args:
        head_dim: features per head, a positive int.
        num_query_heads: a positive int.
        num_key_value_heads: a positive int that divides `num_query_heads`.
        dropout: the share of attention weights to drop in training, in [0, 1).
        use_bias: whether the Dense sublayers have biases.
        sliding_window, flash_attention, kernel_initializer, bias_initializer: as for
            `MultiHeadAttention`.
        kernel_regularizer, bias_regularizer, activity_regularizer: likewise; the last
            is of the layer's output too, as in Keras.
        kernel_constraint, bias_constraint, use_gate, seed: likewise.
        pattern, score_mod, rotary_embedding, max_score_bytes: likewise. A `PerHead`
            has patterns for the heads of queries.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        All are those of `MultiHeadAttention`.

    Returns:
        `(b, n, features)`, with the features of the query; or a pair of it and
        the `(b, num_query_heads, n, m)` weights.

    Raises:
        TypeError, ValueError: for an argument that is not as said above; the
            message names it.

    References:
        - [Grouped-Query Attention, Ainslie et al., 2023](https://arxiv.org/abs/2305.13245)

    Example:

    >>> import numpy as np
    >>> from sparse_attn import Causal, Local
    >>> from sparse_attn.layers import GroupedQueryAttention
    >>> layer = GroupedQueryAttention(16, 4, 2, pattern=Causal() & Local(10))
    >>> x = np.ones((1, 100, 32), "float32")
    >>> tuple(layer(x, x).shape), tuple(layer.key_dense.kernel.shape)
    ((1, 100, 32), (32, 32))
    """

    def __init__(
        self,
        head_dim,
        num_query_heads,
        num_key_value_heads,
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
        pattern=None,
        score_mod=None,
        rotary_embedding=None,
        max_score_bytes=MAX_SCORE_BYTES,
        **kwargs,
    ):
        head_dim = read_size("head_dim", head_dim)
        num_query_heads = read_size("num_query_heads", num_query_heads)
        num_key_value_heads = read_size("num_key_value_heads", num_key_value_heads)
        if num_query_heads % num_key_value_heads:
            raise ValueError(
                "`num_query_heads` must be divisible by `num_key_value_heads`. Received: "
                f"num_query_heads={num_query_heads}, num_key_value_heads={num_key_value_heads}"
            )
        super().__init__(
            num_query_heads,
            num_key_value_heads,
            head_dim,
            head_dim,
            None,
            pattern=pattern,
            score_mod=score_mod,
            rotary_embedding=rotary_embedding,
            dropout=dropout,
            use_bias=use_bias,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            use_gate=use_gate,
            seed=seed,
            max_score_bytes=max_score_bytes,
            **kwargs,
        )
        # Keras' layer of this kind has it for its output too.
        self.activity_regularizer = self.sublayer_activity_regularizer

    @property
    def head_dim(self):
        return self._key_dim

    @property
    def num_query_heads(self):
        return self._num_heads

    @property
    def num_key_value_heads(self):
        return self._key_heads

    def get_config(self):
        config = super().get_config()
        del config["output_shape"]
        return {
            **config,
            "head_dim": self.head_dim,
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
        }
