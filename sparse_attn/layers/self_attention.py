"""Self-attention, and its atrous, local and strided forms: each only chooses a pattern."""

import keras

from sparse_attn.checks import check_bool
from sparse_attn.layers.arguments import read_pattern
from sparse_attn.layers.attention import refuse_second_input
from sparse_attn.layers.multi_head_attention import MultiHeadAttention
from sparse_attn.patterns import Atrous, Causal, Local, Strided


@keras.saving.register_keras_serializable(package="sparse_attn")
class SelfAttention(MultiHeadAttention):
    """Attention of a sequence over itself, along the pairs of a pattern.

    Args:
        num_heads: number of heads, a positive int.
        key_dim: features per head of queries and keys, a positive int: all heads
            together are `num_heads * key_dim` wide.
        pattern: a `Pattern`; `Full()` by default.
        causal: whether no position may attend to a later one; the layer's
            `pattern` then is `Causal() & pattern`.
        **kwargs: as for `MultiHeadAttention`.

    Call arguments:
        query: `(b, n, features)`.
        mask, query_mask: `(b|1, n)`, True = valid; Keras fills in one of them. Where
            there are both, a position must be valid in both.
        key_mask: `(b|1, n)`, True = may be attended to; joined with the mask above.
        attention_mask, return_attention_scores, training, use_causal_mask,
            segment_ids, query_positions: as for `MultiHeadAttention`.

    Returns:
        `(b, n, *output_shape)`, or a pair of it and the `(b, h, n, n)` weights.

    Raises:
        TypeError, ValueError: for an argument that is not as said above; the
            message names it.

    Example:

    >>> import numpy as np
    >>> from sparse_attn import Causal, Local, Prefix
    >>> from sparse_attn.layers import SelfAttention
    >>> layer = SelfAttention(2, 16, Causal() & (Local(10) | Prefix(4)))
    >>> tuple(layer(np.ones((1, 100, 32), "float32")).shape)
    (1, 100, 32)
    """

    # Of the mask of its one input there are two names: see `_masks`.
    _sides = {  # noqa: RUF012
        "mask": ["query", "key"],
        "query_mask": ["query", "key"],
        "key_mask": ["key"],
    }
    _key_names = "query", "query"

    def __init__(self, num_heads, key_dim, pattern=None, causal=False, **kwargs):
        self.causal = check_bool("causal", causal)
        plain = read_pattern(pattern)
        pattern = Causal() & plain if causal else plain
        super().__init__(num_heads, key_dim, pattern=pattern, **kwargs)
        self._given_pattern = plain

    def build(self, query_shape=None):
        super().build(query_shape, query_shape)

    def call(
        self,
        query,
        mask=None,
        query_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        segment_ids=None,
        key_mask=None,
        query_positions=None,
    ):
        return self._attend(
            (query, query, None),
            self._masks(query, mask, query_mask, key_mask),
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
            segment_ids=segment_ids,
            query_positions=query_positions,
        )

    def _masks(self, query, mask, query_mask, key_mask):
        """By name: Keras fills in `mask` beside one tensor, `query_mask` beside several."""
        refuse_second_input(self, getattr(query, "shape", ()), mask)
        return {"mask": mask, "query_mask": query_mask, "key_mask": key_mask}

    def compute_output_shape(self, query_shape):
        return super().compute_output_shape(query_shape, query_shape)

    def compute_output_spec(
        self,
        query,
        mask=None,
        query_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
        segment_ids=None,
        key_mask=None,
        query_positions=None,
    ):
        return self._spec(
            (query, query, None),
            self._masks(query, mask, query_mask, key_mask),
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            use_causal_mask=use_causal_mask,
            segment_ids=segment_ids,
            query_positions=query_positions,
        )

    def get_config(self):
        return {**super().get_config(), "causal": self.causal}


class _NamedSelfAttention(SelfAttention):
    """A layer that takes its pattern's arguments in place of the pattern."""

    def get_config(self):
        config = super().get_config()
        del config["pattern"]
        return {**config, **self._given_pattern.get_config()}


@keras.saving.register_keras_serializable(package="sparse_attn")
class AtrousSelfAttention(_NamedSelfAttention):
    """Self-attention along a comb: `(q_pos - k_pos) % rate == 0`. See `Atrous`.

    Time and memory are 1 / `rate` of full attention's.

    Args:
        num_heads: number of heads, a positive int.
        key_dim: features per head, a positive int.
        rate: a positive int, the distance between the teeth.
        causal: whether no position may attend to a later one.
        **kwargs: as for `MultiHeadAttention`.

    Raises:
        TypeError, ValueError: for an argument that is not as said above.
    """

    def __init__(self, num_heads, key_dim, rate, causal=False, **kwargs):
        super().__init__(num_heads, key_dim, Atrous(rate), causal, **kwargs)


@keras.saving.register_keras_serializable(package="sparse_attn")
class LocalSelfAttention(_NamedSelfAttention):
    """Self-attention in a window: `-left <= k_pos - q_pos <= right`. See `Local`.

    Time and memory are linear in the length.

    Args:
        num_heads: number of heads, a positive int.
        key_dim: features per head, a positive int.
        window: a non-negative int for both sides, or a pair `(left, right)`
            of them, where `None` is unlimited.
        causal: whether no position may attend to a later one.
        **kwargs: as for `MultiHeadAttention`.

    Raises:
        TypeError, ValueError: for an argument that is not as said above.

    References:
        - [Longformer, Beltagy et al., 2020](https://arxiv.org/abs/2004.05150)
    """

    def __init__(self, num_heads, key_dim, window, causal=False, **kwargs):
        super().__init__(num_heads, key_dim, Local(window), causal, **kwargs)


@keras.saving.register_keras_serializable(package="sparse_attn")
class StridedSelfAttention(_NamedSelfAttention):
    """Self-attention dense nearby and sparse far away. See `Strided`.

    Args:
        num_heads: number of heads, a positive int.
        key_dim: features per head, a positive int.
        stride: a positive int: the window on each side, and the distance
            between the keys beyond it.
        causal: whether no position may attend to a later one.
        **kwargs: as for `MultiHeadAttention`.

    Raises:
        TypeError, ValueError: for an argument that is not as said above.

    References:
        - [Sparse Transformers, Child et al., 2019](https://arxiv.org/abs/1904.10509)
    """

    def __init__(self, num_heads, key_dim, stride, causal=False, **kwargs):
        super().__init__(num_heads, key_dim, Strided(stride), causal, **kwargs)
