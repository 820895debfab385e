"""What all attention layers are: Dense layers around one function."""

import functools
import inspect
import math
from dataclasses import dataclass

import keras
from keras import constraints, initializers, ops, regularizers

from sparse_attn.checks import check_bool, check_int, check_rate, check_tensor, received, takes
from sparse_attn.functional import (
    attention_weights,
    check_positions,
    check_segments,
    sparse_attention,
)
from sparse_attn.layers.arguments import (
    read_features,
    read_layer,
    read_object,
    read_pattern,
    read_score_mod,
    read_window,
    save_score_mod,
)
from sparse_attn.layers.base import BaseLayer, warn
from sparse_attn.layers.dropped_masks import warn_of_dropped_mask
from sparse_attn.layers.projection import Projection, as_own
from sparse_attn.layers.saving import HasPolicies, classes_of, save_pattern, save_shared
from sparse_attn.masking import zero_masked
from sparse_attn.patterns import Causal, Full, Local, PerHead
from sparse_attn.reshaping import rearrange
from sparse_attn.stream import MAX_SCORE_BYTES
from sparse_attn.tensors import to_array, to_tensor
from sparse_attn.terms import is_causal
from sparse_attn.tiles import trace_predicate
from sparse_attn.tracing import all_of, known_size, require, size_of, value_of

MASK = "a mask of bools or numbers"


@dataclass(frozen=True)
class Inputs:
    """The inputs of a call, of numbers or symbols, after all checks.

    Args:
        vectors: query, value and key.
        masks: a dict of masks of positions, as bools `(b|1, ...)` or `None`, by their
            names in `call`.
        attention_mask: a mask of pairs, as bools, or `None`.
        segment_ids: a pair of int tensors, or `None`.
        query_positions: as it was given.
        pattern: the pattern of this call.
        conditions: pairs of a bool tensor, which must be True but is not known yet, and
            of what is wrong if it is not.
    """

    vectors: tuple
    masks: dict
    attention_mask: object
    segment_ids: object
    query_positions: object
    pattern: object
    conditions: list


class Attention(HasPolicies, BaseLayer):
    """Attention of `num_heads` heads of queries over `key_heads` heads of keys and values.

    Inputs may have several axes between the batch and the features, such as
    the rows and columns of an image: positions are counted through all of
    them, row by row.
    """

    # The inputs that each mask of positions is of; it has the shape of the first.
    _sides = {"query_mask": ["query"], "value_mask": ["value"], "key_mask": ["key"]}  # noqa: RUF012
    _key_names = "value", "key"  # the arguments that values and keys come in, for messages

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
        self._has_traced = False  # the pattern's predicate
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
        self._check_lengths(query_shape, key_shape)
        shapes = {"query": query_shape, "value": value_shape, "key": key_shape}
        self._widths = {name: shape[-1] for name, shape in shapes.items()}
        of_queries, of_keys = (
            (heads, self._key_dim) for heads in (self._num_heads, self._key_heads)
        )
        inner, of_values = (
            (heads, self._value_dim) for heads in (self._num_heads, self._key_heads)
        )
        self._query_dense = self._dense("query", query_shape, None, of_queries)
        self._key_dense = self._dense("key", key_shape, None, of_keys)
        if self.use_gate:
            self._gate_dense = self._dense("gate", query_shape, None, inner, activation="sigmoid")
        self._value_dense = self._dense("value", value_shape, None, of_values)
        inner_shape = (*query_shape[:-1], math.prod(inner))
        features = self._features_of(query_shape)
        self._output_dense = self._dense("attention_output", inner_shape, inner, features)
        if self.dropout:  # a layer for the sake of its generator, as in Keras' own layers
            self._dropout_layer = keras.layers.Dropout(self.dropout, seed=self.seed)
        for mod in _as_list(self.score_mod):
            if isinstance(mod, keras.layers.Layer) and not mod.built and takes(mod.build, 0):
                mod.build()
        rotary = self.rotary_embedding
        if rotary is not None and not rotary.built:
            rotary.build((*query_shape[:1], None, self._num_heads, self._key_dim))

    def _dense(self, name, shape, in_axes, out_axes, activation=None):
        """A sublayer; its axes are those of `Projection`."""
        layer = Projection(
            in_axes,
            out_axes,
            activation=activation,
            use_bias=self.use_bias,
            # A fresh initializer each: one instance would give equal weights.
            kernel_initializer=copy_initializer(self.kernel_initializer),
            bias_initializer=copy_initializer(self.bias_initializer),
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

    @property
    def _projections(self):
        own = [self._query_dense, self._key_dense, self._value_dense, self._output_dense]
        return [*own, self._gate_dense] if self.use_gate else own

    def set_weights(self, weights):
        """Set the weights from arrays, which may have the shapes of Keras' attention layers."""
        own = self.weights
        plain = [x for x in self._projections if x.quantization_mode is None] if self.built else []
        shapes = {id(variable): shape for x in plain for variable, shape in x.shapes}
        if len(weights) == len(own):
            weights = [
                as_own(x, y, shapes[id(y)]) if id(y) in shapes else x
                for x, y in zip(weights, own, strict=True)
            ]
        super().set_weights(weights)

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
        query_positions=None,
    ):
        masks = {"query_mask": query_mask, "value_mask": value_mask, "key_mask": key_mask}
        return self._attend(
            (query, value, key),
            masks,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            query_positions=query_positions,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
        )

    def _attend(self, vectors, masks, *, return_attention_scores, training, **others):
        """What `call` does.

        Args:
            vectors: query, value and key, the latter perhaps `None`.
            masks: a dict of the masks of positions by their names in `call`.
            **others: the other arguments of `call`.
        """
        inputs = self._read(vectors, masks, return_attention_scores, **others)
        query, value, key = inputs.vectors
        q_axes, k_axes = ops.shape(query)[1:-1], ops.shape(key)[1:-1]
        known = query.shape[:-1]
        query_mask = self._joined(inputs, "query")
        key_mask = both(self._joined(inputs, "value"), self._joined(inputs, "key"))
        if not (query_mask is None or key_mask is None) and _is_one(masks.values()):
            key_mask = query_mask  # each valid key has a valid query: that of its own position
        query, key, value = (rearrange(x, "b ... d -> b (...) d") for x in (query, key, value))
        q_pos = inputs.query_positions
        if q_pos is not None:
            n = _product(q_axes)
            q_pos = check_positions(q_pos, query.shape[1], n, self.pattern.max_length)
        options = {
            "query_mask": query_mask,
            "key_mask": key_mask,
            "attention_mask": self._flat_pairs(inputs.attention_mask, q_axes, k_axes),
            "segment_ids": inputs.segment_ids,
            "score_mod": self.score_mod,
            "query_positions": q_pos,
        }
        # Zeros first: NaN in padding would reach the kernels' gradients.
        query = zero_masked(query, query_mask)
        key, value = zero_masked(key, key_mask), zero_masked(value, key_mask)
        q = _by_heads(self._query_dense(query), query, self._num_heads)
        k = _by_heads(self._key_dense(key), key, self._key_heads)
        v = _by_heads(self._value_dense(value), value, self._key_heads)
        if self.rotary_embedding is not None:
            q, k = self._turned(q, q_pos), self._turned(k)
        q, k, v = (ops.cast(x, self.compute_dtype) for x in (q, k, v))  # each has its own policy
        own = {"max_score_bytes": self.max_score_bytes}
        if self.dropout and training:
            own |= {"dropout": self.dropout, "seed": self._dropout_layer.seed_generator}
        out = rearrange(
            sparse_attention(q, k, v, inputs.pattern, **options, **own), "b n h e -> b n (h e)"
        )
        if self.use_gate:
            out = out * self._gate_dense(query)
        out = self._output_dense(out)
        batch = size_of(out, 0)
        features = self._features_of((*known, query.shape[-1]))
        if len(q_axes) > 1 or len(features) > 1:
            out = ops.reshape(out, (batch, *q_axes, *features))
        for condition, told in inputs.conditions:
            out = require(out, condition, told)
        if not return_attention_scores:
            return out
        weights = attention_weights(q, k, inputs.pattern, **options)
        if len(q_axes) > 1 or len(k_axes) > 1:
            weights = ops.reshape(weights, (batch, self._num_heads, *q_axes, *k_axes))
        return out, weights

    def _turned(self, x, positions=None):
        if positions is None:
            found = self.rotary_embedding(x)
        elif "positions" in inspect.signature(self.rotary_embedding.call).parameters:
            found = self.rotary_embedding(x, positions=positions)
        else:
            raise ValueError(
                "`rotary_embedding` must take `positions` where there are `query_positions`. "
                f"Received: rotary_embedding={self.rotary_embedding!r}"
            )
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

    def _read(
        self,
        vectors,
        masks,
        return_attention_scores,
        *,
        attention_mask,
        segment_ids,
        query_positions,
        use_causal_mask,
    ):
        """The inputs of a call, of numbers or symbols, after all checks: `Inputs`."""
        query, value, key = vectors
        flags = {"use_causal_mask": use_causal_mask}
        flags["return_attention_scores"] = return_attention_scores
        for name, flag in flags.items():
            if isinstance(flag, str):  # Keras takes ints too
                raise TypeError(received(name, "True or False", flag))
        key = value if key is None else key
        named = {"query": query, "value": value, "key": key}
        vectors = {name: read_vectors(name, x) for name, x in named.items()}
        shapes = {name: tuple(x.shape) for name, x in vectors.items()}
        self._check_shapes(*shapes.values())
        pattern = Causal() & self.pattern if use_causal_mask else self.pattern
        of_query, of_key = shapes["query"], shapes["key"]
        if query_positions is None:
            check_axes("query", of_query, pattern)
            self._check_lengths(of_query, of_key)
        else:
            self._check_lengths((None, None, None), of_key)
        conditions = [are_flags(name, mask) for name, mask in masks.items()]
        conditions.append(are_flags("attention_mask", attention_mask))
        placed = {"key": self._key_names[1]}
        if query_positions is None and query is not key:
            placed["query"] = "query"
        for name, told in placed.items():
            conditions += axes_later(told, vectors[name], pattern)
        masks = {
            name: read_mask(name, mask, of_positions(shapes[self._sides[name][0]][:-1]))
            for name, mask in masks.items()
        }
        pairs = self._mask_shapes(of_query[:-1], of_key[:-1])
        attention_mask = read_mask("attention_mask", attention_mask, *pairs)
        n, m = length_of(of_query), length_of(of_key)
        if query_positions is None:
            self._warn_of_one_query(pattern, n, m)
        elif isinstance(query_positions, keras.KerasTensor):
            check_tensor("query_positions", query_positions, "int", (), (n,))
        return Inputs(
            tuple(vectors.values()),
            masks,
            attention_mask,
            check_segments(segment_ids, of_query[0], n, m, symbols=True),
            query_positions,
            pattern,
            [condition for condition in conditions if condition is not None],
        )

    def _joined(self, inputs, name):
        """The mask of an input, of all that are its own, as `(b, n)` bools; or `None`."""
        like = inputs.vectors[("query", "value", "key").index(name)]
        found = [mask for each, mask in inputs.masks.items() if name in self._sides[each]]
        return functools.reduce(both, [_flat_positions(mask, like) for mask in found], None)

    def _warn_of_one_query(self, pattern, n, m):
        if n != 1 or not isinstance(m, int) or m < 2 or "one query" in self._warned:
            return
        if is_causal(pattern):
            self._warned.add("one query")
            warn(
                f"Layer {self.name!r} has one query for {m} keys. Without `query_positions` it "
                f"stands at position 0, where the causal pattern {pattern!r} lets it see the "
                "first key alone. Give `query_positions`, the number of positions before it."
            )

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

    def _check_lengths(self, query_shape, key_shape):
        """Refuse lengths, and axes of positions, that the pattern cannot relate.

        The axes of queries, which may stand at `query_positions`, are looked at in a call.
        """
        check_axes(self._key_names[1], tuple(key_shape), self.pattern)
        self.pattern.check_lengths(length_of(query_shape), length_of(key_shape))

    def compute_mask(self, query, previous_mask=None):
        return previous_mask

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        key_shape = key_shape or value_shape
        self._check_shapes(query_shape, value_shape, key_shape)
        self._check_lengths(query_shape, key_shape)
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
        query_positions=None,
    ):
        masks = {"query_mask": query_mask, "value_mask": value_mask, "key_mask": key_mask}
        return self._spec(
            (query, value, key),
            masks,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            query_positions=query_positions,
            return_attention_scores=return_attention_scores,
            use_causal_mask=use_causal_mask,
        )

    def _spec(self, vectors, masks, *, return_attention_scores, **others):
        """What `compute_output_spec` does; see `_attend`."""
        inputs = self._read(vectors, masks, return_attention_scores, **others)
        self._trace_predicates()
        self._warn_of_dropped_masks(inputs)
        query, _, key = inputs.vectors
        shape = (*query.shape[:-1], *self._features_of(query.shape))
        out = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return out
        pairs = (query.shape[0], self._num_heads, *query.shape[1:-1], *key.shape[1:-1])
        return out, keras.KerasTensor(pairs, dtype=self.compute_dtype)

    def _warn_of_dropped_masks(self, inputs):
        """Warn if nothing masks the keys, but an ancestor of keys or values had a mask.

        That of queries alone keeps no padding from being attended to.
        """
        masked = [self._sides[name] for name, mask in inputs.masks.items() if mask is not None]
        if inputs.attention_mask is None and all(sides == ["query"] for sides in masked):
            for name, x in zip(self._key_names, inputs.vectors[1:], strict=True):
                warn_of_dropped_mask(self, name, x)

    def _trace_predicates(self):
        """Try predicates of a user's own, once, rather than fail when the model is run."""
        patterns = [] if self._has_traced else getattr(self.pattern, "patterns", [self.pattern])
        for pattern in patterns:
            if any(not kind.__module__.startswith("sparse_attn.") for kind in classes_of(pattern)):
                trace_predicate(pattern)
        self._has_traced = True

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
        return self.with_policies(config, *self._projections)


def _by_heads(x, like, heads):
    """`(b, n, (h d))` to `(b, n, h, d)`, where `b` and `n` are those of `like`.

    An exporter to ONNX, asked for the sizes of a product itself, answers with
    those of the matrix that TensorFlow makes of it, `((b n), (h d))`.
    """
    batch, n = size_of(like, 0), size_of(like, 1)
    return ops.reshape(x, (batch, n, heads, x.shape[-1] // heads))


def _as_list(score_mod):
    return score_mod if isinstance(score_mod, (list, tuple)) else [score_mod]


def read_vectors(name, x):
    """An input of a layer as a tensor, or as the symbol that it is."""
    if not hasattr(x, "shape"):
        raise TypeError(received(name, "a tensor (batch, length, features)", x))
    return x if isinstance(x, keras.KerasTensor) else to_tensor(name, x)


def read_mask(name, mask, *shapes):
    """A mask of one of these shapes, of numbers or symbols, as one of bools; `None` passes."""
    if mask is None:
        return None
    if isinstance(mask, keras.KerasTensor):
        mask = keras.KerasTensor(mask.shape, "bool")
    else:
        mask = ops.cast(to_tensor(name, mask, MASK), "bool")
    return check_tensor(name, mask, "bool", *shapes)


def refuse_second_input(layer, shape, mask):
    """Refuse what comes in the place of a mask but is as large as the input."""
    if len(shape) > 2 and len(getattr(mask, "shape", ())) == len(shape):
        raise ValueError(
            f"{type(layer).__name__} takes one input, whose positions attend to one another; "
            "what comes second is its `mask`. For a query and another value there is "
            f"MultiHeadAttention. Received: a second input of shape {tuple(mask.shape)}"
        )


def are_flags(name, mask):
    """Refuse numbers of a mask that are neither 0 nor 1, such as those of an additive mask.

    Returns:
        `None` once that is certain; where the numbers are not known yet, a pair of a bool
        tensor, whether they are right, and of what is to be said if not.
    """
    if mask is None or isinstance(mask, keras.KerasTensor):  # it is looked at in the call
        return None
    array = to_array(name, mask, MASK)
    mask = to_tensor(name, mask, MASK) if array is None else array
    dtype = keras.backend.standardize_dtype(mask.dtype)
    if dtype == "bool" or dtype.startswith("uint"):
        return None
    is_int = dtype.startswith("int")
    flags = mask >= 0 if is_int else (mask == 0) | (mask == 1)
    right = all_of(flags) if array is None else flags.all()
    known = value_of(right) if array is None else right
    if known:
        return None
    requirement = "ints that are not negative" if is_int else "of the numbers 0 and 1"
    told = (
        f"`{name}` must be a mask of bools or {requirement}, True or 1 = may be attended. "
        "Numbers to be added to scores are the `bias` of `sparse_attention`, or a "
        f"`score_mod`. Received: {name} of shape {tuple(mask.shape)} and dtype {dtype}, with "
    )
    if known is None:
        return right, f"{told}other numbers"
    wrong = ops.convert_to_numpy(mask)[~ops.convert_to_numpy(flags)]
    raise ValueError(f"{told}{wrong[0]}")


def check_axes(name, shape, pattern):
    """Refuse several axes of positions that are not those of a pattern's grids."""
    axes = [known_size(size) for size in shape[1:-1]]
    for grid in pattern.grid_shapes if len(axes) > 1 else ():
        if len(axes) != len(grid) or not all(map(_fits, axes, grid, _is_first(grid))):
            raise ValueError(f"{_off_grid(name, grid, pattern)} Received: {name}.shape={shape}")


def axes_later(name, x, pattern):
    """Conditions of the axes of a tensor that `check_axes` could not look at: see `Inputs`."""
    if isinstance(x, keras.KerasTensor) or keras.backend.backend() == "torch":
        return []  # whose axes are looked at in the call, or known
    sizes = ops.shape(x)[1:-1]
    return [
        (_fits(ops.convert_to_tensor(size, "int32"), wanted, first), _off_grid(name, grid, pattern))
        for grid in (pattern.grid_shapes if len(sizes) > 1 else ())
        for size, wanted, first in zip(sizes, grid, _is_first(grid), strict=True)
        if not isinstance(size, int) and wanted is not None
    ]


def _fits(size, wanted, is_first):
    if wanted is None or size is None:
        return True
    return size <= wanted if is_first else size == wanted


def _is_first(grid):
    return [True] + [False] * (len(grid) - 1)


def _off_grid(name, grid, pattern):
    return (
        f"The axes of positions of `{name}` must be those of the grid of {pattern!r}, {grid}, of "
        "which the first may be shorter."
    )


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


def _is_one(masks):
    """Whether all masks that there are, are one and the same."""
    return len({id(mask) for mask in masks if mask is not None}) == 1


def length_of(shape):
    """The number of positions of inputs of a shape, or `None` while it is unknown."""
    sizes = shape[1:-1]  # JAX exports unknown ones by names, which nothing can be compared with
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _product(sizes):
    total = sizes[0]
    for size in sizes[1:]:
        total = total * size
    return total


def copy_initializer(initializer):
    """A fresh one of the same kind: one instance would give equal weights."""
    if not isinstance(initializer, initializers.Initializer):
        return initializer  # a plain function
    return initializer.__class__.from_config(initializer.get_config())
