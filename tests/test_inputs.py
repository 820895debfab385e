"""What functions and layers take for tensors, and what they refuse, in words of their own."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

from sparse_attn import Causal, Local, Pattern, PerHead, merge_attention, sparse_attention
from sparse_attn.functional import attention_weights
from sparse_attn.layers import (
    GroupedQueryAttention,
    MultiHeadAttention,
    PositionEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
    SelfAttention,
    SinePositionEncoding,
    TransformerBlock,
)
from sparse_attn.layers.attention import are_flags
from sparse_attn.masking import masked_softmax, sequence_mask, zero_masked
from tests.compare import BACKEND, close, outputs_and_gradients, to_numpy

rng = np.random.default_rng(0)
ON_TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="a kind of tensor that is there")
ON_TORCH = pytest.mark.skipif(BACKEND != "torch", reason="a kind of tensor that is there")


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def variable(x):
    x = np.asarray(x)
    x = x.astype("int32") if x.dtype.kind == "i" else x
    return keras.Variable(x, dtype=str(x.dtype), trainable=x.dtype.kind == "f")


# ---- Variables ---------------------------------------------------------------

VECTORS = {name: normal(2, 5, 2, 4) for name in ("query", "key", "value")}
KEPT = rng.random((2, 5)) < 0.8
PAIRS = {
    "query_mask": KEPT,
    "key_mask": KEPT,
    "segment_ids": np.array([[0, 0, 1, 1, 1], [2, 2, 2, 3, 3]]),
    "attention_mask": rng.random((2, 5, 5)) < 0.8,
}
OF_FUNCTION = {**VECTORS, **PAIRS, "bias": normal(5, 5), "query_positions": np.arange(5)}
OF_LAYER = {
    "query": normal(2, 5, 6),
    "value": normal(2, 5, 6),
    "key": normal(2, 5, 6),
    "value_mask": KEPT,
    **PAIRS,
}
of_lse = normal(2, 5, 2)
CALLS = {
    "sparse_attention": (lambda **given: sparse_attention(pattern=Local(2), **given), OF_FUNCTION),
    "attention_weights": (
        lambda **given: attention_weights(pattern=Local(2), **given),
        {name: x for name, x in OF_FUNCTION.items() if name not in ("value", "bias")},
    ),
    "merge_attention": (
        lambda out, lse: merge_attention([(out, lse), (out, lse)])[0],
        {"out": VECTORS["query"], "lse": of_lse},
    ),
    "masked_softmax": (masked_softmax, {"scores": normal(2, 5), "mask": KEPT}),
    "sequence_mask": (sequence_mask, {"lengths": np.array([1, 3]), "maxlen": np.array(4)}),
    "zero_masked": (zero_masked, {"x": normal(2, 5, 3), "mask": KEPT}),
    "MultiHeadAttention": (MultiHeadAttention(2, 4, pattern=Local(2)), OF_LAYER),
    "GroupedQueryAttention": (GroupedQueryAttention(4, 2, 1, pattern=Local(2)), OF_LAYER),
    "SelfAttention": (
        SelfAttention(2, 4, Local(2)),
        {"query": normal(2, 5, 6), "mask": KEPT, **PAIRS},
    ),
    "PositionEmbedding": (
        PositionEmbedding(9),
        {"inputs": normal(2, 5, 6), "start_index": np.array(2)},
    ),
    "SinePositionEncoding": (
        SinePositionEncoding(),
        {"inputs": normal(2, 5, 6), "start_index": np.array(2)},
    ),
    "RotaryEmbedding": (
        RotaryEmbedding(),
        {"inputs": normal(2, 5, 6), "positions": np.arange(5)},
    ),
    "RelativePositionBias": (
        RelativePositionBias(2),
        {"q_pos": np.arange(5), "k_pos": np.arange(5)},
    ),
}
ARGUMENTS = [(call, name) for call, (_, inputs) in CALLS.items() for name in inputs]


@pytest.mark.parametrize(("call", "name"), ARGUMENTS)
def test_a_variable_may_come_where_a_tensor_may(call, name):
    function, inputs = CALLS[call]
    expected = function(**inputs)
    found = function(**{**inputs, name: variable(inputs[name])})
    np.testing.assert_array_equal(to_numpy(found), to_numpy(expected))


def gradient_by_variable(function, x, cotangent):
    """The gradient of `sum(function(x) * cotangent)` by a variable, as a training step takes it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            total = ops.sum(function(x) * cotangent)
        return to_numpy(tape.gradient(total, x.value))
    if BACKEND == "jax":
        import jax

        def loss(value):
            with keras.StatelessScope(state_mapping=[(x, value)]):
                return ops.sum(function(x) * cotangent)

        return to_numpy(jax.grad(loss)(x.value))
    ops.sum(function(x) * ops.convert_to_tensor(cotangent)).backward()
    return x.value.grad.numpy()


TRAINED = [
    *[("sparse_attention", name) for name in ("query", "key", "value", "bias")],
    *[("MultiHeadAttention", name) for name in ("query", "key", "value")],
    ("SelfAttention", "query"),
    ("merge_attention", "out"),
    ("merge_attention", "lse"),
    ("masked_softmax", "scores"),
]


@pytest.mark.parametrize(("call", "name"), TRAINED)
def test_a_variable_has_the_gradient_of_its_tensor(call, name):
    function, inputs = CALLS[call]
    cotangent = normal(*function(**inputs).shape)

    def by_name(x):
        return function(**{**inputs, name: x})

    _, (expected,) = outputs_and_gradients(lambda x: [by_name(x)], [inputs[name]], [cotangent])
    found = gradient_by_variable(by_name, variable(inputs[name]), cotangent)
    close(found, expected, f"gradient of {call} by {name}", "float32")


def test_a_variable_is_an_input_of_a_functional_model_and_is_trained_with_it():
    class Latents(keras.layers.Layer):
        """Some trained vectors that look at the inputs, as a Perceiver's do."""

        def build(self, shape):
            self.latents = self.add_weight(shape=(1, 3, shape[-1]))
            self.attention = MultiHeadAttention(2, 4)
            self.attention.build((1, 3, shape[-1]), shape)

        def call(self, x):
            return self.attention(self.latents, x)

    layer = Latents()
    inputs = keras.Input(batch_shape=(1, None, 6))
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse", jit_compile=BACKEND == "jax")
    before = to_numpy(layer.latents)
    model.fit(normal(1, 5, 6), np.ones((1, 3, 6)), verbose=0)
    assert np.abs(to_numpy(layer.latents) - before).max() > 0


# ---- What is no tensor of numbers, or no dense one ---------------------------


def ragged():
    import tensorflow as tf

    return tf.ragged.constant([[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]], ragged_rank=1)


def sparse():
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.sparse.from_dense(normal(1, 3, 6))
    if BACKEND == "jax":
        from jax.experimental.sparse import BCOO

        return BCOO.fromdense(normal(1, 3, 6))
    import torch

    return torch.tensor(normal(1, 3, 6)).to_sparse()


LAYERS = {
    "MultiHeadAttention": lambda x: MultiHeadAttention(2, 4)(x, x),
    "key": lambda x: MultiHeadAttention(2, 4)(normal(1, 3, 6), normal(1, 3, 6), key=x),
    "SelfAttention": lambda x: SelfAttention(2, 4)(x),
    "PositionEmbedding": lambda x: PositionEmbedding(9)(x),
    "SinePositionEncoding": lambda x: SinePositionEncoding()(x),
    "RotaryEmbedding": lambda x: RotaryEmbedding()(x),
}


@ON_TENSORFLOW
@pytest.mark.parametrize("call", LAYERS.values(), ids=LAYERS)
def test_a_ragged_tensor_is_refused_by_name(call):
    with pytest.raises(TypeError, match=r"`(query|key|inputs)` must be dense.*to_tensor"):
        call(ragged())
    with pytest.raises(TypeError, match=r"`(query|key|inputs)` must be dense"):
        call(keras.Input((None, 6), ragged=True))


@ON_TENSORFLOW
@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "key_mask"])
def test_functions_refuse_a_ragged_tensor_by_name(name):
    with pytest.raises(TypeError, match=f"`{name}` must be dense"):
        sparse_attention(pattern=Local(2), **{**VECTORS, name: ragged()})


@pytest.mark.parametrize("call", LAYERS.values(), ids=LAYERS)
def test_a_sparse_tensor_is_refused_by_name(call):
    with pytest.raises(TypeError, match=r"`(query|key|inputs)` must be dense"):
        call(sparse())


@ON_TORCH
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_nested_tensor_is_refused_by_name():
    import torch

    nested = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)])
    with pytest.raises(TypeError, match="`query` must be dense"):
        SelfAttention(2, 4)(nested)


@pytest.mark.parametrize(
    "strings",
    [np.full((1, 3, 6), "a"), np.full((1, 3, 6), b"a"), [[["a"] * 6] * 3], "abc"],
    ids=["array", "bytes", "lists", "str"],
)
@pytest.mark.parametrize("call", LAYERS.values(), ids=LAYERS)
def test_strings_are_refused_by_name(call, strings):
    with pytest.raises(TypeError, match=r"`(query|key|inputs)` must be a tensor"):
        call(strings)


NO_TENSORS = {
    "dict": lambda: {"a": normal(1, 3, 6)},
    "dict of symbols": lambda: {"a": keras.Input((3, 6))},
    "set": lambda: {1.0},
    "object": lambda: object(),
    "generator": lambda: iter(normal(1, 3, 6)),
}
BY_KEYWORD = {
    "query by keyword": lambda x: MultiHeadAttention(2, 4)(query=x, value=normal(1, 3, 6)),
    "key by keyword": LAYERS["key"],
    "SelfAttention by keyword": lambda x: SelfAttention(2, 4)(query=x),
    "block": lambda x: TransformerBlock(2, 4, None, 8)(x),
    "block by keyword": lambda x: TransformerBlock(2, 4, None, 8)(inputs=x),
    "inputs by keyword": lambda x: RotaryEmbedding()(inputs=x),
}


@pytest.mark.parametrize("make", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize(
    "call", [*LAYERS.values(), *BY_KEYWORD.values()], ids=[*LAYERS, *BY_KEYWORD]
)
def test_what_is_no_tensor_is_refused_by_name(call, make):
    told = r"`(query|key|inputs)` must be a tensor or an array of numbers. Received: \w+=.*[a{<]"
    with pytest.raises(TypeError, match=told):
        call(make())


@pytest.mark.parametrize("call", LAYERS.values(), ids=LAYERS)
def test_symbols_of_strings_are_refused_by_name(call):
    with pytest.raises(TypeError, match=r"`(query|key|inputs)` must be a tensor or an array of"):
        call(keras.Input((3, 6), dtype="string"))


@pytest.mark.parametrize("x", [np.full((1, 3, 6), None), np.ones((1, 3, 6), "complex64")])
def test_objects_and_complex_numbers_are_refused_by_name(x):
    with pytest.raises(TypeError, match="`query` must be a tensor or an array of numbers"):
        SelfAttention(2, 4)(x)


# ---- Masks of numbers --------------------------------------------------------

X = normal(2, 5, 6)
ALLOWED = rng.random((2, 5, 5)) < 0.6
MASKED = {
    "attention_mask": (ALLOWED, lambda mask: MultiHeadAttention(2, 4)(X, X, attention_mask=mask)),
    "grouped": (
        ALLOWED,
        lambda mask: GroupedQueryAttention(4, 2, 1)(X, X, attention_mask=mask),
    ),
    "mask": (KEPT, lambda mask: SelfAttention(2, 4)(X, mask=mask)),
    "key_mask": (KEPT, lambda mask: SelfAttention(2, 4)(X, key_mask=mask)),
    "query_mask": (KEPT, lambda mask: MultiHeadAttention(2, 4)(X, X, query_mask=mask)),
    "value_mask": (KEPT, lambda mask: MultiHeadAttention(2, 4)(X, X, value_mask=mask)),
}


def additive(mask):
    return np.where(mask, 0, -1e9).astype("float32")


@pytest.mark.parametrize("kind", ["array", "list", "tensor", "ints"])
@pytest.mark.parametrize(("mask", "call"), MASKED.values(), ids=MASKED)
def test_an_additive_mask_is_an_error(mask, call, kind):
    added = additive(mask)
    given = {
        "array": added,
        "list": added.tolist(),
        "tensor": ops.convert_to_tensor(added),
        "ints": np.where(mask, 0, -10000),
    }[kind]
    with pytest.raises(ValueError, match=r"_?mask` must be a mask of bools or.*`bias`"):
        call(given)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32"])
def test_an_error_of_an_additive_mask_shows_its_number_dtype_and_shape(dtype):
    mask = ops.convert_to_tensor([[0.0, 1.0, -96.0], [0.0, -5.0, 0.0]])
    told = rf"Received: mask of shape \(2, 3\) and dtype {dtype}, with -96(\.0)?$"
    with pytest.raises(ValueError, match=told):
        are_flags("mask", ops.cast(mask, dtype))
    told = r"Received: attention_mask of shape \(5, 5\) and dtype float32, with -1000000000"
    with pytest.raises(ValueError, match=told):
        MultiHeadAttention(2, 4)(X, X, attention_mask=np.full((5, 5), -1e9, "float32"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("name", ["attention_mask", "key_mask"])
def test_masks_of_zeros_and_ones_are_those_of_bools(name, dtype):
    layer = MultiHeadAttention(2, 4)
    mask = {"attention_mask": ALLOWED, "key_mask": KEPT}[name]
    expected = to_numpy(layer(X, X, **{name: mask}))
    found = to_numpy(layer(X, X, **{name: mask.astype(dtype)}))
    np.testing.assert_array_equal(found, expected)
    given = keras.Input((5, 6)), keras.Input(mask.shape[1:], dtype=dtype)
    model = keras.Model(given, layer(given[0], given[0], **{name: given[1]}))
    found = model.predict([X, mask.astype(dtype)], verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ints_above_one_count_as_true():
    layer = SelfAttention(2, 4)
    np.testing.assert_array_equal(to_numpy(layer(X, mask=7 * KEPT)), to_numpy(layer(X, mask=KEPT)))


@pytest.mark.parametrize("xla", [False, True])
def test_an_additive_mask_that_is_traced_is_an_error_or_nan(xla):
    layer = MultiHeadAttention(2, 4)
    layer.build(X.shape, X.shape)

    def call(mask):
        return layer(X, X, attention_mask=mask)

    expected = to_numpy(call(ALLOWED))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(call, jit_compile=xla)
        if not xla:
            told = r"must be a mask of bools.*shape \(2, 5, 5\) and dtype float32, with other"
            with pytest.raises(tf.errors.InvalidArgumentError, match=told):
                compiled(additive(ALLOWED))
            return
    elif BACKEND == "jax":
        import jax

        compiled = jax.jit(call)
    else:  # it is eager, or traced to be exported
        import torch

        given = (torch.tensor(additive(ALLOWED)),)
        layer.trainable = False  # or its weights could be no constants
        ones = torch.ones(2, 5, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer
            compiled = torch.jit.trace(call, (ones,), check_trace=False)
        assert np.isnan(to_numpy(compiled(*given))).all()
        return
    np.testing.assert_allclose(to_numpy(compiled(ALLOWED.astype("float32"))), expected, atol=1e-5)
    assert np.isnan(to_numpy(compiled(additive(ALLOWED)))).all()


# ---- Predicates that no tensor can go through ---------------------------------


class OfNumpy(Pattern):
    def __call__(self, q_pos, k_pos):
        return np.abs(q_pos - k_pos) < 3


class WithAnd(Pattern):
    def __call__(self, q_pos, k_pos):
        return (k_pos <= q_pos) and (q_pos - k_pos < 3)


class WithIf(Pattern):
    def __call__(self, q_pos, k_pos):
        return k_pos <= q_pos if (q_pos > 0).any() else k_pos == q_pos


NO_PREDICATES = [WithAnd(), Causal() & WithAnd(), PerHead([Causal(), WithAnd()])]
if BACKEND != "torch":  # where these run, as nothing is traced
    NO_PREDICATES += [OfNumpy(), Causal() & ~OfNumpy(), WithIf()]


@pytest.mark.parametrize("length", [7, None])
@pytest.mark.parametrize("pattern", NO_PREDICATES, ids=repr)
def test_a_predicate_that_cannot_be_traced_is_named_at_the_symbolic_call(pattern, length):
    with pytest.raises((TypeError, ValueError), match=r"(OfNumpy|WithAnd|WithIf)\(\).*may use"):
        SelfAttention(2, 4, pattern)(keras.Input((length, 6)))


@pytest.mark.parametrize("pattern", NO_PREDICATES, ids=repr)
def test_a_predicate_that_cannot_be_traced_is_named_in_a_subclassed_model(pattern):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.attention = SelfAttention(2, 4, pattern)

        def call(self, x):
            return self.attention(x)

    with pytest.raises((TypeError, ValueError), match=r"(OfNumpy|WithAnd|WithIf)\(\).*may use"):
        Model().predict(X, verbose=0)


def test_an_error_of_a_predicate_has_its_cause():
    x = normal(1, 5, 2, 4)
    for call in (lambda: WithAnd().mask(5), lambda: sparse_attention(x, x, x, WithAnd())):
        with pytest.raises((TypeError, ValueError), match=r"WithAnd\(\).*`and`") as raised:
            call()
        assert raised.value.__cause__ is not None


def test_an_own_pattern_is_traced_once():
    calls = []

    class Counted(Pattern):
        def __call__(self, q_pos, k_pos):
            calls.append(1)
            return k_pos <= q_pos

    layer = SelfAttention(2, 4, Counted())
    layer(keras.Input((None, 6)))
    first = len(calls)
    layer(keras.Input((None, 6)))
    assert 0 < first == len(calls)
