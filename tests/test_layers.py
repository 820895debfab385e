"""Layers: they project, attend over a pattern, mind masks, and survive saving."""

import inspect
import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from sparse_attn import (
    ALiBi,
    Atrous,
    Band,
    Blocks,
    Causal,
    Full,
    Local,
    Neighborhood,
    PerHead,
    Prefix,
    StreamingLLM,
    Strided,
)
from sparse_attn.functional import attention_weights
from sparse_attn.layers import (
    AtrousSelfAttention,
    GroupedQueryAttention,
    LocalSelfAttention,
    MultiHeadAttention,
    RotaryEmbedding,
    SelfAttention,
    StridedSelfAttention,
)
from sparse_attn.reference import dense_attention
from tests.cases import Near
from tests.compare import outputs_and_gradients, to_numpy

BACKEND = keras.backend.backend()

SELF = {
    "self": lambda **kw: SelfAttention(2, 4, Causal() & (Local(3) | Prefix(2)), **kw),
    "full": lambda **kw: SelfAttention(2, 4, **kw),
    "users": lambda **kw: SelfAttention(2, 4, Near(2), **kw),
    "atrous": lambda **kw: AtrousSelfAttention(2, 4, 3, **kw),
    "local": lambda **kw: LocalSelfAttention(2, 4, 3, **kw),
    "one-sided": lambda **kw: LocalSelfAttention(2, 4, (None, 1), **kw),
    "strided": lambda **kw: StridedSelfAttention(2, 4, 3, **kw),
    "causal": lambda **kw: StridedSelfAttention(2, 4, 3, causal=True, **kw),
}
every_layer = pytest.mark.parametrize("make", SELF.values(), ids=SELF)
RNG = np.random.default_rng(0)


def inputs(n=13, features=6, b=2):
    return np.random.default_rng(n).normal(size=(b, n, features)).astype("float32")


def oracle(layer, query, value=None, key=None, **options):
    """What a layer must compute: numpy projections around the dense oracle."""
    value = query if value is None else value
    key = value if key is None else key

    def project(dense, x):
        y = x @ to_numpy(dense.kernel)
        return y + to_numpy(dense.bias) if dense.use_bias else y

    heads = [
        project(dense, x).reshape(*x.shape[:2], layer.num_heads, -1)
        for dense, x in (
            (layer.query_dense, query),
            (layer.key_dense, key),
            (layer.value_dense, value),
        )
    ]
    out, _ = dense_attention(*heads, layer.pattern, **options)
    return project(layer.output_dense, out.reshape(*out.shape[:2], -1))


@every_layer
@pytest.mark.parametrize("n", [1, 2, 13, 40])
def test_layer_equals_oracle(make, n):
    layer, x = make(), inputs(n)
    mask = np.arange(n) < np.array([[n], [max(1, n - 4)]])
    np.testing.assert_allclose(to_numpy(layer(x)), oracle(layer, x), atol=1e-5)
    expected = oracle(layer, x, query_mask=mask, key_mask=mask)
    np.testing.assert_allclose(to_numpy(layer(x, mask=mask)), expected, atol=1e-5)
    np.testing.assert_allclose(to_numpy(layer(x, query_mask=mask)), expected, atol=1e-5)


@pytest.mark.parametrize("pattern", [None, Causal(), Local(2), Strided(3), Blocks(4)], ids=repr)
def test_cross_attention_equals_oracle(pattern):
    layer = MultiHeadAttention(2, 4, pattern=pattern, value_dim=3, output_shape=5, use_bias=False)
    query, value, key = inputs(13), inputs(9, 7), inputs(9, 8)
    masks = {
        "query_mask": RNG.random((2, 13)) < 0.7,
        "value_mask": RNG.random((2, 9)) < 0.7,
        "key_mask": RNG.random((2, 9)) < 0.7,
    }
    found = to_numpy(layer(query, value, key, **masks))
    expected = oracle(
        layer, query, value, key,
        query_mask=masks["query_mask"], key_mask=masks["key_mask"] & masks["value_mask"],
    )  # fmt: skip
    assert found.shape == (2, 13, 5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # The key is the value where it is not given, and so is its mask.
    found = to_numpy(
        MultiHeadAttention(2, 4, pattern=pattern)(query, value, value_mask=masks["value_mask"])
    )
    assert found.shape == (2, 13, 6)


def test_full_attention_equals_keras_own_layer():
    theirs = keras.layers.MultiHeadAttention(2, 4)
    ours = MultiHeadAttention(2, 4)
    x, y = inputs(13), inputs(9)
    mask = RNG.random((2, 13, 9)) < 0.8
    mask[..., 0] = True
    theirs.build(x.shape, y.shape)
    ours.build(x.shape, y.shape)
    shapes = [w.shape for w in ours.get_weights()]
    pairs = zip(theirs.get_weights(), shapes, strict=True)
    ours.set_weights([w.reshape(shape) for w, shape in pairs])
    np.testing.assert_allclose(
        to_numpy(ours(x, y, attention_mask=mask)),
        to_numpy(theirs(x, y, attention_mask=mask)),
        atol=1e-5,
    )


@pytest.mark.skipif(
    "sliding_window" not in inspect.signature(keras.layers.MultiHeadAttention).parameters,
    reason="this version of Keras has no sliding window",
)
def test_sliding_window_of_keras_is_local_of_one_less():
    theirs = keras.layers.MultiHeadAttention(2, 4, sliding_window=3)
    ours = MultiHeadAttention(2, 4, pattern=Local(2))
    x = inputs(13)
    theirs.build(x.shape, x.shape)
    ours.build(x.shape, x.shape)
    shapes = [w.shape for w in ours.get_weights()]
    pairs = zip(theirs.get_weights(), shapes, strict=True)
    ours.set_weights([w.reshape(shape) for w, shape in pairs])
    np.testing.assert_allclose(to_numpy(ours(x, x)), to_numpy(theirs(x, x)), atol=1e-5)


@every_layer
def test_scores_are_returned_and_change_nothing(make):
    layer, x = make(dropout=0.5, seed=1), inputs()
    mask = np.arange(13) < np.array([[13], [9]])
    out = to_numpy(layer(x, mask=mask))
    again, scores = (to_numpy(y) for y in layer(x, mask=mask, return_attention_scores=True))
    np.testing.assert_array_equal(again, out)
    assert scores.shape == (2, 2, 13, 13)
    allowed = layer.pattern.mask(13) & mask[:, None, None, :] & mask[:, None, :, None]
    assert (scores[~np.broadcast_to(allowed, scores.shape)] == 0).all()
    expected = np.broadcast_to(allowed.any(axis=-1), scores.shape[:-1])
    np.testing.assert_allclose(scores.sum(axis=-1), expected, atol=1e-6)


@every_layer
def test_causal_mask_at_call_is_causal_and_the_pattern(make):
    layer, x = make(), inputs()
    layer.build(x.shape)
    out = to_numpy(layer(x, use_causal_mask=True))
    layer.pattern = Causal() & layer.pattern
    np.testing.assert_allclose(out, oracle(layer, x), atol=1e-5)


def test_causal_argument():
    assert LocalSelfAttention(2, 4, 3, causal=True).pattern == Causal() & Local(3)
    assert AtrousSelfAttention(2, 4, 3, causal=True).pattern == Causal() & Atrous(3)
    assert StridedSelfAttention(2, 4, 3, causal=True).pattern == Causal() & Strided(3)
    assert SelfAttention(2, 4, causal=True).pattern == Causal() & Full()


@pytest.mark.parametrize("shape", [(13, 13), (2, 13, 13), (1, 2, 13, 13), (2, 1, 13, 13)])
def test_attention_mask(shape):
    layer, x = LocalSelfAttention(2, 4, 5), inputs()
    mask = RNG.random(shape) < 0.6
    expected = oracle(layer, x, attention_mask=mask) if layer.build(x.shape) is None else None
    np.testing.assert_allclose(to_numpy(layer(x, attention_mask=mask)), expected, atol=1e-5)


# ---- Masks of Keras ----------------------------------------------------------


@every_layer
def test_mask_of_an_embedding_is_used_and_passed_on(make):
    tokens = np.array([[1, 2, 3, 4, 5, 0, 0], [1, 2, 3, 0, 0, 0, 0]])
    embedding, layer = keras.layers.Embedding(9, 6, mask_zero=True), make()
    x = embedding(tokens)
    out = layer(x)
    np.testing.assert_array_equal(to_numpy(keras.src.backend.get_keras_mask(out)), tokens != 0)
    mask = tokens != 0
    expected = oracle(layer, to_numpy(x), query_mask=mask, key_mask=mask)
    np.testing.assert_allclose(to_numpy(out), expected, atol=1e-5)
    # It is not stripped from the caller's tensor.
    np.testing.assert_array_equal(to_numpy(keras.src.backend.get_keras_mask(x)), tokens != 0)


def test_mask_arrives_beside_other_tensors():
    x = inputs(7)
    x[:, 5:] = 0
    masked, layer = keras.layers.Masking()(x), LocalSelfAttention(2, 4, 2)
    everything = np.ones((2, 7, 7), bool)
    found = to_numpy(layer(masked, attention_mask=everything))
    mask = np.arange(7) < np.array([[5], [5]])
    expected = oracle(layer, x, query_mask=mask, key_mask=mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_masks_of_query_and_value_arrive():
    query, value = inputs(7), inputs(5)
    query[0, 5:], value[1, 3:] = 0, 0
    layer = MultiHeadAttention(2, 4, pattern=Local(3))
    found = to_numpy(layer(keras.layers.Masking()(query), keras.layers.Masking()(value)))
    expected = oracle(
        layer, query, value, query_mask=query.any(axis=-1), key_mask=value.any(axis=-1)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@every_layer
@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_padding_changes_neither_output_nor_gradients(make, poison):
    layer, x = make(), inputs()
    mask = np.arange(13) < np.array([[13], [6]])
    layer.build(x.shape)

    def loss_and_gradients(x):
        weights = [to_numpy(v) for v in layer.trainable_variables]

        def function(*values):
            out, _ = layer.stateless_call(values, [], x, mask=mask)
            return [keras.ops.where(mask[..., None], out, 0)]

        return outputs_and_gradients(function, weights, [np.ones((2, 13, 6))])

    (expected,), expected_gradients = loss_and_gradients(x)
    x = x.copy()
    x[~mask] = poison
    (found,), gradients = loss_and_gradients(x)
    np.testing.assert_array_equal(found, expected)
    for gradient, same in zip(gradients, expected_gradients, strict=True):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient, same)


# ---- Models, saving ----------------------------------------------------------


def make_model(make, dtype=None):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(20, 6, mask_zero=True)(tokens)
    x = x + make(dtype=dtype)(x)
    x = keras.layers.GlobalAveragePooling1D(dtype=dtype)(x)
    return keras.Model(tokens, keras.layers.Dense(3, dtype="float32")(x))


def tokens(n=11, b=8):
    x = np.random.default_rng(n).integers(1, 20, (b, n))
    x[1:, n - 2 :] = 0
    return x


@every_layer
@pytest.mark.parametrize("dtype", [None, "mixed_bfloat16"])
def test_fit_save_and_load_without_custom_objects(make, dtype, tmp_path):
    model = make_model(lambda **kw: make(dropout=0.1, seed=3, **kw), dtype)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=keras.backend.backend() == "jax")
    x, y = tokens(), np.arange(8) % 3
    history = model.fit(x, y, epochs=8, batch_size=4, verbose=0).history["loss"]
    assert np.isfinite(history).all()
    assert history[-1] < history[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for n in (1, 30):
        expected = model.predict(tokens(n + 2), verbose=0)
        np.testing.assert_array_equal(again.predict(tokens(n + 2), verbose=0), expected)
    again.fit(x, y, verbose=0)


def test_a_saved_model_loads_in_a_fresh_process(tmp_path):
    model = make_model(SELF["self"])
    x = tokens()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", model.predict(x, verbose=0))
    model.save(tmp_path / "model.keras")
    code = """
import keras, numpy as np
import sparse_attn
model = keras.models.load_model("model.keras")
np.testing.assert_array_equal(model.predict(np.load("x.npy"), verbose=0), np.load("y.npy"))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, timeout=200, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_bfloat16"])
def test_dtypes_of_sublayers_and_outputs(dtype):
    layer = LocalSelfAttention(2, 4, 3, dtype=dtype)
    symbolic = layer(keras.Input((7, 6)))
    out, scores = layer(inputs(7), return_attention_scores=True)
    expected = dtype.removeprefix("mixed_")
    for x in (symbolic, out, scores):
        assert keras.backend.standardize_dtype(x.dtype) == expected
    for sub in layer._flatten_layers(include_self=False):
        assert sub.compute_dtype == expected
        assert sub.variable_dtype == ("float32" if "mixed" in dtype else expected)


@every_layer
def test_config_round_trip_is_json_and_equal(make):
    layer = make(
        name="attention",
        value_dim=5,
        dropout=0.2,
        use_bias=False,
        output_shape=(2, 3),
        kernel_initializer="he_normal",
        kernel_regularizer=keras.regularizers.L2(0.1),
        bias_constraint="non_neg",
        seed=4,
    )
    config = json.loads(json.dumps(layer.get_config()))
    again = type(layer).from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config
    assert (again.name, again.pattern, again.causal) == ("attention", layer.pattern, layer.causal)
    assert (again.value_dim, again.dropout, again.use_bias, again.seed) == (5, 0.2, False, 4)
    assert tuple(again(inputs()).shape) == (2, 13, 2, 3)
    assert len(again.losses) == 4


def test_named_layers_keep_their_own_argument_in_the_config():
    config = LocalSelfAttention(2, 4, (3, 0), causal=True).get_config()
    assert config["window"] == [3, 0] or config["window"] == (3, 0)
    assert "pattern" not in config
    assert AtrousSelfAttention(2, 4, 3).get_config()["rate"] == 3
    assert StridedSelfAttention(2, 4, 3).get_config()["stride"] == 3


def test_sublayers_are_dense_and_named():
    layer = LocalSelfAttention(2, 4, 3)
    layer.build((None, None, 6))
    names = [sub.name for sub in layer._flatten_layers(include_self=False)]
    assert sorted(names) == ["attention_output", "key", "query", "value"]
    subs = list(layer._flatten_layers(include_self=False))
    assert all(isinstance(sub, keras.layers.Dense) for sub in subs)
    shapes = [w.shape for w in layer.weights]
    assert shapes == [(6, 8), (8,), (6, 8), (8,), (6, 8), (8,), (8, 6), (6,)]
    kernels = [to_numpy(sub.kernel) for sub in (layer.query_dense, layer.key_dense)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0


def test_regularizers_constraints_and_initializers_reach_the_sublayers():
    layer = SelfAttention(
        2,
        4,
        kernel_initializer="ones",
        bias_initializer="ones",
        kernel_regularizer="l2",
        bias_regularizer="l1",
        activity_regularizer="l2",
        kernel_constraint="non_neg",
    )
    layer(inputs())
    assert all((w == 1).all() for w in layer.get_weights())
    assert len(layer.losses) == 12
    assert all(v.constraint is not None for v in layer.weights if v.name == "kernel")


def test_dropout_acts_in_training_only_and_follows_its_seed():
    x = inputs()
    layer = LocalSelfAttention(2, 4, 3, dropout=0.5, seed=1)
    np.testing.assert_array_equal(to_numpy(layer(x)), to_numpy(layer(x, training=False)))
    first, second = to_numpy(layer(x, training=True)), to_numpy(layer(x, training=True))
    assert np.abs(first - second).max() > 0
    again = LocalSelfAttention.from_config(layer.get_config())
    again.build(x.shape)
    again.set_weights([to_numpy(w) for w in layer.trainable_weights])
    np.testing.assert_array_equal(to_numpy(again(x, training=True)), first)


def test_symbolic_shapes():
    query, value = keras.Input((None, 6)), keras.Input((9, 7))
    layer = MultiHeadAttention(2, 4, output_shape=(3, 2))
    out, scores = layer(query, value, return_attention_scores=True)
    assert out.shape == (None, None, 3, 2)
    assert scores.shape == (None, 2, None, 9)
    assert layer.compute_output_shape((2, 5, 6), (2, 9, 7)) == (2, 5, 3, 2)
    assert LocalSelfAttention(2, 4, 3).compute_output_shape((2, 5, 6)) == (2, 5, 6)
    model = keras.Model([query, value], [out, scores])
    out, scores = model([inputs(5), inputs(9, 7)])
    assert (tuple(out.shape), tuple(scores.shape)) == ((2, 5, 3, 2), (2, 2, 5, 9))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.function is TensorFlow's")
@every_layer
def test_unknown_batch_and_length_compiled(make):
    import tensorflow as tf

    layer = make()
    layer.build((None, None, 6))
    signature = [tf.TensorSpec((None, None, 6))]
    function = tf.function(lambda x: layer(x), input_signature=signature)
    for n, b in ((13, 2), (1, 1), (70, 3)):
        x = inputs(n, b=b)
        np.testing.assert_allclose(to_numpy(function(x)), oracle(layer, x), atol=1e-5)


def test_layer_trains_to_copy_the_position_before():
    x = np.random.default_rng(0).integers(1, 8, (64, 12))
    y = np.roll(x, 1, axis=1)
    y[:, 0] = 0
    tokens = keras.Input((12,), dtype="int32")
    z = SelfAttention(2, 16, Band(1, -1))(keras.layers.Embedding(8, 16)(tokens))
    model = keras.Model(tokens, keras.layers.Dense(8)(z))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss, metrics=["accuracy"])
    model.fit(x, y, epochs=40, verbose=0)
    assert model.evaluate(x, y, verbose=0)[1] > 0.95


# ---- Bad input ---------------------------------------------------------------


def call(**options):
    return LocalSelfAttention(2, 4, 3)(inputs(), **options)


BAD = [
    (lambda: SelfAttention(0, 4), ValueError, "`num_heads` must be a positive int.*num_heads=0"),
    (lambda: SelfAttention(2, 0), ValueError, "`key_dim` must be a positive int.*key_dim=0"),
    (lambda: SelfAttention(2, 4.0), ValueError, "argument `key_dim` must be .*key_dim=4.0"),
    (lambda: SelfAttention(True, 4), ValueError, "`num_heads` must be .*num_heads=True"),
    (lambda: SelfAttention(2, 4, "local"), TypeError, "`pattern` must be a Pattern.*'local'"),
    (lambda: MultiHeadAttention(2, 4, pattern=64), TypeError, "`pattern` must be .*pattern=64"),
    (lambda: SelfAttention(2, 4, causal=1), TypeError, "`causal` must be True or False.*causal=1"),
    (lambda: SelfAttention(2, 4, value_dim=-1), ValueError, "`value_dim` must be .*value_dim=-1"),
    (lambda: SelfAttention(2, 4, dropout=1.5), ValueError, r"`dropout` must be .*dropout=1.5"),
    (lambda: SelfAttention(2, 4, use_bias="no"), TypeError, "`use_bias` must be True or False"),
    (lambda: SelfAttention(2, 4, output_shape=0), ValueError, "`output_shape`: it must be .*=0"),
    (lambda: SelfAttention(2, 4, output_shape=()), ValueError, r"Received: output_shape=\(\)"),
    (lambda: SelfAttention(2, 4, seed=0.5), TypeError, "`seed` must be an int. .*seed=0.5"),
    (lambda: LocalSelfAttention(2, 4, -1), ValueError, "`window` must be .*window=-1"),
    (lambda: AtrousSelfAttention(2, 4, 0), ValueError, "`rate` must be a positive int.*rate=0"),
    (lambda: StridedSelfAttention(2, 4, 1.5), TypeError, "`stride` must be a positive int"),
    (
        lambda: LocalSelfAttention(2, 4, 3).build((2, 6)),
        ValueError,
        r"`query` must have shape \(batch, length, features\).*Received: shape=\(2, 6\)",
    ),
    (
        lambda: LocalSelfAttention(2, 4, 3)(keras.Input(())),
        ValueError,
        r"`query` must have shape .* Received: shape=\(None,\)",
    ),
    (
        lambda: MultiHeadAttention(2, 4)(inputs(5), inputs(6), inputs(7)),
        ValueError,
        r"The lengths of `key` and `value` must be equal. .*\(2, 7, 6\), value shape=\(2, 6, 6\)",
    ),
    (
        lambda: call(mask=np.ones((2, 12), bool)),
        ValueError,
        r"`mask` must have shape \(1 or 2, 13\). Received: mask.shape=\(2, 12\)",
    ),
    (
        lambda: MultiHeadAttention(2, 4)(inputs(5), inputs(5, b=3)),
        ValueError,
        r"`value` must have the batch size of `query`, 2. Received: shape=\(3, 5, 6\)",
    ),
    (
        lambda: MultiHeadAttention(2, 4)(inputs(5), inputs(5), query_mask=np.ones((2, 4))),
        ValueError,
        r"`query_mask` must have shape \(1 or 2, 5\). Received: query_mask.shape=\(2, 4\)",
    ),
    (
        lambda: call(attention_mask=np.ones((2, 13, 12), bool)),
        ValueError,
        r"`attention_mask` must have shape .* Received: attention_mask.shape=\(2, 13, 12\)",
    ),
    (
        lambda: MultiHeadAttention(2, 4)(
            keras.Input((5, 6)),
            keras.Input((7, 6)),
            attention_mask=keras.Input((5, 6), dtype="bool"),
        ),
        ValueError,
        r"`attention_mask` must have shape .* Received: attention_mask.shape=\(None, 5, 6\)",
    ),
    (
        lambda: MultiHeadAttention(2, 4)(
            keras.Input((5, 6)), keras.Input((7, 6)), value_mask=keras.Input((5,))
        ),
        ValueError,
        r"`value_mask` must have shape \(any, 7\). Received: value_mask.shape=\(None, 5\)",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_lengths_that_a_pattern_cannot_relate_are_refused_when_built():
    from sparse_attn import Pattern

    class Table(Pattern):
        def __call__(self, q_pos, k_pos):
            return q_pos == k_pos

        def check_lengths(self, n, m):
            if n not in (9, None) or m not in (9, None):
                raise ValueError(f"Table must have lengths of 9. Received: n={n}, m={m}")

    with pytest.raises(ValueError, match=r"Table must have lengths of 9\. Received: n=8, m=8"):
        SelfAttention(2, 4, Table()).build((None, 8, 6))
    with pytest.raises(ValueError, match=r"Table must have lengths of 9\. Received: n=8, m=8"):
        SelfAttention(2, 4, Table())(keras.Input((8, 6)))
    SelfAttention(2, 4, Table()).build((None, 9, 6))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counts operations in a TensorFlow graph")
def test_a_layer_streams_beyond_its_max_score_bytes():
    import tensorflow as tf

    def loops(layer):
        function = tf.function(lambda x: layer(x))
        graph = function.get_concrete_function(tf.TensorSpec((None, 64, 8), "float32")).graph
        return [op for op in graph.get_operations() if "While" in op.type]

    # An unknown batch counts as 8: 8 rows, 2 heads, 64 * 64 scores of 4 bytes.
    assert not loops(SelfAttention(2, 4, max_score_bytes=8 * 2 * 64 * 64 * 4))
    layer = SelfAttention(2, 4, max_score_bytes=8 * 2 * 64 * 64 * 4 - 1)
    assert loops(layer)
    again = SelfAttention.from_config(layer.get_config())
    assert again.max_score_bytes == layer.max_score_bytes
    with pytest.raises(ValueError, match="`max_score_bytes` must be"):
        SelfAttention(2, 4, max_score_bytes=-1)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_give_what_each_gives_alone(causal):
    layer = LocalSelfAttention(2, 4, window=3, causal=causal)
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(1, 11, 8)), rng.normal(size=(1, 8, 8))
    packed = np.concatenate([first, second], axis=1).astype("float32")
    segments = np.array([[0] * 11 + [1] * 8])
    out, weights = layer(packed, segment_ids=segments, return_attention_scores=True)
    alone = [to_numpy(layer(x.astype("float32"))) for x in (first, second)]
    np.testing.assert_allclose(to_numpy(out), np.concatenate(alone, axis=1), atol=1e-5)
    assert not to_numpy(weights)[0, :, :11, 11:].any()


def test_segments_are_an_input_of_a_functional_model():
    x, segments = keras.Input((None, 8)), keras.Input((None,), dtype="int32")
    model = keras.Model([x, segments], SelfAttention(2, 4, Local(3))(x, segment_ids=segments))
    data = np.random.default_rng(0).normal(size=(2, 13, 8)).astype("float32")
    numbers = np.sort(np.random.default_rng(1).integers(0, 3, (2, 13)), axis=1).astype("int32")
    found = model.predict([data, numbers], verbose=0)
    layer = model.layers[-1]
    mask = numbers[:, :, None] == numbers[:, None, :]
    expected = to_numpy(layer(data, attention_mask=mask))
    np.testing.assert_allclose(found, expected, atol=1e-5)


# ---- Queries at other positions than 0, 1, 2, ... -----------------------------

PLACED = {
    "causal": {"pattern": Causal()},
    "window": {"pattern": Causal() & Local(3)},
    "rotary": {"pattern": Causal() & Local(4), "rotary_embedding": RotaryEmbedding()},
    "alibi": {"pattern": Strided(3), "score_mod": ALiBi(2)},
    "per head": {"pattern": PerHead([Causal(), Local(2)])},
}
KINDS = {
    "multi-head": lambda **options: MultiHeadAttention(2, 4, **options),
    "grouped": lambda **options: GroupedQueryAttention(4, 2, 1, **options),
    "self": lambda **options: SelfAttention(2, 4, **options),
}


@pytest.mark.parametrize("where", [9, [2, 9, 12], [12]], ids=str)
@pytest.mark.parametrize("options", PLACED.values(), ids=PLACED)
@pytest.mark.parametrize("kind", ["multi-head", "grouped"])
def test_queries_at_positions_are_those_rows_of_the_whole(kind, options, where):
    """Values, weights and gradients."""
    layer, x = KINDS[kind](**options), inputs(13)
    layer.build(x.shape, x.shape)
    rows = np.arange(where, 13) if isinstance(where, int) else np.array(where)
    cotangent = RNG.normal(size=(2, len(rows), 6)).astype("float32")

    def whole(x):
        return [keras.ops.take(layer(x, x), rows, axis=1)]

    def placed(x):
        return [layer(keras.ops.take(x, rows, axis=1), x, query_positions=where)]

    (expected,), by_whole = outputs_and_gradients(whole, [x], [cotangent])
    (found,), gradients = outputs_and_gradients(placed, [x], [cotangent])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(gradients[0], by_whole[0], atol=1e-5)
    _, weights = layer(x, x, return_attention_scores=True)
    call = {"query_positions": where, "return_attention_scores": True}
    _, few = layer(x[:, rows], x, **call)
    np.testing.assert_allclose(to_numpy(few), to_numpy(weights)[:, :, rows], atol=1e-6)


@pytest.mark.parametrize("where", [9, [2, 9, 12], [12]], ids=str)
def test_queries_at_positions_equal_the_oracle(where):
    """Values and gradients."""
    layer, x = MultiHeadAttention(2, 4, pattern=Causal() & Local(3)), inputs(13)
    query = inputs(4 if isinstance(where, int) else len(where))
    layer.build(query.shape, x.shape)
    cotangent = RNG.normal(size=query.shape).astype("float32")

    def call(query, x):
        return [layer(query, x, query_positions=where)]

    (found,), gradients = outputs_and_gradients(call, [query, x], [cotangent])
    expected = oracle(layer, query, x, query_positions=where)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    kernels = [
        to_numpy(dense.kernel)
        for dense in (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
    ]
    q, k, v = (
        (each @ kernel).reshape(*each.shape[:2], 2, 4)
        for each, kernel in zip((query, x, x), kernels, strict=False)
    )
    out_grad = (cotangent @ kernels[3].T).reshape(q.shape)
    _, _, by_head = dense_attention(
        q, k, v, layer.pattern, query_positions=where, out_grad=out_grad
    )
    by_query, by_key, by_value = (
        by_head[name].reshape(*by_head[name].shape[:2], -1) @ kernel.T
        for name, kernel in zip(("query", "key", "value"), kernels, strict=False)
    )
    np.testing.assert_allclose(gradients[0], by_query, atol=1e-5)
    np.testing.assert_allclose(gradients[1], by_key + by_value, atol=1e-5)


@pytest.mark.parametrize("where", [9, [2, 9, 12]], ids=str)
def test_weights_of_queries_at_positions(where):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(1, 3, 2, 4)), rng.normal(size=(1, 13, 2, 4))
    pattern = Causal() & Local(4)
    weights = to_numpy(attention_weights(q, k, pattern, query_positions=where))
    identity = np.broadcast_to(np.eye(13)[None, :, None], (1, 13, 2, 13))
    expected, _ = dense_attention(q, k, identity, pattern, query_positions=where)
    np.testing.assert_allclose(weights, np.moveaxis(expected, 2, 1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_query_positions_are_an_input_of_a_functional_model(kind):
    layer, x = KINDS[kind](pattern=Causal() & Local(3)), inputs(13)
    rows = np.array([4, 5, 7] + [8] * 10, "int32")
    query, where = keras.Input((13, 6)), keras.Input(batch_shape=(13,), dtype="int32")
    inner = (query,) if kind == "self" else (query, query)
    model = keras.Model([query, where], layer(*inner, query_positions=where))
    expected = layer(*(x,) * len(inner), query_positions=rows)
    np.testing.assert_allclose(to_numpy(model([x, rows])), to_numpy(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (-1, ValueError, "`query_positions` must be"),
        ([1, 2], ValueError, "`query_positions` must have shape"),
        ([0.5], TypeError, "`query_positions` must be of an int dtype"),
        (20, ValueError, r"`query_positions` must be in \[0, 20\)"),
    ],
    ids=str,
)
def test_wrong_query_positions_are_named(where, error, message):
    layer, x = MultiHeadAttention(2, 4, pattern=Neighborhood((20,), 2)), inputs(13)
    with pytest.raises(error, match=message):
        layer(x[:, :1], x, query_positions=where)


def test_a_rotary_embedding_without_positions_is_named():
    class Turn(keras.layers.Layer):
        def call(self, x):
            return x

    layer, x = MultiHeadAttention(2, 4, rotary_embedding=Turn()), inputs(13)
    with pytest.raises(ValueError, match="`rotary_embedding` must take `positions`"):
        layer(x[:, :1], x, query_positions=3)


@pytest.mark.parametrize(
    "pattern",
    [Causal(), Causal() & Local(9), Local((3, 0)), StreamingLLM(5), PerHead([Causal()] * 2)],
    ids=repr,
)
@pytest.mark.parametrize("symbolic", [False, True])
def test_one_query_for_many_keys_under_a_causal_pattern_warns_once(pattern, symbolic):
    layer = MultiHeadAttention(2, 4, pattern=pattern)
    query, value = inputs(1), inputs(13)
    if symbolic:
        query, value = keras.Input((1, 6)), keras.Input((13, 6))
    with pytest.warns(UserWarning, match=r"one query for 13 keys.*`query_positions`") as caught:
        layer(query, value)
    assert [each.filename for each in caught] == [__file__]
    layer(query, value)  # once


@pytest.mark.parametrize("pattern", [None, Local(3), Causal() | Prefix(2), Near(2)], ids=repr)
def test_one_query_for_many_keys_does_not_warn_otherwise(pattern):
    x = inputs(13)
    MultiHeadAttention(2, 4, pattern=pattern)(x[:, :1], x)
    causal = MultiHeadAttention(2, 4, pattern=Causal())
    causal(x[:, :1], x, query_positions=12)
    causal(x[:, :2], x)
    causal(x[:, :1], x[:, :1])


def test_one_query_with_use_causal_mask_warns():
    x = inputs(13)
    with pytest.warns(UserWarning, match="one query for 13 keys"):
        MultiHeadAttention(2, 4)(x[:, :1], x, use_causal_mask=True)


# ---- One input, and masks of its keys -----------------------------------------


def test_self_attention_says_that_it_takes_one_input():
    x = inputs()
    for layer in (SelfAttention(2, 4), LocalSelfAttention(2, 4, 3)):
        with pytest.raises(ValueError, match=f"{type(layer).__name__} takes one input.*MultiHead"):
            layer(x, x)
        with pytest.raises(ValueError, match="takes one input"):
            layer(keras.Input((None, 6)), keras.Input((None, 6)))


@every_layer
def test_a_mask_of_keys_joins_that_of_padding(make):
    layer, x = make(), inputs()
    padding = np.arange(13) < np.array([[13], [9]])
    keys = RNG.random((2, 13)) < 0.7
    found = to_numpy(layer(x, mask=padding, key_mask=keys))
    expected = oracle(layer, x, query_mask=padding, key_mask=padding & keys)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found = to_numpy(layer(x, key_mask=keys))
    np.testing.assert_allclose(found, oracle(layer, x, key_mask=keys), atol=1e-5)
    tokens = np.where(padding, 1, 0)
    embedded = keras.layers.Embedding(3, 6, mask_zero=True)(tokens)
    found = to_numpy(layer(embedded, key_mask=keys))
    embedded = to_numpy(embedded)
    expected = oracle(layer, embedded, query_mask=padding, key_mask=padding & keys)
    np.testing.assert_allclose(found, expected, atol=1e-5)
