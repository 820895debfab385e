"""`rearrange` in graphs that do not know their sizes yet."""

import gc
import weakref

import einops
import keras
import numpy as np
import pytest

from sparse_attn import Atrous, Causal, Local
from sparse_attn.layers import SelfAttention
from sparse_attn.reshaping import rearrange
from tests.compare import FLOAT, to_numpy

tf = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs of unknown sizes are TensorFlow's"
)

CASES = [  # a pattern, the shape of a tensor, which of its sizes a graph knows, lengths of axes
    ("b n h d -> b h n d", (2, 6, 3, 4), (None, None, 3, 4), {}),
    ("b (t i) h d -> b h t i d", (2, 6, 3, 4), (None, None, 3, 4), {"i": 2}),
    ("b (t i) h d -> b h t i d", (2, 6, 3, 4), (2, 6, 3, None), {"i": 2}),
    ("b h (r t) i ... -> b h r t i ...", (2, 3, 6, 4, 5), (None,) * 5, {"r": 3}),
    ("b ... d -> b (...) d", (2, 3, 4, 5), (None, None, 4, 5), {}),
    ("b h (i t) d -> t (b h) i d", (2, 3, 6, 4), (None, 3, None, 4), {"i": 2}),
    ("t j -> (t j)", (5, 4), (None, None), {}),
    ("t j -> 1 t 1 j", (5, 4), (None, 4), {}),
    ("1 (i b) j -> (b j) i", (1, 6, 4), (1, None, None), {"i": 1}),
    ("(y x) -> 1 y 1 x", (6,), (None,), {"x": 2}),
]
SIZED = [case for case in CASES if case[-1]]


def check(pattern, shape, known, lengths, given, xla=False):
    x = np.random.default_rng(0).normal(size=shape).astype(FLOAT)
    specs = [tf.TensorSpec(known, FLOAT), *[tf.TensorSpec((), "int32")] * len(given)]

    @tf.function(input_signature=specs, jit_compile=xla)
    def function(x, *tensors):
        by_name = dict(zip(given, tensors, strict=True)) if given else lengths
        found = rearrange(x, pattern, **by_name)
        return found, tf.gradients(tf.reduce_sum(found**2), x)[0]

    found, gradient = function(x, *given.values())
    np.testing.assert_array_equal(to_numpy(found), einops.rearrange(x, pattern, **lengths))
    np.testing.assert_allclose(to_numpy(gradient), 2 * x, rtol=1e-6)


@pytest.mark.parametrize("xla", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize(("pattern", "shape", "known", "lengths"), CASES)
def test_rearrange_of_unknown_sizes_equals_einops(pattern, shape, known, lengths, xla):
    check(pattern, shape, known, lengths, {}, xla)


@pytest.mark.parametrize(("pattern", "shape", "known", "lengths"), SIZED)
def test_lengths_may_be_tensors(pattern, shape, known, lengths):
    check(pattern, shape, known, lengths, {name: tf.constant(n) for name, n in lengths.items()})


def test_sizes_that_are_known_stay_known_and_0_is_one():
    @tf.function(input_signature=[tf.TensorSpec((None, None, 3, 4))])
    def function(x):
        found = rearrange(x, "b (t i) h d -> b t (i h) d", i=2)
        assert found.shape.as_list() == [None, None, 6, 4]
        return found

    assert tuple(function(tf.zeros((0, 6, 3, 4))).shape) == (0, 3, 6, 4)
    assert tuple(function(tf.zeros((2, 0, 3, 4))).shape) == (2, 0, 6, 4)


def test_einops_holds_no_tensor_of_a_graph():
    """It keeps what it found for a shape."""

    def graph():
        function = tf.function(lambda x: rearrange(x, "b (t i) d -> t b (i d)", i=2))
        return weakref.ref(function.get_concrete_function(tf.TensorSpec((None, None, 4))).graph)

    found = graph()
    gc.collect()
    assert found() is None


def test_what_does_not_go_together_is_refused():
    for known in ((2, 6), (None, 6)):
        function = tf.function(lambda x: rearrange(x, "b n d -> b d n"), autograph=False)
        with pytest.raises(einops.EinopsError, match="b n d -> b d n"):
            function.get_concrete_function(tf.TensorSpec(known))


def test_a_graph_of_a_training_step_is_small():
    """It is traced node by node; einops alone would take as many as all this."""
    layer = SelfAttention(4, 32, Causal() & (Local(16) | Atrous(16)))
    layer.build((None, None, 128))

    @tf.function(input_signature=[tf.TensorSpec((None, None, 128))])
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x) ** 2)
        return tape.gradient(loss, layer.trainable_variables)

    assert len(step.get_concrete_function().graph.get_operations()) < 4500
