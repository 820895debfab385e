"""What every layer must do, whatever it computes: one function, to be run over all of them."""

import json
import warnings

import keras
import numpy as np

from tests.compare import to_numpy

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def check_layer(
    make,
    shapes,
    *,
    num_weights,
    num_losses=0,
    num_seed_generators=0,
    passes_mask=True,
    quantizes=True,
    folder,
):
    """The checks that Keras and KerasHub run on their layers.

    Args:
        make: makes the layer, from keyword arguments such as `dtype` and `name`.
        shapes: a dict of the shapes of its inputs by argument, with `n` and `m` for lengths.
        num_weights, num_losses, num_seed_generators: what it has once it is built.
        passes_mask: whether it passes on the mask of its first input.
        quantizes: whether it has sublayers that can be quantized.
        folder: a `Path` for files.
    """
    sizes = {"n": 6, "m": 5}
    _check_config(make)
    _check_built(make, _shapes(shapes, sizes), num_weights, num_losses, num_seed_generators)
    for policy in POLICIES:
        _check_symbolic_is_eager(make, _shapes(shapes, sizes), policy)
    if passes_mask:
        _check_mask(make, _shapes(shapes, sizes))
    model = _model(make, shapes)
    if num_weights:
        _check_fit(model, shapes, sizes, is_random=num_seed_generators > 0)
    for length in (1, 4):
        inputs = _inputs(_shapes(shapes, {"n": length, "m": length}))
        assert np.isfinite(model.predict(inputs, verbose=0)).all()
    _check_reload(model, shapes, folder)
    if quantizes:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Layer .* does not have a `quantize` method")
            model.quantize("int8")
        assert any(getattr(x, "quantization_mode", None) for x in model._flatten_layers())
        _check_reload(model, shapes, folder)


def _shapes(shapes, sizes):
    return {name: tuple(sizes.get(size, size) for size in shape) for name, shape in shapes.items()}


def _inputs(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


def _check_config(make):
    layer = make(name="the_layer")
    config = json.loads(json.dumps(layer.get_config()))
    again = type(layer).from_config(config)
    assert json.loads(json.dumps(again.get_config())) == config
    assert again.name == "the_layer"
    revived = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(revived) is type(layer)
    assert set(vars(revived)) == set(vars(layer))
    for name, value in vars(layer).items():
        if isinstance(value, (int, float, str, tuple)) and name != "_auto_name":
            assert getattr(revived, name) == value, name


def _check_built(make, shapes, num_weights, num_losses, num_seed_generators):
    layer = make()
    layer.build(**{f"{name}_shape": shape for name, shape in shapes.items()})
    assert layer.built
    assert len(layer.trainable_weights) == num_weights
    assert not layer.non_trainable_weights
    generators = [x for sub in layer._flatten_layers() for x in sub._seed_generators]
    assert len(generators) == num_seed_generators
    layer(**_inputs(shapes))
    assert len(layer.losses) == num_losses
    assert len(layer.trainable_weights) == num_weights  # a call makes none


def _check_symbolic_is_eager(make, shapes, policy):
    layer = make(dtype=policy)
    symbolic = layer(**{x: keras.Input(batch_shape=shape) for x, shape in shapes.items()})
    eager = layer(**_inputs(shapes))
    assert tuple(eager.shape) == symbolic.shape
    assert keras.backend.standardize_dtype(eager.dtype) == symbolic.dtype == layer.compute_dtype
    of_shapes = {f"{name}_shape": shape for name, shape in shapes.items()}
    assert tuple(layer.compute_output_shape(**of_shapes)) == symbolic.shape
    for weight in layer.weights:
        if "float" in weight.dtype:
            assert weight.dtype == "float32"


def _check_mask(make, shapes):
    layer = make()
    assert layer.supports_masking
    first, *_ = shapes
    tokens = np.ones(shapes[first][:-1], int)
    tokens[..., -1] = 0
    inputs = _inputs(shapes)
    features = shapes[first][-1]
    inputs[first] = keras.layers.Embedding(3, features, mask_zero=True)(tokens)
    out = layer(**inputs)
    np.testing.assert_array_equal(to_numpy(out._keras_mask), tokens > 0)


def _model(make, shapes):
    unknown = _shapes(shapes, {"n": None, "m": None})
    inputs = {name: keras.Input(shape[1:], name=name) for name, shape in unknown.items()}
    return keras.Model(inputs, make(name="the_layer")(**inputs))


def _check_fit(model, shapes, sizes, is_random):
    inputs = _inputs(_shapes(shapes, sizes))
    target = np.zeros(model.predict(inputs, verbose=0).shape, "float32")
    # With XLA, which takes TensorFlow long to compile, others train layers.
    model.compile("sgd", "mse", jit_compile=keras.backend.backend() == "jax")
    losses = model.fit(inputs, target, epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    if not is_random:
        assert losses[-1] < losses[0]


def _check_reload(model, shapes, folder):
    inputs = _inputs(_shapes(shapes, {"n": 7, "m": 9}))
    expected = model.predict(inputs, verbose=0)
    model.save(folder / "model.keras")
    again = keras.models.load_model(folder / "model.keras")
    np.testing.assert_allclose(again.predict(inputs, verbose=0), expected, atol=1e-6)
    model.save_weights(folder / "model.weights.h5")
    again.load_weights(folder / "model.weights.h5")
    np.testing.assert_allclose(again.predict(inputs, verbose=0), expected, atol=1e-6)
