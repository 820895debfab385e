"""Exported models give what the Keras model gives, at lengths that no block divides."""

import subprocess
import sys

import keras
import numpy as np
import pytest

from sparse_attn import (
    BigBird,
    Causal,
    Fixed,
    Global,
    Local,
    Neighborhood,
    PerHead,
    Prefix,
    SoftCap,
)
from sparse_attn.layers import (
    GroupedQueryAttention,
    MultiHeadAttention,
    RelativePositionBias,
    RotaryEmbedding,
    SelfAttention,
)
from tests.compare import BACKEND, to_numpy

SIZES = [(1, 1), (7, 2), (29, 3), (50, 1)]


def make_model():
    """Of unknown batch and length, with a layer of each kind of tiles."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(20, 8, mask_zero=True)(tokens)
    x = x + SelfAttention(2, 4, Local(3), rotary_embedding=RotaryEmbedding())(x)
    x = x + SelfAttention(2, 4, Causal() & (Local(3) | Prefix(2)))(x)
    x = x + SelfAttention(2, 4, PerHead([Local(2) | Global((1, 5)), Causal() & Fixed(4)]))(x)
    x = x + MultiHeadAttention(2, 4, pattern=BigBird(64, 4, 1), use_gate=True)(x, x)
    x = x + SelfAttention(2, 4, Neighborhood((16, 4), 1))(x)
    mods = [SoftCap(5.0), RelativePositionBias(4)]
    x = x + GroupedQueryAttention(4, 4, 2, pattern=Causal(), score_mod=mods)(x, x)
    return keras.Model(tokens, keras.layers.Dense(3)(x))


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
print("equal")
"""


@pytest.mark.skipif(BACKEND == "torch", reason="Keras exports no SavedModel from PyTorch")
@pytest.mark.skipif(BACKEND == "jax", reason="not in this suite yet: jax2tf takes minutes")
def test_a_saved_model_in_a_process_that_knows_tensorflow_alone(tmp_path):
    model = make_model()
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
