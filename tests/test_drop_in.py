"""The layers take the place of Keras' own: arguments, calls, weights, files; and err less."""

import functools
import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from sparse_attn import (
    ALiBi,
    Axial,
    Band,
    BigBird,
    Blocks,
    Causal,
    Full,
    Global,
    Grid,
    Local,
    Neighborhood,
    Pattern,
    PerHead,
    PositionBias,
    Prefix,
    Strided,
)
from sparse_attn.layers import (
    GroupedQueryAttention,
    MultiHeadAttention,
    RelativePositionBias,
    RotaryEmbedding,
    SelfAttention,
    TransformerBlock,
)
from tests.cases import Near
from tests.compare import BACKEND, outputs_and_gradients, to_numpy

rng = np.random.default_rng(0)


def inputs(n=13, features=6, b=2, seed=0):
    return np.random.default_rng(seed).normal(size=(b, n, features)).astype("float32")


MAKE = {
    "plain": {},
    "value_dim": {"value_dim": 5},
    "no bias": {"use_bias": False},
    "gate": {"use_gate": True, "value_dim": 5},
    "output int": {"output_shape": 7},
    "output tuple": {"output_shape": (3, 2)},
    "window": {"sliding_window": 10},
    "dropout": {"dropout": 0.3},
    "all axes": {"attention_axes": (1,)},
}
CALL = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "not causal, as an int": {"use_causal_mask": 0, "return_attention_scores": 1},
    "ints": {"attention_mask": (rng.random((2, 13, 9)) < 0.8).astype("int32")},
    "by head": {"attention_mask": rng.random((2, 2, 13, 9)) < 0.8},
    "for all": {"attention_mask": rng.random((13, 9)) < 0.9},
    "for all queries": {"attention_mask": rng.random((2, 1, 9)) < 0.8},
    "for all queries and heads": {"attention_mask": rng.random((2, 1, 1, 9)) < 0.8},
    "value_mask": {"value_mask": np.arange(9)[None] < np.array([[9], [4]])},
    "key": {"key": inputs(9, 4, seed=3), "key_mask": np.arange(9)[None] < np.array([[9], [4]])},
    "scores": {"return_attention_scores": True, "use_causal_mask": True},
}


def as_tuple(x):
    return x if isinstance(x, (tuple, list)) else (x,)


@pytest.mark.parametrize("call", CALL.values(), ids=CALL)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_equals_multi_head_attention_of_keras(make, call):
    query, value = inputs(13), inputs(9, 5, seed=1)
    theirs = keras.layers.MultiHeadAttention(2, 4, **make)
    # On JAX, Keras' fused path takes no `value_dim`; with the scores asked for it is another one.
    asked = {"return_attention_scores": True} if BACKEND == "jax" and "value_dim" in make else {}
    count = 1 + call.get("return_attention_scores", False)
    expected = as_tuple(theirs(query, value, **{**call, **asked}))[:count]
    ours = MultiHeadAttention(2, 4, **make)
    ours.build(query.shape, value.shape, np.shape(call["key"]) if "key" in call else None)
    weights = theirs.get_weights()
    ours.set_weights(weights)
    assert len(ours.weights) == len(weights)
    for x, y in zip(as_tuple(ours(query, value, **call)), expected, strict=True):
        np.testing.assert_allclose(to_numpy(x), to_numpy(y), atol=2e-5)


@pytest.mark.parametrize("call", CALL.values(), ids=CALL)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_equals_grouped_query_attention_of_keras(key_heads, call):
    call = {name: x for name, x in call.items() if np.ndim(x) != 4}
    query, value = inputs(13), inputs(9, seed=1)
    options = {"use_gate": True, "sliding_window": 10}
    theirs = keras.layers.GroupQueryAttention(3, 4, key_heads, **options)
    expected = theirs(query, value, **call)
    ours = GroupedQueryAttention(3, 4, key_heads, **options)
    ours.build(query.shape, value.shape, np.shape(call["key"]) if "key" in call else None)
    ours.set_weights(theirs.get_weights())
    for x, y in zip(as_tuple(ours(query, value, **call)), as_tuple(expected), strict=True):
        np.testing.assert_allclose(to_numpy(x), to_numpy(y), atol=2e-5)


@pytest.mark.parametrize("pattern", [Local(3), Causal() & Strided(3), PerHead([Local(2), Full()])])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_shared_keys_are_those_of_repeated_ones(pattern, key_heads):
    """Values and gradients: against a layer that has a copy for each head of queries."""
    x, cotangent = inputs(17), inputs(17, seed=2)
    ours = GroupedQueryAttention(3, 4, key_heads, pattern=pattern)
    wide = MultiHeadAttention(4, 3, pattern=pattern)
    ours.build(x.shape, x.shape)
    wide.build(x.shape, x.shape)
    weights = ours.get_weights()
    repeated = [
        np.repeat(w.reshape(*w.shape[:-1], key_heads, 3), 4 // key_heads, axis=-2).reshape(
            *w.shape[:-1], 12
        )
        if 2 <= place < 6
        else w
        for place, w in enumerate(weights)
    ]

    def outputs(layer, values):
        def function(x, *values):
            out, _ = layer.stateless_call(values, [], x, x)
            return [out]

        return outputs_and_gradients(function, [x, *values], [cotangent])

    (found,), gradients = outputs(ours, weights)
    (expected,), by_repeated = outputs(wide, repeated)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(gradients[0], by_repeated[0], atol=1e-5)
    for gradient, other in zip(gradients[1:], by_repeated[1:], strict=True):
        if gradient.shape != other.shape:
            lead = gradient.shape[:-1]
            other = (
                other.reshape(*lead, key_heads, 4 // key_heads, 3).sum(axis=-2).reshape(*lead, -1)
            )
        np.testing.assert_allclose(gradient, other, atol=1e-5)


# ---- Better where Keras errs -------------------------------------------------


def test_an_explicit_query_mask_is_honoured():
    x, mask = inputs(13), np.arange(13)[None] < np.array([[13], [5]])
    layer = MultiHeadAttention(2, 4, use_bias=False)
    found = to_numpy(layer(x, x, query_mask=mask))
    assert not found[1, 5:].any()
    np.testing.assert_allclose(found[mask], to_numpy(layer(x, x))[mask], atol=1e-6)


def test_scores_change_no_output_and_a_masked_row_is_zero():
    x = inputs(13)
    mask = np.zeros((13, 13), bool)
    mask[:5] = True
    for layer in (MultiHeadAttention(2, 4), MultiHeadAttention(2, 4, dropout=0.2)):
        alone = to_numpy(layer(x, x, attention_mask=mask))
        beside, weights = layer(x, x, attention_mask=mask, return_attention_scores=True)
        np.testing.assert_array_equal(alone, to_numpy(beside))
        assert not to_numpy(weights)[:, :, 5:].any()


def test_the_mask_of_the_callers_tensor_stays():
    tokens = np.array([[1, 2, 3, 0, 0], [3, 3, 1, 1, 2]])
    x = keras.layers.Embedding(4, 8, mask_zero=True)(tokens)
    out = MultiHeadAttention(2, 4)(x, x)
    np.testing.assert_array_equal(to_numpy(x._keras_mask), tokens > 0)
    np.testing.assert_array_equal(to_numpy(out._keras_mask), tokens > 0)


def test_symbolic_shapes_of_cross_attention():
    query, value = keras.Input((5, 6)), keras.Input((9, 7))
    for layer, heads in (
        (MultiHeadAttention(2, 4, value_dim=3), 2),
        (GroupedQueryAttention(4, 6, 3), 6),
    ):
        out, scores = layer(query, value, return_attention_scores=True)
        assert (out.shape, scores.shape) == ((None, 5, 6), (None, heads, 5, 9))
        found = layer(inputs(5), inputs(9, 7), return_attention_scores=True)
        assert [tuple(x.shape) for x in found] == [(2, 5, 6), (2, heads, 5, 9)]


def test_configs_are_whole():
    mha = keras.layers.MultiHeadAttention(2, 4, sliding_window=3).get_config()
    ours = MultiHeadAttention.from_config(mha)
    assert ours.pattern == Local(2)
    assert ours.get_config().items() >= {k: v for k, v in mha.items() if k != "dtype"}.items()
    gqa = keras.layers.GroupQueryAttention(2, 4, 2).get_config()
    ours = GroupedQueryAttention.from_config(gqa)
    assert (ours.head_dim, ours.num_query_heads, ours.num_key_value_heads) == (2, 4, 2)


# ---- Several axes of positions -----------------------------------------------


def test_positions_run_through_all_axes_row_by_row():
    images = np.random.default_rng(0).normal(size=(2, 4, 3, 6)).astype("float32")
    mask = np.random.default_rng(1).random((2, 4, 3)) < 0.8
    layer = SelfAttention(2, 4, Neighborhood((4, 3), 1), output_shape=5)
    out, weights = layer(images, mask=mask, return_attention_scores=True)
    flat = images.reshape(2, 12, 6)
    expected, flat_weights = layer(flat, mask=mask.reshape(2, 12), return_attention_scores=True)
    assert tuple(weights.shape) == (2, 2, 4, 3, 4, 3)
    np.testing.assert_array_equal(to_numpy(out).reshape(2, 12, 5), to_numpy(expected))
    np.testing.assert_array_equal(to_numpy(weights).reshape(2, 2, 12, 12), to_numpy(flat_weights))
    symbolic, scores = layer(keras.Input((None, 3, 6)), return_attention_scores=True)
    assert symbolic.shape == (None, None, 3, 5)
    assert scores.shape == (None, 2, None, 3, None, 3)


def test_equals_keras_with_several_axes():
    query, value = inputs(12).reshape(2, 4, 3, 6), inputs(10, seed=1).reshape(2, 2, 5, 6)
    mask = rng.random((2, 4, 3, 2, 5)) < 0.9
    theirs = keras.layers.MultiHeadAttention(2, 4)
    expected = theirs(query, value, attention_mask=mask)
    ours = MultiHeadAttention(2, 4, attention_axes=(-2, 1))
    ours.build(query.shape, value.shape)
    ours.set_weights(theirs.get_weights())
    found = ours(query, value, attention_mask=mask)
    np.testing.assert_allclose(to_numpy(found), to_numpy(expected), atol=2e-5)


GRIDS = {
    "neighborhood": Neighborhood((8, 4), 1),
    "axial": Axial((8, 4)),
    "grid": Grid((4,), (Band(1, 1), Band(1, 1))),
    "and": Causal() & Neighborhood((8, 4), 1),
    "or": Prefix(1) | (Local(9) & Axial((8, 4))),
    "not": ~Neighborhood((8, 4), 1),
    "per head": PerHead([Full(), Axial((8, 4))]),
}
every_grid = pytest.mark.parametrize("pattern", GRIDS.values(), ids=GRIDS)


@every_grid
@pytest.mark.parametrize(
    "axes", [(4, 8), (3, 8, 4), (8, 5), (2, 4, 4)], ids=["transposed", "channels", "wide", "film"]
)
def test_axes_that_are_not_those_of_the_grid_are_an_error(pattern, axes):
    layer = SelfAttention(2, 4, pattern)
    told = r"`query` must be those of the grid of .*\((8|None), 4\).*Received: query.shape="
    with pytest.raises(ValueError, match=told):
        layer(np.ones((1, *axes, 6), "float32"))
    with pytest.raises(ValueError, match=told):
        SelfAttention(2, 4, pattern)(keras.Input((*axes, 6)))
    with pytest.raises(ValueError, match=told):
        SelfAttention(2, 4, pattern).compute_output_shape((1, *axes, 6))


@every_grid
def test_axes_of_the_grid_and_flat_inputs_pass(pattern):
    layer = SelfAttention(2, 4, pattern)
    image = np.random.default_rng(0).normal(size=(1, 8, 4, 6)).astype("float32")
    expected = to_numpy(layer(image.reshape(1, 32, 6)))
    np.testing.assert_allclose(to_numpy(layer(image)).reshape(1, 32, 6), expected, atol=1e-6)
    assert layer(image[:, :5]).shape == (1, 5, 4, 6)  # the first rows
    assert layer(keras.Input((None, 4, 6))).shape == (None, None, 4, 6)
    assert layer(keras.Input((None, None, 6))).shape == (None, None, None, 6)


def test_more_rows_than_the_grid_has_are_an_error():
    with pytest.raises(ValueError, match=r"\(8, 4\)"):
        SelfAttention(2, 4, Neighborhood((8, 4), 1))(np.ones((1, 9, 4, 6), "float32"))
    grid = Grid((4,), (Band(1, 1), Band(1, 1)))  # whose rows have no end
    assert SelfAttention(2, 4, grid)(np.ones((1, 9, 4, 6), "float32")).shape == (1, 9, 4, 6)


def test_patterns_of_one_axis_say_nothing_about_others():
    image = np.ones((1, 8, 4, 6), "float32")
    for pattern in (Neighborhood((32,), 2), Local(3), Blocks(4), Global((1, 2)), BigBird(32, 4)):
        assert pattern.grid_shapes == ()
        assert SelfAttention(2, 4, pattern)(image).shape == image.shape


def test_axes_of_keys_are_those_of_the_grid():
    layer = MultiHeadAttention(2, 4, pattern=Neighborhood((8, 4), 1))
    query, value = np.ones((1, 8, 4, 6), "float32"), np.ones((1, 4, 8, 6), "float32")
    with pytest.raises(ValueError, match="`key` must be those of the grid"):
        layer(query, value)
    with pytest.raises(ValueError, match="`key` must be those of the grid"):
        layer(query.reshape(1, 32, 6), value)
    assert layer(query[:, :1, 1:3], query, query_positions=9).shape == (1, 1, 2, 6)


def test_axes_that_were_unknown_are_looked_at_once_they_are_there():
    layer = SelfAttention(2, 4, Axial((8, 4)))
    inputs = keras.Input((None, None, 6))
    model = keras.Model(inputs, layer(inputs))
    image = np.random.default_rng(0).normal(size=(1, 8, 4, 6)).astype("float32")
    np.testing.assert_allclose(model.predict(image, verbose=0), to_numpy(layer(image)), atol=1e-5)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        call = tf.function(layer, input_signature=[tf.TensorSpec((1, None, None, 6))])
        np.testing.assert_allclose(to_numpy(call(image)), to_numpy(layer(image)), atol=1e-5)
        with pytest.raises(tf.errors.InvalidArgumentError, match="must be those of the grid"):
            call(np.swapaxes(image, 1, 2))
    else:
        with pytest.raises(ValueError, match="must be those of the grid"):
            model.predict(np.swapaxes(image, 1, 2), verbose=0)


# ---- Models and files of Keras -----------------------------------------------


def keras_model(layer=keras.layers.MultiHeadAttention, **options):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(20, 6, mask_zero=True)(tokens)
    x = x + layer(2, 4, name="attention", **options)(x, x, use_causal_mask=True)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(3)(x))


def tokens(n=11, b=3):
    return np.random.default_rng(n).integers(1, 20, (b, n))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1, "use_gate": True, "value_dim": 5}])
def test_a_weights_file_of_keras_loads(options, tmp_path):
    theirs, ours = keras_model(**options), keras_model(MultiHeadAttention, **options)
    theirs.save_weights(tmp_path / "model.weights.h5")
    ours.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(
        ours.predict(tokens(), verbose=0), theirs.predict(tokens(), verbose=0), atol=1e-5
    )
    ours.save_weights(tmp_path / "ours.weights.h5")
    again = keras_model(MultiHeadAttention, **options)
    again.load_weights(tmp_path / "ours.weights.h5")
    np.testing.assert_array_equal(
        ours.predict(tokens(), verbose=0), again.predict(tokens(), verbose=0)
    )


def test_a_weights_file_of_other_sizes_gets_keras_own_message(tmp_path):
    keras_model(value_dim=5).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="value"):
        keras_model(MultiHeadAttention).load_weights(tmp_path / "model.weights.h5")


def transposed(weights):
    return [weights[0].T, *weights[1:]]


def flattened(weights):
    return [weights[0].reshape(-1), *weights[1:]]


def of_other_heads(weights):
    return [weights[0].reshape(6, 4, 2), *weights[1:]]


def heads_first(weights):
    return [weights[0].reshape(2, 4, 6), *weights[1:]]


def of_the_output(weights):  # whose kernel has the heads in front
    return [*weights[:-2], weights[-2].reshape(6, 2, 4), weights[-1]]


def of_a_bias(weights):
    return [weights[0], weights[1].reshape(4, 2), *weights[2:]]


@pytest.mark.parametrize("change", [transposed, flattened, of_other_heads, heads_first])
@pytest.mark.parametrize("output", [of_the_output, of_a_bias, None])
def test_weights_of_another_shape_are_refused(change, output):
    for layer in (MultiHeadAttention(2, 4), SelfAttention(2, 4), GroupedQueryAttention(4, 2, 2)):
        layer.build(*([(None, None, 6)] * (1 if isinstance(layer, SelfAttention) else 2)))
        weights = layer.get_weights()
        wrong = (change if output is None else output)(weights)
        with pytest.raises(ValueError, match=r"weight '.*(kernel|bias)' must have shape \(.*Recei"):
            layer.set_weights(wrong)
        for found, expected in zip(layer.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(found, expected)


def attention_model(layer, features=8):
    inputs = keras.Input((None, features))
    return keras.Model(inputs, layer(inputs, inputs))


FILES = {
    "keras, other heads": (keras.layers.MultiHeadAttention, (4, 2), (2, 4), 8),
    "own, other heads": (MultiHeadAttention, (4, 2), (2, 4), 8),
    "own, other features": (MultiHeadAttention, (2, 8), (2, 4), 16),
    "own, other heads of keys": (GroupedQueryAttention, (2, 4, 4), (4, 4, 2), 8),
}


@pytest.mark.parametrize("suffix", ["weights.h5", "keras"])
@pytest.mark.parametrize(("kind", "saved", "wanted", "features"), FILES.values(), ids=FILES)
def test_a_file_of_another_shape_is_refused(kind, saved, wanted, features, suffix, tmp_path):
    options, path = {"use_bias": False, "name": "attention"}, tmp_path / f"model.{suffix}"
    ours = GroupedQueryAttention if kind is GroupedQueryAttention else MultiHeadAttention
    written = attention_model(kind(*saved, **options))
    model = attention_model(ours(*wanted, **options), features)
    written.save_weights(path) if suffix == "weights.h5" else written.save(path)
    with pytest.raises(ValueError, match=r"must have shape \(.*Received: shape="):
        model.load_weights(path)


@pytest.mark.parametrize("options", [{}, {"output_shape": (3, 2), "use_gate": True}])
def test_a_file_of_ours_is_one_of_keras(options, tmp_path):
    options = {**options, "name": "attention"}
    ours = attention_model(MultiHeadAttention(2, 4, **options))
    theirs = attention_model(keras.layers.MultiHeadAttention(2, 4, **options))
    ours.save_weights(tmp_path / "model.weights.h5")
    theirs.load_weights(tmp_path / "model.weights.h5")
    x = inputs(5, 8)
    np.testing.assert_allclose(to_numpy(theirs(x)), to_numpy(ours(x)), atol=1e-5)


def test_a_file_of_flat_kernels_loads(tmp_path):
    """As an earlier version wrote them: those of a Dense layer."""
    ours, plain = MultiHeadAttention(2, 4), keras.layers.Dense(8)
    ours.build((None, None, 8), (None, None, 8))
    plain.build((None, 8))
    store = {}
    plain.save_own_variables(store)
    ours.query_dense.load_own_variables({name: to_numpy(x) for name, x in store.items()})
    np.testing.assert_array_equal(to_numpy(ours.query_dense.kernel), to_numpy(plain.kernel))


def test_cloning_turns_the_layers_of_a_model_into_ours():
    theirs = keras_model()

    def convert(layer):
        if isinstance(layer, keras.layers.MultiHeadAttention):
            return MultiHeadAttention.from_config({**layer.get_config(), "pattern": Full()})
        return layer.__class__.from_config(layer.get_config())

    ours = keras.models.clone_model(theirs, clone_function=convert)
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        layer.set_weights(other.get_weights())
    assert isinstance(ours.get_layer("attention"), MultiHeadAttention)
    np.testing.assert_allclose(
        ours.predict(tokens(), verbose=0), theirs.predict(tokens(), verbose=0), atol=1e-5
    )


def test_a_model_can_be_cloned_and_made_from_json():
    ours = keras_model(MultiHeadAttention, pattern=Local(3))
    for again in (keras.models.clone_model(ours), keras.models.model_from_json(ours.to_json())):
        again.set_weights(ours.get_weights())
        assert again.get_layer("attention").pattern == Local(3)
        np.testing.assert_array_equal(
            ours.predict(tokens(), verbose=0), again.predict(tokens(), verbose=0)
        )


class Unregistered(Pattern):
    def __call__(self, q_pos, k_pos):
        return q_pos >= k_pos


def test_a_file_with_an_unknown_pattern_names_what_to_import(tmp_path, monkeypatch):
    model = keras_model(MultiHeadAttention, pattern=Unregistered())
    with pytest.warns(UserWarning, match="'Unregistered', a class that is not registered"):
        model.save(tmp_path / "model.keras")
    monkeypatch.delattr("tests.test_drop_in.Unregistered")
    with pytest.raises((TypeError, ValueError), match=r"(?s)Unregistered.*import"):
        keras.models.load_model(tmp_path / "model.keras")


OF_UNREGISTERED = {
    "MultiHeadAttention": lambda: MultiHeadAttention(2, 4, pattern=Unregistered()),
    "SelfAttention": lambda: SelfAttention(2, 4, Unregistered()),
    "TransformerBlock": lambda: TransformerBlock(2, 4, Unregistered(), 8),
}


@pytest.mark.parametrize("make", OF_UNREGISTERED.values(), ids=OF_UNREGISTERED)
def test_a_pattern_that_is_not_registered_is_told_once_at_the_line_that_saves_it(make, tmp_path):
    layer = make()
    x = keras.Input((5, 6))
    model = keras.Model(x, layer(x, x) if type(layer) is MultiHeadAttention else layer(x))
    with pytest.warns(UserWarning, match="not registered") as caught:
        model.save(tmp_path / "model.keras")
    found = [each for each in caught if "not registered" in str(each.message)]
    assert [each.filename for each in found] == [__file__]


@pytest.mark.filterwarnings("ignore:`pattern` holds 'Unregistered'")
def test_a_model_with_a_pattern_that_is_not_registered_says_how_it_can_be_cloned():
    model = keras_model(MultiHeadAttention, pattern=Unregistered())
    for make in (keras.models.clone_model, lambda x: keras.models.model_from_json(x.to_json())):
        with pytest.raises(ValueError, match=r"(?s)nor cloned.*custom_object_scope\(\{'Unreg"):
            make(model)
        with keras.saving.custom_object_scope({"Unregistered": Unregistered}):
            assert make(model).get_layer("attention").pattern == Unregistered()


class WithoutConfig(PositionBias):
    def bias(self, q_pos, k_pos, head):
        return 0.0 * (q_pos - k_pos)


@pytest.mark.parametrize("score_mod", [WithoutConfig(), [ALiBi(2), WithoutConfig()]])
def test_saving_a_score_mod_without_config_names_it(score_mod, tmp_path):
    model = keras_model(MultiHeadAttention, score_mod=score_mod)
    told = r"`score_mod` must be .*`get_config`. Received: score_mod=<.*WithoutConfig"
    for make in (keras.models.clone_model, lambda x: x.save(tmp_path / "model.keras")):
        with pytest.raises(ValueError, match=told):
            make(model)


@pytest.mark.parametrize("pattern", [Unregistered(), Causal() & ~Unregistered()], ids=repr)
def test_saving_a_pattern_that_is_not_registered_warns(pattern):
    for layer in (SelfAttention(2, 4, pattern), MultiHeadAttention(2, 4, pattern=pattern)):
        with pytest.warns(UserWarning, match=r"'Unregistered', a class.*register_keras_serializ"):
            layer.get_config()
        with pytest.warns(UserWarning, match="is not registered"):
            keras.saving.serialize_keras_object(layer)
    SelfAttention(2, 4, Causal() & Near(3)).get_config()  # that one is


WRITTEN = """
import sys, warnings
import keras, numpy as np
from sparse_attn import Causal, Pattern
from sparse_attn.layers import SelfAttention

class Back(Pattern):
    def __call__(self, q_pos, k_pos):
        return q_pos - k_pos < 3

warnings.simplefilter("ignore")
x = keras.Input((5, 6))
model = keras.Model(x, SelfAttention(2, 4, Causal() & Back())(x))
model.save(sys.argv[1] + "/model.keras")
np.save(sys.argv[1] + "/out.npy", model.predict(np.ones((1, 5, 6)), verbose=0))
"""
LOADED = """
import sys
import keras, numpy as np
from sparse_attn import Pattern

def load(**options):
    return keras.models.load_model(sys.argv[1] + "/model.keras", **options)

def check(model):
    found = model.predict(np.ones((1, 5, 6)), verbose=0)
    np.testing.assert_allclose(found, np.load(sys.argv[1] + "/out.npy"), atol=1e-6)

class Back(Pattern):
    def __call__(self, q_pos, k_pos):
        return q_pos - k_pos < 3

try:
    load()
except (TypeError, ValueError) as error:
    told = str(error)
assert "'Back'" in told and "register_keras_serializable" in told, told
check(load(custom_objects={"Back": Back}))
keras.saving.register_keras_serializable()(Back)
check(load())
"""


def test_the_advice_on_loading_works_in_a_fresh_process(tmp_path):
    for code in (WRITTEN, LOADED):
        command = [sys.executable, "-c", code, str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        assert run.returncode == 0, run.stderr


@keras.saving.register_keras_serializable(package="tests")
class Twice(keras.layers.Layer):
    """A user's layer of scores, whose `build` is Keras' own."""

    def call(self, scores, q_pos, k_pos, head):
        return 2 * scores


def test_scores_may_go_through_a_users_layer(tmp_path):
    x = inputs()
    layer = SelfAttention(2, 4, Local(3), score_mod=Twice())
    plain = SelfAttention(2, 4, Local(3), score_mod=lambda scores, *_: 2 * scores)
    found, _ = to_numpy(layer(x)), plain(x)
    plain.set_weights(layer.get_weights())
    np.testing.assert_allclose(to_numpy(plain(x)), found, atol=1e-6)
    given = keras.Input((None, 6))
    model = keras.Model(given, layer(given))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), found, atol=1e-5)


def test_masks_of_self_attention_are_joined():
    layer, x = SelfAttention(2, 4), inputs()
    one, other = np.arange(13)[None] < 9, np.arange(13)[None] > 2
    expected = to_numpy(layer(x, mask=np.repeat(one & other, 2, axis=0)))
    np.testing.assert_allclose(to_numpy(layer(x, mask=one, query_mask=other)), expected, atol=1e-6)
    lists = {"mask": one.tolist(), "query_mask": other.tolist()}
    np.testing.assert_allclose(to_numpy(layer(x, **lists)), expected, atol=1e-6)


def test_masks_of_lists_are_taken_by_symbols():
    x = keras.Input(batch_shape=(2, 13, 6))
    mask, ids = (np.arange(13) < [[9], [5]]).tolist(), [[0] * 6 + [1] * 7] * 2
    layer = MultiHeadAttention(2, 4)
    out = layer(x, x, query_mask=mask, value_mask=mask, segment_ids=ids)
    model = keras.Model(x, out)
    expected = layer(
        inputs(), inputs(), query_mask=mask, value_mask=mask, segment_ids=np.array(ids)
    )
    np.testing.assert_allclose(model.predict(inputs(), verbose=0), to_numpy(expected), atol=1e-6)


@pytest.mark.parametrize("kind", ["MultiHeadAttention", "GroupQueryAttention"])
def test_activity_is_regularized_as_by_keras(kind):
    theirs = getattr(keras.layers, kind)
    ours = MultiHeadAttention if kind == "MultiHeadAttention" else GroupedQueryAttention
    args = (2, 4) if ours is MultiHeadAttention else (4, 2, 1)
    layers = [make(*args, activity_regularizer="l2") for make in (theirs, ours)]
    x = inputs()
    for layer in layers:
        layer(x, x)
    layers[1].set_weights(layers[0].get_weights())
    losses = []
    for layer in layers:
        layer(x, x)
        losses.append(to_numpy(sum(layer.losses)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# ---- Fine-tuning and quantizing ----------------------------------------------


def dense_layers(model):
    layer = model.get_layer("attention")
    return [layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense]


def test_lora_trains_and_is_saved(tmp_path):
    model = keras_model(MultiHeadAttention, pattern=Local(3))
    model.build((None, None))
    for dense in dense_layers(model)[::2]:
        dense.enable_lora(2)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    kernel = to_numpy(dense_layers(model)[0]._kernel)
    model.fit(tokens(), np.arange(3), epochs=2, verbose=0)
    np.testing.assert_array_equal(to_numpy(dense_layers(model)[0]._kernel), kernel)
    assert np.abs(to_numpy(dense_layers(model)[0].lora_kernel_b)).max() > 0
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(tokens(), verbose=0)
    np.testing.assert_allclose(again.predict(tokens(), verbose=0), expected, atol=1e-6)
    model.save_weights(tmp_path / "model.weights.h5")
    plain = keras_model(MultiHeadAttention, pattern=Local(3))
    plain.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(plain.predict(tokens(), verbose=0), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.filterwarnings("ignore:Invalid quantization mode")  # of the embedding
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
@pytest.mark.parametrize(
    "make", [MultiHeadAttention, lambda *a, **k: GroupedQueryAttention(4, 2, 1, **k)]
)
def test_a_quantized_model_is_saved(make, mode, tmp_path):
    model = keras_model(make, pattern=Local(3))
    expected = model.predict(tokens(), verbose=0)
    model.quantize(mode)
    for dense in dense_layers(model):
        assert dense.quantization_mode == mode
    found = model.predict(tokens(), verbose=0)
    assert np.abs(found - expected).max() < (0.3 if mode == "int4" else 0.1)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for dense in dense_layers(again):
        assert dense.quantization_mode == mode
    np.testing.assert_allclose(again.predict(tokens(), verbose=0), found, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_a_model_of_quantized_weights_alone_is_saved(tmp_path):
    how = keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    bias = RelativePositionBias(2, embeddings_initializer="normal")
    model = keras_model(MultiHeadAttention, pattern=Local(3), score_mod=bias)
    model.quantize(config=how)
    expected = model.predict(tokens(), verbose=0)
    for _ in range(2):  # what was loaded is saved in its turn
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
        assert all(dense.inputs_quantizer is None for dense in dense_layers(model))
        np.testing.assert_allclose(model.predict(tokens(), verbose=0), expected, atol=1e-6)


def test_a_map_of_policies(tmp_path):
    policies = keras.dtype_policies.DTypePolicyMap()
    int8 = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    policies["attention/query"] = policies["attention/value"] = int8
    model = keras_model(MultiHeadAttention, dtype=policies)
    modes = [dense.quantization_mode for dense in dense_layers(model)]
    assert modes == ["int8", None, "int8", None]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert [dense.quantization_mode for dense in dense_layers(again)] == modes
    np.testing.assert_array_equal(
        again.predict(tokens(), verbose=0), model.predict(tokens(), verbose=0)
    )


@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        (MultiHeadAttention, "mixed_float16"),
        (lambda *a, **k: GroupedQueryAttention(4, 4, 2, **k), "mixed_bfloat16"),
    ],
)
def test_mixed_precision_trains_and_is_saved(layer, dtype, tmp_path):
    model = keras_model(layer, dtype=dtype, pattern=Local(3), use_gate=True)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(tokens(), np.arange(3), epochs=4, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        again.predict(tokens(), verbose=0), model.predict(tokens(), verbose=0)
    )


@pytest.mark.skipif(BACKEND != "tensorflow", reason="looks at a TensorFlow graph")
def test_shared_keys_are_not_repeated_in_memory():
    import tensorflow as tf

    from sparse_attn import sparse_attention

    n, h, d = 512, 16, 64
    tensors = [tf.TensorSpec((1, n, heads, d)) for heads in (h, 1, 1)]
    graph = (
        tf.function(lambda q, k, v: sparse_attention(q, k, v, Local(16)))
        .get_concrete_function(*tensors)
        .graph
    )
    key = graph.inputs[1]
    seen, todo = set(), [key]
    largest = 0
    while todo:  # what is made of the keys by moving them about alone
        for op in todo.pop().consumers():
            moves = op.type in {"Reshape", "Transpose", "Slice", "Pad", "PadV2", "ConcatV2", "Tile"}
            moves = moves or op.type in {"BroadcastTo", "GatherV2", "Identity", "StridedSlice"}
            if moves and op.name not in seen:
                seen.add(op.name)
                todo += op.outputs
                largest = max(largest, *[np.prod(x.shape.as_list()) for x in op.outputs])
    assert 0 < largest < 4 * n * d  # with halos; 16 heads of copies would be 16 times n * d


# ---- Bad input ---------------------------------------------------------------


class Pairs:
    """An object that may be called with scores and positions."""

    def __call__(self, scores, q_pos, k_pos, head):
        return scores


def built():
    layer = MultiHeadAttention(2, 4)
    layer.build((2, 13, 6), (2, 13, 6))
    return layer


BAD = [
    (
        lambda: MultiHeadAttention(2, 4, attention_axes=2)(
            inputs(12).reshape(2, 4, 3, 6), inputs()
        ),
        ValueError,
        r"`attention_axes` must be None or all axes .* Move others .* attention_axes=\(2,\)",
    ),
    (lambda: MultiHeadAttention(2, 4, attention_axes="x"), TypeError, "`attention_axes` must be"),
    (
        lambda: MultiHeadAttention(2, 4, flash_attention=True),
        ValueError,
        "`flash_attention` must be None or False: there is no fused kernel",
    ),
    (lambda: MultiHeadAttention(2, 4, flash_attention=1), TypeError, "`flash_attention` must be"),
    (
        lambda: MultiHeadAttention(2, 4, sliding_window=0),
        ValueError,
        "`sliding_window` must be .*=0",
    ),
    (lambda: MultiHeadAttention(2, 4, sliding_window=1.5), TypeError, "`sliding_window` must be"),
    *[
        (
            lambda name=name: MultiHeadAttention(2, 4, **{name: "nope"}),
            ValueError,
            f"`{name}` must be one of `keras.{kinds}`, its name .* Received: {name}='nope'",
        )
        for name, kinds in {
            "kernel_initializer": "initializers",
            "bias_initializer": "initializers",
            "kernel_regularizer": "regularizers",
            "bias_regularizer": "regularizers",
            "activity_regularizer": "regularizers",
            "kernel_constraint": "constraints",
            "bias_constraint": "constraints",
        }.items()
    ],
    (
        lambda: MultiHeadAttention(2, 4, kernel_initializer=int),
        ValueError,
        "`kernel_initializer` must be one of .* Received: kernel_initializer=<class 'int'>",
    ),
    (
        lambda: MultiHeadAttention(np.array([2, 3]), 4),
        ValueError,
        r"`num_heads` must be a positive int. Received: num_heads=array\(\[2, 3\]\)",
    ),
    (
        lambda: MultiHeadAttention(2, keras.ops.convert_to_tensor(1.5)),
        ValueError,
        "`key_dim` must be a positive int. Received: key_dim=",
    ),
    *[
        (
            lambda x=x: MultiHeadAttention(2, 4)(x, x, key_mask=[[True], [True, False]]),
            ValueError,
            "`key_mask` must be a mask of bools or numbers, its rows of one length. Received: ",
        )
        for x in (inputs(), keras.Input((13, 6)))
    ],
    (lambda: MultiHeadAttention(2, 4)(None, inputs()), TypeError, "`query` must be a .*=None"),
    (lambda: MultiHeadAttention(2, 4)(inputs(), None), TypeError, "`value` must be a .*=None"),
    *[
        (
            lambda x=x, name=name, mask=mask: MultiHeadAttention(2, 4)(x, x, **{name: mask}),
            TypeError,
            f"`{name}` must be a mask of bools or numbers. Received: {name}=",
        )
        for name in ("query_mask", "value_mask", "key_mask", "attention_mask")
        for mask in ("a", {1}, object())
        for x in (inputs(), keras.Input((13, 6)))
    ],
    *[
        (
            lambda name=name: MultiHeadAttention(2, 4)(inputs(), inputs(), **{name: "no"}),
            TypeError,
            f"`{name}` must be True or False. Received: {name}='no'",
        )
        for name in ("use_causal_mask", "return_attention_scores")
    ],
    *[
        (
            lambda ids=ids: MultiHeadAttention(2, 4)(inputs(), inputs(), segment_ids=ids),
            (TypeError, ValueError),
            "`segment_ids` must .* Received: segment_ids",
        )
        for ids in ("a", object(), [[0] * 13, [0] * 12], [[0] * 12] * 2, [1] * 3)
    ],
    (
        lambda: MultiHeadAttention(2, 4)(
            keras.Input((13, 6)), keras.Input((13, 6)), segment_ids=keras.Input((13,))
        ),
        TypeError,
        "`segment_ids` must be of an int dtype. Received: segment_ids.dtype=float32",
    ),
    (
        lambda: built()(inputs(features=5), inputs()),
        ValueError,
        r"`query` must have the features that the layer was built for, 6. .*\(2, 13, 5\)",
    ),
    (
        lambda: built()(inputs(), inputs(features=5)),
        ValueError,
        "`value` must have the features that the layer was built for, 6",
    ),
    (
        lambda: MultiHeadAttention(2, 4, rotary_embedding=keras.layers.Dense(3))(
            inputs(), inputs()
        ),
        ValueError,
        r"`rotary_embedding` must give tensors of the shape that it gets, \(2, 13, 2, 4\)",
    ),
    (
        lambda: MultiHeadAttention(2, 4, score_mod=keras.layers.Dense(3)),
        TypeError,
        "`score_mod` must be a ScoreMod, a function .* Received: score_mod=<Dense",
    ),
    *[
        (
            lambda mod=mod: MultiHeadAttention(2, 4, score_mod=[mod]).get_config(),
            ValueError,
            "`score_mod` must be a registered function or object to be saved",
        )
        for mod in (Pairs().__call__, functools.partial(Pairs()))
    ],
    (lambda: MultiHeadAttention(2, 4, use_gate=2), TypeError, "`use_gate` must be True or False"),
    (lambda: GroupedQueryAttention(0, 4, 2), ValueError, "`head_dim` must be a positive int"),
    (lambda: GroupedQueryAttention(2, 4.5, 2), ValueError, "`num_query_heads` must be .*4.5"),
    (
        lambda: GroupedQueryAttention(2, 4, 3),
        ValueError,
        "must be divisible by .* Received: num_query_heads=4, num_key_value_heads=3",
    ),
    (
        lambda: GroupedQueryAttention(2, 4, 2, pattern=PerHead([Full()] * 3))(inputs(), inputs()),
        ValueError,
        "The number of heads must be a multiple of 3",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- Sizes of 1, policies and classes of others ------------------------------


@pytest.mark.skipif(BACKEND != "tensorflow", reason="lengths are unknown in tf.function")
@pytest.mark.parametrize(
    ("pattern", "unknown"),
    [(Local(3), (None, 1, None)), (Strided(4), (None, None, None)), (Full(), (None,) * 4)],
)
def test_a_mask_of_unknown_sizes_may_be_the_same_for_all_queries(pattern, unknown):
    import tensorflow as tf

    layer, x = MultiHeadAttention(2, 4, pattern=pattern), inputs(13)
    layer.build(x.shape, x.shape)
    mask = (np.arange(13) < np.array([[9], [5]]))[:, None]
    mask = mask[:, None] if len(unknown) == 4 else mask

    @tf.function(input_signature=[tf.TensorSpec((None, None, 6)), tf.TensorSpec(unknown, tf.bool)])
    def function(x, mask):
        return layer(x, x, attention_mask=mask)

    expected = layer(x, x, attention_mask=np.repeat(mask, 13, axis=-2))
    np.testing.assert_allclose(function(x, mask), expected, atol=1e-5)


def test_a_mask_of_keys_may_be_the_same_for_all_rows():
    layer, x = MultiHeadAttention(2, 4, pattern=Local(3)), inputs(13)
    mask = np.arange(13)[None] < 9
    expected = to_numpy(layer(x, x, value_mask=np.repeat(mask, 2, axis=0)))
    np.testing.assert_allclose(to_numpy(layer(x, x, value_mask=mask)), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.filterwarnings("ignore:Invalid quantization mode")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_bias_by_distance_is_saved_and_nearly_the_same(mode, tmp_path):
    bias = RelativePositionBias(2, embeddings_initializer="normal")
    model = keras_model(MultiHeadAttention, pattern=Local(3), score_mod=[bias])
    expected = model.predict(tokens(), verbose=0)
    model.quantize(mode)
    assert bias.embedding.quantization_mode == mode
    found = model.predict(tokens(), verbose=0)
    assert np.abs(found - expected).max() < (0.3 if mode == "int4" else 0.1)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(tokens(), verbose=0), found, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_a_quantized_layer_within_a_wrapper_is_saved(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 6)).astype("float32")
    given = keras.Input((3, 7, 6))
    layer = SelfAttention(2, 4, Local(2), name="inner")
    model = keras.Model(given, keras.layers.TimeDistributed(layer, name="outer")(given))
    model.quantize("int8")
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_rotary_embedding_need_not_have_the_dtype_of_its_layer(dtype):
    layer = MultiHeadAttention(2, 4, dtype=dtype, rotary_embedding=RotaryEmbedding())
    out = layer(inputs(), inputs())
    assert keras.backend.standardize_dtype(out.dtype) == dtype.removeprefix("mixed_")


def test_queries_may_have_another_policy_than_keys():
    policies = keras.dtype_policies.DTypePolicyMap("mixed_bfloat16")
    policies["attention/query"] = "float32"
    out = MultiHeadAttention(2, 4, name="attention", dtype=policies)(inputs(), inputs())
    assert keras.backend.standardize_dtype(out.dtype) == "bfloat16"


@pytest.mark.parametrize("name", ["output_shape", "value_dim", "pattern_of_mine"])
def test_grouped_query_attention_knows_its_own_arguments_alone(name):
    with pytest.raises((TypeError, ValueError), match=f"{name}"):
        GroupedQueryAttention(4, 4, 2, **{name: 3})


def test_a_file_with_an_unknown_pattern_names_the_missing_import():
    config = SelfAttention(2, 4, Causal() & Near(3)).get_config()
    text = json.dumps(config).replace("tests>Near", "tests>Far")
    with pytest.raises(ValueError, match=r"'tests>Far', .*'tests.cases'.* import or define"):
        SelfAttention.from_config(json.loads(text))
    again = SelfAttention.from_config(json.loads(json.dumps(config)))
    assert again.pattern == Causal() & Near(3)
