"""Position layers equal their formulas, and in attention their dense form: values and gradients."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from sparse_attn import Atrous, Causal, Local, Longformer, SoftCap, sparse_attention
from sparse_attn.layers import (
    MultiHeadAttention,
    PositionEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
    SelfAttention,
    SinePositionEncoding,
)
from sparse_attn.reference import dense_attention
from tests.compare import (
    BACKEND,
    FLOAT,
    outputs_and_gradients,
    random_inputs,
    random_masks,
    to_numpy,
)

PATTERNS = [Local(5), Causal(), Causal() & Atrous(3), Longformer(4, 2)]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)


def some(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def sines(positions, features, max_wavelength=10_000):
    """By definition, number by number."""
    found = np.zeros((len(positions), features))
    for row, position in enumerate(positions):
        for feature in range(features):
            angle = position * max_wavelength ** -(2 * (feature // 2) / features)
            found[row, feature] = np.cos(angle) if feature % 2 else np.sin(angle)
    return found


def rotated(x, positions, max_wavelength=10_000):
    """Each pair of features as a complex number, which is turned: `(b, n, h, d)`."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * max_wavelength ** -(np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[None, :, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("features", [2, 7, 8])
@pytest.mark.parametrize("start", [0, 5])
def test_sine_position_encoding_by_definition(features, start):
    x = some(2, 9, features)
    found = SinePositionEncoding(100)(x, start_index=start)
    expected = sines(np.arange(start, start + 9), features, 100)
    np.testing.assert_allclose(found, np.stack([expected] * 2), atol=1e-5)


def test_position_embedding_is_rows_of_a_table_and_trains_them():
    layer, x = PositionEmbedding(20), some(2, 9, 4)
    found = to_numpy(layer(x, start_index=3))
    table = to_numpy(layer.embedding.embeddings)
    np.testing.assert_array_equal(found, np.stack([table[3:12]] * 2))
    cotangent = some(2, 9, 4, seed=1)

    def function(table):
        out, _ = layer.stateless_call([table], [], x, start_index=3)
        return [out]

    _, (gradient,) = outputs_and_gradients(function, [table], [cotangent])
    expected = np.zeros((20, 4))
    expected[3:12] = cotangent.sum(axis=0)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [PositionEmbedding(20), SinePositionEncoding(), RotaryEmbedding()],
    ids=lambda x: x.name,
)
def test_the_offset_of_a_generator_may_be_a_tensor(layer):
    x = some(2, 9, 4)
    whole = to_numpy(layer(x))
    for start in (0, 4):
        part = to_numpy(layer(x[:, start:], start_index=ops.convert_to_tensor(start)))
        np.testing.assert_allclose(part, whole[:, start:], atol=1e-6)


def test_rotary_embedding_by_definition():
    x = some(2, 9, 3, 8)
    for options in ({}, {"max_wavelength": 100}, {"scaling_factor": 2.0}):
        layer = RotaryEmbedding(**options)
        scale = options.get("scaling_factor", 1)
        expected = rotated(x, (4 + np.arange(9)) / scale, options.get("max_wavelength", 10_000))
        np.testing.assert_allclose(layer(x, start_index=4), expected, atol=1e-5)
        by_position = layer(x, positions=np.arange(4, 13))
        np.testing.assert_allclose(by_position, expected, atol=1e-5)
    flat = RotaryEmbedding()(x[:, :, 0])
    np.testing.assert_allclose(flat, rotated(x, np.arange(9))[:, :, 0], atol=1e-5)


@every_pattern
def test_attention_of_rotated_queries_and_keys(pattern):
    n = 13
    q, k, v = random_inputs(n, n, d=4)
    out_grad, masks = some(*q.shape[:3], 3).astype(FLOAT), random_masks(n, n)
    rotary = RotaryEmbedding(dtype=FLOAT)

    def function(q, k, v):
        return [sparse_attention(rotary(q), rotary(k), v, pattern, **masks)]

    (out,), gradients = outputs_and_gradients(function, [q, k, v], [out_grad])
    positions = np.arange(n)
    turned = rotated(q, positions), rotated(k, positions)
    expected, _, by_turned = dense_attention(*turned, v, pattern, out_grad=out_grad, **masks)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    # A turn keeps lengths: its adjoint is the turn back.
    for gradient, name in zip(gradients, ("query", "key"), strict=False):
        np.testing.assert_allclose(gradient, rotated(by_turned[name], -positions), atol=1e-5)
    np.testing.assert_allclose(gradients[2], by_turned["value"], atol=1e-5)


def bucket(distance, num_buckets, max_distance, bidirectional):
    """T5's, for one distance `k_pos - q_pos`."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first, far = (num_buckets if distance > 0 else 0), abs(distance)
    else:
        far = max(-distance, 0)
    exact = num_buckets // 2
    if far < exact:
        return first + far
    share = np.log(far / exact) / np.log(max_distance / exact)
    return first + min(exact + int(np.float32(share * (num_buckets - exact))), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (4, 3)])
def test_buckets_are_those_of_t5(num_buckets, max_distance, bidirectional):
    layer = RelativePositionBias(2, num_buckets, max_distance, bidirectional)
    distance = np.arange(-300, 300, dtype="int32")
    found = to_numpy(layer.buckets(ops.convert_to_tensor(distance)))
    expected = [bucket(x, num_buckets, max_distance, bidirectional) for x in distance]
    # At the edge of two buckets, rounding decides.
    differ = np.flatnonzero(found != expected)
    assert len(differ) <= 8
    assert (np.abs(found - expected)[differ] <= 1).all()
    assert found.min() == 0
    assert found.max() == num_buckets - 1


@pytest.mark.parametrize("max_score_bytes", [2**30, 0], ids=["kept", "streamed"])
@every_pattern
def test_relative_position_bias_is_a_dense_bias(pattern, max_score_bytes):
    n, h = 29, 4
    layer = RelativePositionBias(h, 8, 20)
    q, k, v = random_inputs(n, n, h=h, dtype="float32")
    out_grad, masks = some(2, n, h, 3), random_masks(n, n)
    positions = np.arange(n, dtype="int32")
    bias = to_numpy(layer(positions, positions))
    (table,) = map(to_numpy, layer.trainable_variables)
    assert table.shape == (8, h)

    def function(q, k, v, table):
        options = {"score_mod": layer, "max_score_bytes": max_score_bytes, **masks}
        variables = [(layer.trainable_variables[0], table)]
        with keras.StatelessScope(variables):
            return [sparse_attention(q, k, v, pattern, **options)]

    (out,), gradients = outputs_and_gradients(function, [q, k, v, table], [out_grad])
    expected, _, dense = dense_attention(
        q, k, v, pattern, bias=bias[None], out_grad=out_grad, **masks
    )
    np.testing.assert_allclose(out, expected, atol=1e-4)
    for gradient, name in zip(gradients, ("query", "key", "value"), strict=False):
        np.testing.assert_allclose(gradient, dense[name], atol=1e-4)
    buckets = to_numpy(layer.buckets(ops.convert_to_tensor(positions[None] - positions[:, None])))
    by_table = np.zeros((8, h))
    for head in range(h):
        np.add.at(by_table[:, head], buckets, dense["bias"][0, head])
    np.testing.assert_allclose(gradients[3], by_table, atol=1e-4)


def test_a_layer_trains_its_bias_and_saves_it(tmp_path):
    x, y = some(8, 12, 6), some(8, 12, 6, seed=1)
    query = keras.Input((None, 6))
    out = MultiHeadAttention(
        2,
        4,
        pattern=Local(4),
        score_mod=RelativePositionBias(2),
        rotary_embedding=RotaryEmbedding(100),
    )(query, query)
    model = keras.Model(query, out)
    model.compile("adam", "mse")
    before = to_numpy(model.layers[-1].score_mod.embedding.embeddings)
    model.fit(x, y, epochs=2, verbose=0)
    assert len(model.trainable_weights) == 9
    assert np.abs(to_numpy(model.layers[-1].score_mod.embedding.embeddings) - before).max() > 0
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.layers[-1].rotary_embedding.max_wavelength == 100
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("as_list", [False, True])
def test_layers_may_share_a_bias_and_a_file_keeps_it_one(as_list, tmp_path):
    bias = RelativePositionBias(2, embeddings_initializer="normal")
    mods = [SoftCap(5), bias] if as_list else bias
    x = query = keras.Input((None, 6))
    for _ in range(3):
        x = SelfAttention(2, 4, Local(4), score_mod=mods)(x)
    model = keras.Model(query, x)
    assert len(model.trainable_weights) == 3 * 8 + 1
    model.compile("sgd", "mse")
    model.fit(some(8, 12, 6), some(8, 12, 6, seed=1), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert len(again.trainable_weights) == 3 * 8 + 1
    expected = model.predict(some(8, 12, 6), verbose=0)
    np.testing.assert_array_equal(again.predict(some(8, 12, 6), verbose=0), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    again.set_weights([0 * weight for weight in again.get_weights()])
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again.predict(some(8, 12, 6), verbose=0), expected)


LAYERS = [
    PositionEmbedding(20, initializer="he_normal", name="a"),
    SinePositionEncoding(100, name="b"),
    RotaryEmbedding(100, 2, name="c"),
    RelativePositionBias(4, 8, 20, bidirectional=False, name="d"),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_config_round_trip(layer):
    config = json.loads(json.dumps(layer.get_config()))
    again = type(layer).from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config


@pytest.mark.parametrize("dtype", ["float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", [PositionEmbedding, SinePositionEncoding, RotaryEmbedding])
def test_dtypes_and_symbolic_shapes(kind, dtype):
    layer = kind(20, dtype=dtype)
    symbolic = layer(keras.Input((None, 4)))
    found = layer(some(2, 9, 4))
    assert symbolic.shape == (None, None, 4)
    assert tuple(found.shape) == (2, 9, 4)
    expected = dtype.removeprefix("mixed_")
    assert keras.backend.standardize_dtype(found.dtype) == symbolic.dtype == expected


BAD = [
    (lambda: PositionEmbedding(0), ValueError, "`sequence_length` must be a positive int"),
    (
        lambda: PositionEmbedding(5)(some(2, 4, 3), start_index=2),
        ValueError,
        "must lie within `sequence_length`, 5. Received: start_index=2, length=4",
    ),
    (
        lambda: PositionEmbedding(5)(some(2, 4, 3), start_index=-1),
        ValueError,
        "`start_index` must be a non-negative int. Received: start_index=-1",
    ),
    (lambda: PositionEmbedding(5)(some(4, 3)), ValueError, r"`inputs` must have shape .*\(4, 3\)"),
    (lambda: SinePositionEncoding(0), ValueError, "`max_wavelength` must be a positive number"),
    (lambda: SinePositionEncoding("x"), TypeError, "`max_wavelength` must be .*'x'"),
    (lambda: RotaryEmbedding(scaling_factor=-1), ValueError, "`scaling_factor` must be a positive"),
    (lambda: RotaryEmbedding()(some(2, 4, 3)), ValueError, r"an even number .*\(2, 4, 3\)"),
    (lambda: RelativePositionBias(0), ValueError, "`num_heads` must be a positive int"),
    (lambda: RelativePositionBias(2, 3), ValueError, "`num_buckets` must be an int of at least 4"),
    (
        lambda: RelativePositionBias(2, 8, 2),
        ValueError,
        "`max_distance` must be more than 2, .* Received: max_distance=2",
    ),
    (
        lambda: MultiHeadAttention(2, 4, score_mod=RelativePositionBias(3)),
        ValueError,
        "`score_mod` must be made for 2 heads",
    ),
    (
        lambda: PositionEmbedding(20, initializer="nope"),
        ValueError,
        "`initializer` must be one of `keras.initializers`, .* Received: initializer='nope'",
    ),
    (
        lambda: RelativePositionBias(2, embeddings_initializer=3),
        ValueError,
        "`embeddings_initializer` must be one of `keras.initializers`",
    ),
    (
        lambda: PositionEmbedding(20)(np.ones((2, 5, 4)), start_index=ops.convert_to_tensor(16)),
        ValueError,
        "The positions must lie within `sequence_length`, 20. Received: start_index=16, length=5",
    ),
    (
        lambda: SinePositionEncoding()(np.ones((2, 5, 4)), start_index=ops.convert_to_tensor(-1)),
        ValueError,
        "`start_index` must be a non-negative int. Received: start_index=-1",
    ),
    (
        lambda: PositionEmbedding(20)(keras.Input((5, 4)), start_index=16),
        ValueError,
        "The positions must lie within `sequence_length`, 20. Received: start_index=16, length=5",
    ),
    (
        lambda: SinePositionEncoding()(keras.Input((5, 4)), start_index="a"),
        TypeError,
        "`start_index` must be a non-negative int. Received: start_index='a'",
    ),
    (
        lambda: SinePositionEncoding()(some(2, 5, 4), start_index=None),
        TypeError,
        "`start_index` must be a non-negative int. Received: start_index=None",
    ),
    (
        lambda: SinePositionEncoding()(some(2, 5, 4), start_index=2**31 - 4),
        ValueError,
        r"`start_index` must be in \[0, 2\*\*31\), up to the last .*start_index=2147483644",
    ),
    (
        lambda: RotaryEmbedding()(keras.Input((5, 4)), positions=np.arange(4)),
        ValueError,
        r"`positions` must have shape \(5\) or \(any, 5\). Received: positions.shape=\(4,\)",
    ),
    (
        lambda: RotaryEmbedding()(some(2, 5, 4), positions=[[1], [1, 2]]),
        ValueError,
        r"`positions` must be ints, its rows of one length. Received: positions=\[\[1\], \[1, 2",
    ),
    *[
        (lambda kind=kind: kind(20)(None), (TypeError, ValueError), "`inputs` must .*=None")
        for kind in (PositionEmbedding, SinePositionEncoding, RotaryEmbedding)
    ],
    (
        lambda: [layer := PositionEmbedding(20), layer(some(2, 5, 4)), layer(some(2, 5, 3))],
        ValueError,
        r"`inputs` must have shape .*, with 4 features. Received: shape=\(2, 5, 3\)",
    ),
    (
        lambda: RelativePositionBias(2)(np.zeros((2, 3), int), np.arange(3)),
        ValueError,
        r"`q_pos` must have shape \(any\). Received: q_pos.shape=\(2, 3\)",
    ),
    (
        lambda: RelativePositionBias(2)(np.arange(3), np.arange(3.0)),
        TypeError,
        "`k_pos` must be of an int dtype",
    ),
    (
        lambda: MultiHeadAttention(2, 4, rotary_embedding=3),
        TypeError,
        "`rotary_embedding` must be a Keras layer or None. Received: rotary_embedding=3",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5, 3, 4)], ids=str)
def test_each_row_may_have_positions_of_its_own(shape):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    positions = np.array([[0, 1, 2, 3, 4], [7, 2, 0, 1, 9]])
    layer = RotaryEmbedding()
    found = to_numpy(layer(x, positions=positions))
    for row, own in enumerate(positions):
        expected = to_numpy(layer(x[row : row + 1], positions=own))
        np.testing.assert_allclose(found[row : row + 1], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"positions": np.arange(4)}, ValueError, "`positions` must have shape"),
        ({"positions": np.arange(5.0)}, TypeError, "`positions` must be of an int dtype"),
        ({"positions": "a"}, TypeError, "`positions` must be ints. Received: positions='a'"),
        ({"positions": np.arange(5), "start_index": 3}, ValueError, "`start_index` must be 0"),
    ],
)
def test_wrong_positions_are_named(options, error, message):
    with pytest.raises(error, match=message):
        RotaryEmbedding()(np.ones((2, 5, 4), "float32"), **options)


@pytest.mark.parametrize("kind", [lambda **kw: PositionEmbedding(20, **kw), SinePositionEncoding])
def test_a_position_layer_may_return_the_sum_with_its_mask(kind):
    plain, sums, x = kind(), kind(add=True), some(2, 9, 4)
    for layer in (plain, sums):
        layer.build(x.shape)
    sums.set_weights(plain.get_weights())
    expected = x + to_numpy(plain(x, start_index=3))
    np.testing.assert_allclose(to_numpy(sums(x, start_index=3)), expected, atol=1e-6)
    tokens = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(5, 4, mask_zero=True)(tokens)
    assert sums(embedded)._keras_mask is embedded._keras_mask
    model = keras.Sequential(
        [keras.layers.Embedding(5, 4, mask_zero=True), kind(add=True), SelfAttention(2, 4)]
    )
    padded, alone = np.array([[1, 2, 3, 0, 0]]), np.array([[1, 2, 3]])
    found, expected = (to_numpy(model(each)) for each in (padded, alone))
    np.testing.assert_allclose(found[:, :3], expected, atol=1e-6)
    assert sums(keras.ops.cast(x, "float16")).dtype == sums(x).dtype
    half = kind(add=True, dtype="mixed_float16")(x)
    assert keras.backend.standardize_dtype(half.dtype) == "float16"


def traced_positions(layer, xla):
    """The layer compiled, with a length or a start that is not known before."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        specs = [tf.TensorSpec((1, None, 4)), tf.TensorSpec((), "int32")]
        return tf.function(layer.call, input_signature=specs, jit_compile=xla)
    import jax

    return jax.jit(layer.call)


@pytest.mark.skipif(BACKEND == "torch", reason="it is eager: the position is known")
@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize(("start", "length"), [(0, 9), (5, 3), (7, 1), (-1, 2)])
def test_positions_beyond_the_table_are_an_error_or_nan(start, length, xla):
    layer, x = PositionEmbedding(6), some(1, length, 4)
    layer.build(x.shape)
    if BACKEND != "tensorflow" and length > 6:
        with pytest.raises(ValueError, match="`sequence_length`, 6"):
            layer(x)
        return
    call = traced_positions(layer, xla)
    within = to_numpy(call(x[:, :1], np.int32(5)))
    np.testing.assert_allclose(within[:, 0], to_numpy(layer.embedding.embeddings)[5:6], atol=1e-6)
    if BACKEND == "tensorflow" and not xla:
        import tensorflow as tf

        with pytest.raises(tf.errors.InvalidArgumentError, match="within `sequence_length`, 6"):
            call(x, np.int32(start))
    else:
        assert np.isnan(to_numpy(call(x, np.int32(start)))).all()


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX's exporter")
def test_an_exported_table_gives_nan_beyond_its_end():
    import jax

    layer = PositionEmbedding(6)
    layer.build((1, None, 4))
    (n,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((1, n, 4), "float32")
    exported = jax.export.export(jax.jit(layer.call))(shape)
    table = to_numpy(layer.embedding.embeddings)
    np.testing.assert_allclose(to_numpy(exported.call(some(1, 6, 4)))[0], table, atol=1e-6)
    assert np.isnan(to_numpy(exported.call(some(1, 7, 4)))).all()
