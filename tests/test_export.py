"""Exported models give what the Keras model gives, at lengths that no block divides."""

import importlib.util
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from sparse_attn import (
    Atrous,
    Band,
    BigBird,
    Causal,
    Fixed,
    Full,
    Global,
    Local,
    Longformer,
    Neighborhood,
    PerHead,
    PositionBias,
    Prefix,
    SoftCap,
    Strided,
)
from sparse_attn.layers import (
    GroupedQueryAttention,
    MultiHeadAttention,
    PositionEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
    SelfAttention,
    SinePositionEncoding,
)
from tests.cases import EACH_CLASS
from tests.compare import BACKEND, to_numpy


@keras.saving.register_keras_serializable(package="tests")
class ByPairs(SelfAttention):
    """A mask of pairs that is different for each head."""

    def call(self, x, mask=None):
        heads = ops.reshape(x, (*ops.shape(x)[:2], 2, 4))[..., 0]
        heads = ops.transpose(heads, (0, 2, 1))
        pairs = ops.expand_dims(heads, 3) > ops.expand_dims(heads, 2)
        return super().call(x, mask=mask, attention_mask=pairs)


SIZES = [(1, 1), (7, 2), (29, 3), (50, 1)]
LAYERS = {
    "full": lambda: SelfAttention(2, 4, Full()),
    "causal": lambda: SelfAttention(2, 4, Causal()),
    "band": lambda: SelfAttention(2, 4, Local(3), rotary_embedding=RotaryEmbedding()),
    "strided": lambda: SelfAttention(2, 4, Causal() & (Local(3) | Atrous(4))),
    "prefix": lambda: SelfAttention(2, 4, Causal() & (Local(3) | Prefix(2))),
    "grid": lambda: SelfAttention(2, 4, Neighborhood((16, 4), 1)),
    "blocks": lambda: MultiHeadAttention(2, 4, pattern=BigBird(64, 4, 1), use_gate=True),
    "heads": lambda: SelfAttention(2, 4, PerHead([Local(2) | Global((1, 5)), Causal() & Fixed(4)])),
    "mods": lambda: SelfAttention(
        4, 4, Causal() & Local(5), score_mod=[SoftCap(5.0), RelativePositionBias(4)]
    ),
    "pairs": lambda: ByPairs(2, 4, Strided(4)),
    "scores": lambda: GroupedQueryAttention(
        4, 4, 2, pattern=Causal(), score_mod=[SoftCap(5.0), RelativePositionBias(4)]
    ),
}


def make_model(name):
    """Of unknown batch and length."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(20, 8, mask_zero=True)(tokens)
    x = PositionEmbedding(64, add=True)(SinePositionEncoding(add=True)(x))
    layer = LAYERS[name]()
    x = keras.layers.add([x, layer(x) if isinstance(layer, SelfAttention) else layer(x, x)])
    model = keras.Model(tokens, keras.layers.Dense(3)(x))
    model(inputs(7, 2))
    return model


def inputs(n, b):
    tokens = np.random.default_rng(n).integers(1, 20, (b, n)).astype("int32")
    tokens[-1, n // 2 + 1 :] = 0
    return tokens


SERVE = """
import sys
import numpy as np, tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
for name in sys.argv[2:]:
    data = np.load(name)
    np.testing.assert_allclose(model.serve(data["x"]).numpy(), data["y"], atol=1e-4)
assert "sparse_attn" not in sys.modules
print("equal")
"""


pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # the exporters warn of themselves
]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports no SavedModel from PyTorch")
@pytest.mark.parametrize("name", ["heads", "scores", "blocks"])
def test_a_saved_model_in_a_process_that_knows_tensorflow_alone(name, tmp_path):
    pytest.importorskip("tensorflow", reason="what serves a SavedModel is not installed")
    model = make_model(name)
    model.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    names = []
    for n, b in SIZES:
        names.append(f"{n}.npz")
        np.savez(tmp_path / names[-1], x=inputs(n, b), y=to_numpy(model(inputs(n, b))))
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", SERVE, "model", *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its gradients are TensorFlow's")
@pytest.mark.parametrize("pattern", [Strided(4), BigBird(64, 4, 1)], ids=repr)
def test_a_saved_model_has_the_gradients_of_the_model(pattern, tmp_path):
    tf = importlib.import_module("tensorflow")
    model = in_a_model(pattern, None)
    model.export(tmp_path / "model", format="tf_saved_model", verbose=False)
    served = tf.saved_model.load(tmp_path / "model")
    x = tf.constant(vectors(29, 2))
    found = []
    for function in (served.serve, model):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(function(x) ** 2)
        found.append(to_numpy(tape.gradient(total, x)))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


CONVERTERS = {"tensorflow": "tf2onnx", "torch": "onnxscript"}
FEW = {"grid", "scores"}  # PyTorch alone converts in a second or two


no_names = pytest.mark.skipif(
    BACKEND == "jax", reason="jax2onnx does not reckon with unknown lengths"
)


def as_onnx(model, path):
    """A model, exported to a file of ONNX, as a function."""
    for package in (CONVERTERS[BACKEND], "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package}, of the extra [onnx], is not installed")
    import onnxruntime

    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


@no_names
@pytest.mark.parametrize("name", [name for name in LAYERS if BACKEND == "torch" or name in FEW])
def test_onnx_in_its_own_runtime(name, tmp_path):
    model = make_model(name)
    run = as_onnx(model, str(tmp_path / "model.onnx"))
    for n, b in SIZES:
        np.testing.assert_allclose(run(inputs(n, b)), to_numpy(model(inputs(n, b))), atol=1e-4)


class Inverse(PositionBias):
    """A factor of `1 / (q - k)`, which is not defined where a query attends to itself."""

    def __init__(self):
        self.tensors = (keras.Variable([2.0], trainable=False),)

    def bias(self, q_pos, k_pos, head, factor):
        return factor / ops.cast(q_pos - k_pos, factor.dtype)


@no_names
def test_onnx_has_a_bias_that_is_defined_at_allowed_pairs_only(tmp_path):
    x = keras.Input((None, 8))
    model = keras.Model(x, SelfAttention(2, 4, Band(5, -1), score_mod=Inverse())(x))
    given = np.random.default_rng(0).normal(size=(2, 16, 8)).astype("float32")
    expected = to_numpy(model(given))
    run = as_onnx(model, str(tmp_path / "model.onnx"))
    np.testing.assert_allclose(run(given), expected, atol=1e-4)


@no_names
def test_onnx_gives_nan_beyond_the_length_of_a_pattern(tmp_path):
    x = keras.Input((None, 8))
    model = keras.Model(x, SelfAttention(2, 4, Neighborhood((16,), 1))(x))
    good, bad = (np.random.default_rng(n).normal(size=(2, n, 8)) for n in (16, 17))
    expected = to_numpy(model(good))
    run = as_onnx(model, str(tmp_path / "model.onnx"))
    np.testing.assert_allclose(run(good.astype("float32")), expected, atol=1e-4)
    assert np.isnan(run(bad.astype("float32"))).all()


# ---- LiteRT --------------------------------------------------------------------

INTERPRET = """
import sys, warnings
import numpy as np
warnings.simplefilter("ignore")
try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    from tensorflow import lite
    Interpreter = lite.Interpreter
for path in sys.argv[1:]:
    data = np.load(path + ".npz")
    interpreter = Interpreter(path + ".tflite")
    place = interpreter.get_input_details()[0]["index"]
    for number in range(len(data.files) // 2):
        x, y = data[f"x{number}"], data[f"y{number}"]
        interpreter.resize_tensor_input(place, x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(place, x)
        interpreter.invoke()
        found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
        np.testing.assert_allclose(found, y, atol=1e-4, err_msg=f"{path} at {x.shape}")
print("equal")
"""
on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="Keras exports to LiteRT from TensorFlow"
)


def convert(model, path, cases):
    """A model of LiteRT, with its own operations alone, and what the Keras model gives."""
    model.export(path / "saved", format="tf_saved_model", verbose=False)
    tf = importlib.import_module("tensorflow")
    converted = tf.lite.TFLiteConverter.from_saved_model(str(path / "saved")).convert()
    path.with_suffix(".tflite").write_bytes(converted)
    cases = [each for x in cases for each in (x, to_numpy(model(x)))]
    names = [f"{kind}{number}" for number in range(len(cases) // 2) for kind in "xy"]
    np.savez(path.with_suffix(".npz"), **dict(zip(names, cases, strict=True)))
    return path.stem


def interpret(names, folder):
    """Compare them in a process of their own, which an operation may end."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", INTERPRET, *names],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        cwd=folder,
    )
    assert done.stdout.strip() == "equal", done.stderr


def in_a_model(pattern, length):
    x = keras.Input((length, 8))
    return keras.Model(x, SelfAttention(2, 4, pattern)(x))


def vectors(n, b):
    return np.random.default_rng(n).normal(size=(b, n, 8)).astype("float32")


ONE_OF_EACH = {kind: patterns[-1] for kind, patterns in EACH_CLASS.items()} | {
    "band": Causal() & Local(5),
    "strided": Strided(4),
    "longformer": Longformer(2, (0, 9)),
    "neighborhood": Neighborhood((16, 4), 1),
}


@on_tensorflow
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_litert_serves_a_pattern_of_each_class_at_unknown_lengths(kind, tmp_path):
    model = in_a_model(ONE_OF_EACH[kind], None)
    cases = [vectors(n, b) for n, b in ((7, 2), (29, 1), (64, 3))]
    interpret([convert(model, tmp_path / "unknown", cases)], tmp_path)


@on_tensorflow
@pytest.mark.parametrize("kind", ["chosen", "strided", "neighborhood"])
def test_litert_serves_a_pattern_at_a_known_length(kind, tmp_path):
    model = in_a_model(ONE_OF_EACH[kind], 48)
    interpret([convert(model, tmp_path / "known", [vectors(48, 2), vectors(48, 1)])], tmp_path)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's converter")
@pytest.mark.parametrize("kind", [*ONE_OF_EACH, "shared heads", "shared heads with a bias"])
def test_litert_serves_a_pattern_at_a_known_length_from_pytorch(kind, tmp_path):
    # This imports it before the first export, as docs/keras.md says.
    pytest.importorskip("litert_torch", reason="the converter, litert-torch, is not installed")
    if kind in ONE_OF_EACH:
        model = in_a_model(ONE_OF_EACH[kind], 300 if kind == "band" else 48)
    else:
        x = keras.Input((300, 8))
        bias = RelativePositionBias(4, bidirectional=False) if "bias" in kind else None
        layer = GroupedQueryAttention(4, 4, 2, pattern=Causal() & Local(5), score_mod=bias)
        model = keras.Model(x, layer(x, x))
    x = vectors(model.input_shape[1], 2)
    signature = [keras.InputSpec(shape=x.shape)]  # else a batch of 1
    path = tmp_path / "model.tflite"
    model.export(path, format="litert", verbose=False, input_signature=signature)
    np.savez(tmp_path / "model.npz", x0=x, y0=to_numpy(model(x)))
    interpret(["model"], tmp_path)


@on_tensorflow
@pytest.mark.parametrize("name", ["prefix", "heads", "mods", "pairs"])
def test_litert_serves_masks_scores_and_heads_at_unknown_lengths(name, tmp_path):
    model = make_model(name)
    cases = [inputs(n, b) for n, b in ((7, 2), (29, 3))]
    interpret([convert(model, tmp_path / "masked", cases)], tmp_path)


@on_tensorflow
def test_litert_gives_nan_beyond_the_length_of_a_pattern(tmp_path):
    model = in_a_model(Neighborhood((16,), 1), None)
    name = convert(model, tmp_path / "longer", [vectors(16, 2)])
    bad = vectors(17, 2)
    data = dict(np.load(tmp_path / "longer.npz")) | {"x1": bad, "y1": np.full_like(bad, np.nan)}
    np.savez(tmp_path / "longer.npz", **data)
    interpret([name], tmp_path)


@on_tensorflow
def test_litert_is_given_no_shared_heads(tmp_path):
    with pytest.raises(Exception, match="SelectV2"):  # of the converter, which has its own
        convert(make_model("scores"), tmp_path / "shared", [])


@on_tensorflow
def test_litert_by_the_export_of_keras(tmp_path):
    model = make_model("band")
    path = tmp_path / "model.tflite"
    model.export(path, format="litert", verbose=False)
    cases = [inputs(29, 2)]
    np.savez(tmp_path / "model.npz", x0=cases[0], y0=to_numpy(model(cases[0])))
    interpret(["model"], tmp_path)
