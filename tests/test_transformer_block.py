"""A block is what one writes by hand from Keras' layers and an attention layer, masks minded."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from sparse_attn import ALiBi, Axial, Causal, Full, Local, Neighborhood, PerHead
from sparse_attn.layers import (
    GroupedQueryAttention,
    MultiHeadAttention,
    PositionEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
    TransformerBlock,
)
from tests.compare import BACKEND, outputs_and_gradients, to_numpy

rng = np.random.default_rng(0)
X = rng.normal(size=(2, 9, 6)).astype("float32")
MASK = np.arange(9) < np.array([[9], [5]])


class ByHand(layers.Layer):
    """The same of Keras' layers, around an attention layer."""

    def __init__(self, attention, hidden_dim, norm_first=True, activation="gelu", use_bias=True):
        super().__init__()
        self.attention, self.norm_first = attention, norm_first
        self.norms = [layers.LayerNormalization(epsilon=1e-5) for _ in range(2)]
        self.hidden = layers.Dense(hidden_dim, activation=activation, use_bias=use_bias)
        self.outer = layers.Dense(6, use_bias=use_bias)

    def build(self, shape):
        self.attention.build(shape, shape)
        for norm in self.norms:
            norm.build(shape)
        self.hidden.build(shape)
        self.outer.build((*shape[:-1], self.hidden.units))

    def call(self, x, mask=None):
        first, second = self.norms
        masks = {"query_mask": mask, "value_mask": mask}
        if self.norm_first:
            y = first(x)
            x = x + self.attention(y, y, **masks)
            return x + self.outer(self.hidden(second(x)))
        x = first(x + self.attention(x, x, **masks))
        return second(x + self.outer(self.hidden(x)))


CASES = {
    "plain": ({"pattern": None}, MultiHeadAttention(2, 4), {}),
    "window": ({"pattern": Local(2)}, MultiHeadAttention(2, 4, pattern=Local(2)), {}),
    "norm last": (
        {"pattern": Local(2), "norm_first": False},
        MultiHeadAttention(2, 4, pattern=Local(2)),
        {"norm_first": False},
    ),
    "causal, relu": (
        {"pattern": Local(2), "causal": True, "activation": "relu"},
        MultiHeadAttention(2, 4, pattern=Causal() & Local(2)),
        {"activation": "relu"},
    ),
    "shared keys": (
        {"pattern": Local(2), "num_key_value_heads": 1, "use_bias": False},
        GroupedQueryAttention(4, 2, 1, pattern=Local(2), use_bias=False),
        {"use_bias": False},
    ),
    "positions": (
        {"pattern": None, "score_mod": ALiBi(2), "rotary_embedding": RotaryEmbedding()},
        MultiHeadAttention(2, 4, score_mod=ALiBi(2), rotary_embedding=RotaryEmbedding()),
        {},
    ),
    "streamed": (
        {"pattern": Causal(), "max_score_bytes": 0},
        MultiHeadAttention(2, 4, pattern=Causal()),
        {},
    ),
}


def weights_of(layer):
    """In one order: of attention, the norms and the feed-forward network."""
    if isinstance(layer, ByHand):
        parts = [layer.attention, *layer.norms, layer.hidden, layer.outer]
    else:
        norms = [layer.attention_norm, layer.feedforward_norm]
        parts = [layer.attention, *norms, layer.feedforward_hidden, layer.feedforward_output]
    return [weight for part in parts for weight in part.trainable_variables]


@pytest.mark.parametrize(("options", "attention", "same"), CASES.values(), ids=CASES)
def test_equals_the_block_written_by_hand(options, attention, same):
    """Values and the gradients by inputs and all weights, under a padding mask."""
    block = TransformerBlock(2, 4, hidden_dim=10, **options)
    by_hand = ByHand(attention, 10, **same)
    found, expected = [], []
    values = None
    cotangent = rng.normal(size=X.shape).astype("float32") * MASK[..., None]
    for layer, results in ((block, found), (by_hand, expected)):
        layer.build(X.shape)
        if values is None:
            values = [rng.normal(size=w.shape).astype("float32") / 3 for w in weights_of(layer)]
        own = weights_of(layer)
        order = [next(i for i, w in enumerate(own) if w is v) for v in layer.trainable_variables]

        def function(x, *weights, layer=layer, order=order):
            ordered = [weights[i] for i in order]
            state = layer.non_trainable_variables
            return [layer.stateless_call(ordered, state, x, mask=MASK)[0]]

        results += outputs_and_gradients(function, [X, *values], [cotangent])
    np.testing.assert_allclose(found[0][0][MASK], expected[0][0][MASK], atol=1e-5)
    by_x, *by_weights = found[1]
    also_by_x, *also_by_weights = expected[1]
    np.testing.assert_allclose(by_x[MASK], also_by_x[MASK], atol=1e-4)
    for gradient, other in zip(by_weights, also_by_weights, strict=True):
        np.testing.assert_allclose(gradient, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("poison", [np.nan, 1e30])
def test_padding_changes_neither_output_nor_gradients(norm_first, poison):
    block = TransformerBlock(2, 4, Local(2), 10, norm_first=norm_first)
    block.build(X.shape)
    values = [to_numpy(weight) for weight in block.trainable_variables]
    cotangent = rng.normal(size=X.shape).astype("float32") * MASK[..., None]
    results = []
    for fill in (0.0, poison):
        x = np.where(MASK[..., None], X, fill).astype("float32")

        def function(x, *weights):
            return [block.stateless_call(list(weights), [], x, mask=MASK)[0]]

        results.append(outputs_and_gradients(function, [x, *values], [cotangent]))
    (plain, by_plain), (poisoned, by_poisoned) = results
    np.testing.assert_array_equal(plain[0][MASK], poisoned[0][MASK])
    for gradient, other in zip(by_plain, by_poisoned, strict=True):
        np.testing.assert_array_equal(gradient, other)


def test_a_padded_batch_equals_the_rows_alone():
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 6, mask_zero=True)(tokens)
    x = PositionEmbedding(16, add=True)(x)
    for _ in range(2):
        x = TransformerBlock(2, 4, Local(2), 10)(x)  # an error if a mask got lost
    model = keras.Model(tokens, x)
    padded, alone = np.array([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 1]]), np.array([[1, 2, 3]])
    found = to_numpy(model(padded))
    np.testing.assert_allclose(found[:1, :3], to_numpy(model(alone)), atol=1e-5)
    np.testing.assert_allclose(found[1:], to_numpy(model(padded[1:])), atol=1e-5)


def test_masks_and_segments():
    block = TransformerBlock(2, 4, Local(2), 10)
    whole = to_numpy(block(X, mask=MASK))
    np.testing.assert_allclose(to_numpy(block(X, inputs_mask=MASK)), whole, atol=1e-6)
    np.testing.assert_allclose(to_numpy(block(X, mask=MASK.astype("float32"))), whole, atol=1e-6)
    both = to_numpy(block(X, mask=MASK, inputs_mask=MASK[:, ::-1]))
    expected = to_numpy(block(X, mask=MASK & MASK[:, ::-1]))
    np.testing.assert_allclose(both, expected, atol=1e-6)
    segments = np.array([[0] * 4 + [1] * 5] * 2)
    found = to_numpy(block(X, segment_ids=segments))
    np.testing.assert_allclose(found[:, :4], to_numpy(block(X[:, :4])), atol=1e-5)
    pairs = segments[:, :, None] == segments[:, None]
    np.testing.assert_allclose(to_numpy(block(X, attention_mask=pairs)), found, atol=1e-5)
    with pytest.raises(ValueError, match="`mask` must be a mask of bools"):
        block(X, mask=np.where(MASK, 0, -1e9))


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_mask": np.full((2, 9, 9), -1e9, "float32")},
        {"attention_mask": np.ones((2, 9, 8), bool)},
        {"segment_ids": np.zeros((2, 8), int)},
    ],
)
def test_what_is_wrong_is_said_in_the_name_of_the_block(wrong):
    block = TransformerBlock(2, 4, Local(2), 10)
    block(X)
    (name,) = wrong
    with pytest.raises(ValueError, match=f"calling TransformerBlock.call.*(?s:.*)`{name}` must"):
        block(X, **wrong)


def test_a_lost_mask_is_reported_in_the_name_of_the_block():
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 6, mask_zero=True)(tokens) + 1.0
    block = TransformerBlock(2, 4, Local(2), 10, name="block")
    with pytest.warns(UserWarning, match=r"mask of `inputs` did not arrive at layer 'block'"):
        block(x)
    block(x)  # once
    x = layers.Embedding(9, 6, mask_zero=True)(tokens) + 1.0
    TransformerBlock(2, 4, Local(2), 10)(x, mask=keras.Input((None,), dtype="bool"))


def test_shapes_and_several_axes():
    block = TransformerBlock(2, 4, Neighborhood((4, 3), 1), 10)
    image = rng.normal(size=(2, 4, 3, 6)).astype("float32")
    mask = rng.random((2, 4, 3)) < 0.8
    found = to_numpy(block(image, mask=mask))
    flat = to_numpy(block(image.reshape(2, 12, 6), mask=mask.reshape(2, 12)))
    np.testing.assert_allclose(found.reshape(flat.shape), flat, atol=1e-6)
    assert block(keras.Input((None, 3, 6))).shape == (None, None, 3, 6)
    assert block.compute_output_shape((None, None, 6)) == (None, None, 6)


def test_what_it_holds():
    block = TransformerBlock(2, 4, Local(2), 10, causal=True)
    assert (block.num_heads, block.key_dim) == (2, 4)
    assert block.pattern == block.attention.pattern == Causal() & Local(2)
    assert TransformerBlock(2, 4, None, 10).pattern == Full()
    block.build((None, None, 6))
    assert {x.name for x in block._flatten_layers(recursive=False, include_self=False)} == {
        "attention",
        "attention_norm",
        "feedforward_norm",
        "feedforward_hidden",
        "feedforward_output",
    }


def test_dropout_acts_in_training_only_and_follows_its_seed():
    blocks = [TransformerBlock(2, 4, None, 10, dropout=0.5, seed=seed) for seed in (1, 1, 2)]
    for block in blocks:
        block.build(X.shape)
        block.set_weights(blocks[0].get_weights())
    first, same, other = (to_numpy(block(X, training=True)) for block in blocks)
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0
    plain = TransformerBlock(2, 4, None, 10)
    plain.build(X.shape)
    for weight, value in zip(plain.weights, blocks[0].trainable_variables, strict=True):
        weight.assign(value)
    np.testing.assert_allclose(to_numpy(blocks[0](X)), to_numpy(plain(X)), atol=1e-6)


# ---- Saved, quantized, adapted, exported --------------------------------------


def block_model(**options):
    options = {"causal": True, "num_key_value_heads": 1, **options}
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 6, mask_zero=True)(tokens)
    x = TransformerBlock(2, 4, Local(2), 10, name="block", **options)(x)
    return keras.Model(tokens, layers.Dense(3)(x))


TOKENS = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])


def modes(model):
    return {
        layer.path.partition("block")[2]: layer.quantization_mode
        for layer in model._flatten_layers()
        if isinstance(layer, layers.Dense) and "block" in layer.path
    }


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.filterwarnings("ignore:Invalid quantization mode")  # of an Embedding, float8
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_a_quantized_block_is_saved(mode, tmp_path):
    model = block_model(rotary_embedding=RotaryEmbedding(), score_mod=RelativePositionBias(2))
    model.quantize(mode)
    assert len(modes(model)) == 6
    assert set(modes(model).values()) == {mode}
    expected = to_numpy(model(TOKENS))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert modes(again) == modes(model)
    np.testing.assert_allclose(to_numpy(again(TOKENS)), expected, atol=1e-5)


def test_lora_of_a_block_is_trained_and_saved(tmp_path):
    model = block_model()
    block = model.get_layer("block")
    for dense in (block.attention.query_dense, block.feedforward_hidden):
        dense.enable_lora(2)
        dense.lora_kernel_b.assign(rng.normal(size=dense.lora_kernel_b.shape))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(to_numpy(again(TOKENS)), to_numpy(model(TOKENS)), atol=1e-5)


def test_a_map_of_policies_of_a_block(tmp_path):
    policies = keras.dtype_policies.DTypePolicyMap()
    int8 = keras.dtype_policies.QuantizedDTypePolicy("int8", "float32")
    policies["block/attention/query"] = policies["block/feedforward_hidden"] = int8
    model = block_model(dtype=policies)
    quantized = {path for path, mode in modes(model).items() if mode == "int8"}
    assert quantized == {"/attention/query", "/feedforward_hidden"}
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert modes(again) == modes(model)
    np.testing.assert_allclose(to_numpy(again(TOKENS)), to_numpy(model(TOKENS)), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16", "mixed_bfloat16"])
def test_precision_of_a_block(dtype):
    block, plain = TransformerBlock(2, 4, Local(2), 10, dtype=dtype), None
    out = block(X.astype("float32"), mask=MASK)
    assert keras.backend.standardize_dtype(out.dtype) == block.compute_dtype
    plain = TransformerBlock(2, 4, Local(2), 10)
    plain.build(X.shape)
    plain.set_weights([np.asarray(w, "float32") for w in block.get_weights()])
    expected = to_numpy(plain(X, mask=MASK))
    found = to_numpy(ops.cast(out, "float32"))
    tolerance = 0.1 if "bfloat16" in dtype else 0.02
    np.testing.assert_allclose(found[MASK], expected[MASK], atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports no SavedModel from PyTorch")
@pytest.mark.filterwarnings("ignore")
def test_an_exported_block_of_unknown_length(tmp_path):
    tf = pytest.importorskip("tensorflow")
    model = block_model()
    model.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    served = tf.saved_model.load(tmp_path / "model")
    for n in (1, 5, 12):
        tokens = np.random.default_rng(n).integers(0, 9, (2, n)).astype("int32")
        expected = to_numpy(model(tokens))
        np.testing.assert_allclose(served.serve(tokens).numpy(), expected, atol=1e-4)


def test_blocks_train():
    model = block_model(dropout=0.1)
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=BACKEND == "jax")
    y = np.ones((2, 5, 3))
    before = model.evaluate(TOKENS, y, verbose=0)  # without dropout
    model.fit(TOKENS, y, epochs=20, verbose=0)
    assert model.evaluate(TOKENS, y, verbose=0) < before / 4


BAD = [
    (lambda: TransformerBlock(0, 4, None, 10), ValueError, "num_heads"),
    (lambda: TransformerBlock(2, 0, None, 10), ValueError, "key_dim"),
    (lambda: TransformerBlock(2, 4, None, 0), ValueError, "hidden_dim"),
    (lambda: TransformerBlock(2, 4, 3, 10), TypeError, "`pattern` must be a Pattern"),
    (lambda: TransformerBlock(2, 4, None, 10, causal=1), TypeError, "`causal` must be True or"),
    (lambda: TransformerBlock(2, 4, None, 10, norm_first=0), TypeError, "`norm_first` must be"),
    (lambda: TransformerBlock(2, 4, None, 10, dropout=1), ValueError, "`dropout` must be"),
    (lambda: TransformerBlock(2, 4, None, 10, epsilon=0), ValueError, "`epsilon` must be"),
    (lambda: TransformerBlock(2, 4, None, 10, activation="no"), ValueError, "`activation` must"),
    (
        lambda: TransformerBlock(2, 4, None, 10, num_key_value_heads=3),
        ValueError,
        "`num_key_value_heads` must be a divisor of `num_heads`, 2. Received:",
    ),
    (
        lambda: TransformerBlock(3, 4, PerHead([Full(), Causal()]), 10),
        ValueError,
        "must be a multiple of 2",
    ),
    (lambda: TransformerBlock(2, 4, None, 10)(X[0]), ValueError, "`inputs` must have shape"),
    (lambda: TransformerBlock(2, 4, None, 10)(None), TypeError, "`inputs` must be a tensor"),
    (lambda: TransformerBlock(2, 4, None, 10)(X, X), ValueError, "TransformerBlock takes one"),
    (
        lambda: TransformerBlock(2, 4, None, 10)(keras.Input((3, None))),
        ValueError,
        "`inputs` must have shape .*features known",
    ),
    (
        lambda: TransformerBlock(2, 4, Axial((3, 4)), 10)(np.ones((1, 4, 3, 6))),
        ValueError,
        "`inputs` must be those of the grid",
    ),
    (
        lambda: TransformerBlock(2, 4, None, 10)(X, mask=MASK[:, 1:]),
        ValueError,
        "`mask` must have shape",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
