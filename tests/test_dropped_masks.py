"""A mask that got lost on the way to a layer is reported, once, and nothing else is."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from sparse_attn import Causal, Local
from sparse_attn.layers import (
    GroupedQueryAttention,
    LocalSelfAttention,
    MultiHeadAttention,
    PositionEmbedding,
    SelfAttention,
    SinePositionEncoding,
    TransformerBlock,
)
from tests.compare import to_numpy


def embedded(mask_zero=True, length=None):
    tokens = keras.Input((length,), dtype="int32")
    return layers.Embedding(9, 8, mask_zero=mask_zero)(tokens)


def pooled(x):
    return layers.GlobalAveragePooling1D(keepdims=True)(x)


def attention(x, **options):
    return SelfAttention(2, 4, Local(3))(x, **options)


@keras.saving.register_keras_serializable(package="tests")
class EndsMasks(layers.Layer):
    """Its outputs have no padding: it says so as Keras' layers do."""

    supports_masking = True

    def call(self, x, mask=None):
        return x

    def compute_mask(self, x, mask=None):
        return None


DROPPED = {
    "plus": (lambda x: x + PositionEmbedding(16)(x), "Add"),
    "plus on the right": (lambda x: SinePositionEncoding()(x) + x, "Add"),
    "times": (lambda x: x * 2.0, "Multiply"),
    "a residual": (lambda x: x + attention(x), "Add"),
    "ops": (lambda x: ops.sqrt(ops.abs(x)), "Absolute"),
    "a layer behind": (lambda x: layers.LayerNormalization()(x + 1.0), "Add"),
    "many layers behind": (lambda x: layers.Dense(8)(layers.Dropout(0.1)(1.0 * x)), "Multiply"),
    "a slice": (lambda x: x[:, 1:], "GetItem"),
    "behind one another": (lambda x: ops.concatenate([x, x], axis=1), "Concatenate"),
    "add of an unmasked one": (lambda x: layers.add([x, embedded(mask_zero=False)]), "Add"),
    "of features": (lambda x: layers.add([x + 1.0, x + 2.0]), "Add"),
    "add of one position": (lambda x: layers.add([x, keras.Input((1, 8))]), "Add"),
    "times one position": (lambda x: layers.multiply([keras.Input((1, 8)), x]), "Multiply"),
    "a gate": (lambda x: layers.multiply([x, pooled(x)]), "Multiply"),
    "add by keyword": (lambda x: layers.Add()(inputs=[x, embedded(mask_zero=False)]), "Add"),
}


@pytest.mark.parametrize("length", [None, 8])
@pytest.mark.parametrize(("change", "name"), DROPPED.values(), ids=DROPPED)
def test_a_mask_that_an_operation_dropped_is_reported(change, name, length):
    x = change(embedded(length=length))
    told = rf"(?s)mask of `query` did not arrive at layer 'self.*of type {name}\).*layers.add"
    with pytest.warns(UserWarning, match=told):
        SelfAttention(2, 4, name="self_attention")(x)


CALLS = {
    "self": lambda x: SelfAttention(2, 4),
    "local": lambda x: LocalSelfAttention(2, 4, 3, causal=True),
    "multi-head": lambda x: MultiHeadAttention(2, 4),
    "grouped": lambda x: GroupedQueryAttention(4, 2, 1, pattern=Causal()),
}


@pytest.mark.parametrize("kind", CALLS)
def test_every_layer_reports_it_once(kind):
    x = embedded() + 1.0
    layer = CALLS[kind](x)
    inputs = (x,) if isinstance(layer, SelfAttention) else (x, x)
    with pytest.warns(UserWarning, match="did not arrive") as caught:
        layer(*inputs)
    assert len(caught) == 1
    layer(*inputs)  # an error if it warned


def test_it_is_reported_of_the_input_that_lost_it():
    x = embedded()
    with pytest.warns(UserWarning, match="mask of `value`"):
        MultiHeadAttention(2, 4)(x, x + 1.0)
    with pytest.warns(UserWarning, match="mask of `value`"):
        MultiHeadAttention(2, 4)(x + 1.0, x + 2.0, query_mask=keras.Input((None,), dtype="bool"))
    with pytest.warns(UserWarning, match="mask of `key`"):
        MultiHeadAttention(2, 4)(x, embedded(mask_zero=False), x + 1.0)


def test_where_only_queries_lost_it_the_layer_behind_reports_it():
    x = embedded()
    y = MultiHeadAttention(2, 4)(x + 1.0, x)  # an error if it warned
    with pytest.warns(UserWarning, match="of type Add"):
        attention(y)


@pytest.mark.parametrize("place", [slice(1), slice(-1, None)], ids=["first", "last"])
def test_one_query_of_an_unknown_length_attends_to_no_padding_and_is_silent(place):
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(tokens)
    model = keras.Model(tokens, MultiHeadAttention(2, 4)(x[:, place], x))
    found = to_numpy(model(np.array([[0, 0, 1, 2, 3, 0, 0]])))
    expected = to_numpy(model(np.array([[0, 1, 2, 3, 0]])))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_it_is_reported_with_mixed_precision(dtype):
    x = embedded()
    SelfAttention(2, 4, dtype=dtype)(x)
    with pytest.warns(UserWarning, match="of type Add"):
        SelfAttention(2, 4, dtype=dtype)(x + 1.0)


def decoder():
    """Queries without padding look at an encoder's outputs, which have some."""
    x = embedded(mask_zero=False)
    return layers.add([x, MultiHeadAttention(2, 4)(x, embedded())])


SILENT = {
    "the mask arrives": lambda: attention(embedded()),
    "no mask": lambda: attention(embedded(mask_zero=False) + 1.0),
    "an input": lambda: attention(keras.Input((None, 8)) * 2.0),
    "add": lambda: attention(layers.add([x := embedded(), PositionEmbedding(16)(x)])),
    "a residual": lambda: attention(layers.add([x := embedded(), attention(x)])),
    "a residual of Keras": lambda: attention(
        layers.add([x := embedded(), layers.MultiHeadAttention(2, 4)(x, x)])
    ),
    "by name": lambda: attention(embedded() + 1.0, mask=keras.Input((None,), dtype="bool")),
    "query_mask by name": lambda: attention(
        embedded() + 1.0, query_mask=keras.Input((None,), dtype="bool")
    ),
    "key_mask by name": lambda: attention(
        embedded() + 1.0, key_mask=keras.Input((None,), dtype="bool")
    ),
    "pairs by name": lambda: attention(
        embedded() + 1.0, attention_mask=keras.Input((None, None), dtype="bool")
    ),
    "value_mask by name": lambda: MultiHeadAttention(2, 4)(
        x := embedded() + 1.0, x, value_mask=keras.Input((None,), dtype="bool")
    ),
    "a layer that ends it": lambda: attention(EndsMasks()(embedded())),
    "plus behind a layer that ends it": lambda: attention(EndsMasks()(embedded()) + 1.0),
    "pooling": lambda: attention(
        layers.RepeatVector(4)(layers.GlobalAveragePooling1D()(embedded()))
    ),
    "pooling of what lost it": lambda: attention(
        layers.RepeatVector(4)(layers.GlobalAveragePooling1D()(embedded() + 1.0))
    ),
    "flattened": lambda: attention(
        layers.Reshape((4, 8))(layers.Flatten()(embedded(length=4) + 1.0))
    ),
    "a mean": lambda: attention(ops.mean(embedded(), axis=1, keepdims=True)),
    "one position": lambda: attention(embedded(length=8)[:, :1]),
    "queries alone": lambda: MultiHeadAttention(2, 4)(embedded() + 1.0, embedded()),
    "queries alone, keys by name": lambda: MultiHeadAttention(2, 4)(
        embedded() + 1.0, embedded(mask_zero=False), key_mask=keras.Input((None,), dtype="bool")
    ),
    "a pooled query": lambda: MultiHeadAttention(2, 4)(pooled(x := embedded()), x),
    "Keras' attention of unmasked queries": lambda: attention(
        layers.Attention()([embedded(mask_zero=False), embedded()])
    ),
    "an encoder's": lambda: attention(decoder()),
    "an encoder's, by hand": lambda: attention(
        ops.matmul(ops.softmax(keras.Input((5, 6))), embedded(length=6))
    ),
    "of positions in another place": lambda: attention(
        ops.transpose(embedded(length=8) + 1.0, (0, 2, 1))
    ),
    "a layer that would drop it": lambda: attention(layers.AveragePooling1D(2)(embedded() + 1.0)),
}


@pytest.mark.parametrize("make", SILENT.values(), ids=SILENT)
def test_nothing_else_is_reported(make):
    make()  # an error if it warned


def test_where_keras_has_warned_there_is_no_second_warning():
    with pytest.warns(UserWarning, match="does not support masking"):
        x = layers.Conv1D(8, 3, padding="same")(embedded())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(x)


def test_a_long_history_is_searched_once():
    x = embedded(mask_zero=False)
    for _ in range(60):  # 2 ** 60 ways lead back
        x = layers.add([x, x])
        x = x + x
    attention(x)


STACKS = {
    "attention": lambda x: SelfAttention(2, 4)(x),
    "residuals": lambda x: x + MultiHeadAttention(2, 4)(x, x),
    "blocks": lambda x: TransformerBlock(2, 4, Local(3), 8)(x),
}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_one_dropped_mask_is_reported_once_whatever_layers_are_behind_it(stack):
    with pytest.warns(UserWarning, match="of type Add") as caught:
        x = stack(embedded() + 1.0)
    assert len(caught) == 1
    for _ in range(3):
        x = stack(x)  # an error if it warned


def test_two_dropped_masks_are_reported_both():
    first, second = embedded() + 1.0, embedded() * 2.0
    with pytest.warns(UserWarning, match="of type Add"):
        first = attention(first)
    with pytest.warns(UserWarning, match="of type Multiply"):
        attention(layers.add([second, first]))
    with pytest.warns(UserWarning, match="of type Subtract"):  # it is another call
        attention(embedded() - 1.0)


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_the_warning_points_at_the_line_of_the_user(stack):
    x = embedded() + 1.0
    with pytest.warns(UserWarning, match="did not arrive") as caught:
        stack(x)
    line = stack.__code__.co_firstlineno
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]


def test_what_is_loaded_or_cloned_does_not_report_it_again(tmp_path):
    x = keras.Input((None,), dtype="int32")
    y = layers.Embedding(9, 8, mask_zero=True)(x)
    with pytest.warns(UserWarning, match="did not arrive"):
        y = attention(y * 2.0)
    z = layers.Embedding(9, 8, mask_zero=True)(x)
    with pytest.warns(UserWarning, match="did not arrive"):
        model = keras.Model(x, layers.add([y, TransformerBlock(2, 4, None, 8)(z * 3.0)]))
    model.save(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras")
    keras.models.clone_model(model)
    keras.models.model_from_json(model.to_json())


def test_what_it_says_to_do_keeps_padding_out():
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(tokens)
    position, attend = PositionEmbedding(16), SelfAttention(2, 4, Local(3))
    model = keras.Model(tokens, attend(layers.add([x, position(x)])))
    with pytest.warns(UserWarning, match="did not arrive"):
        leaks = keras.Model(tokens, LocalSelfAttention(2, 4, 3)(x + position(x)))
    padded, alone = np.array([[1, 2, 3, 0, 0, 0]]), np.array([[1, 2, 3]])
    found, expected = (to_numpy(model(each)) for each in (padded, alone))
    np.testing.assert_allclose(found[:, :3], expected, atol=1e-6)
    found, expected = (to_numpy(leaks(each)) for each in (padded, alone))
    assert np.abs(found[:, :3] - expected).max() > 1e-3
    by_name = attend(x + position(x), mask=layers.Lambda(lambda x: x > 0)(tokens))
    model = keras.Model(tokens, by_name)
    found, expected = (to_numpy(model(each)) for each in (padded, alone))
    np.testing.assert_allclose(found[:, :3], expected, atol=1e-6)
