"""Every layer passes the checks that Keras and KerasHub run on theirs."""

import pytest

from sparse_attn import layers
from sparse_attn.patterns import Causal, Local, Strided
from sparse_attn.scores import ALiBi, SoftCap
from tests.layer_checks import check_layer

SELF = {"query": (2, "n", 6)}
CROSS = {"query": (2, "n", 6), "value": (2, "m", 5)}
INPUTS = {"inputs": (2, "n", 6)}


def block_with_options(*args, **options):
    """A block with all that its attention may have."""
    bias = layers.RelativePositionBias(4, embeddings_initializer="normal")
    options |= {"score_mod": [bias, SoftCap(5.0)], "num_key_value_heads": 2}
    return layers.TransformerBlock(
        *args, rotary_embedding=layers.RotaryEmbedding(), use_bias=False, **options
    )


def with_relative_bias(*args, **options):
    """An attention layer with a `RelativePositionBias`, which is called with positions alone."""
    bias = layers.RelativePositionBias(2, embeddings_initializer="normal")
    return layers.MultiHeadAttention(*args, score_mod=bias, **options)


CASES = {
    "multi-head": (layers.MultiHeadAttention, (2, 4), {"pattern": Local(2)}, CROSS, 8),
    "gate": (
        layers.MultiHeadAttention,
        (2, 4, 3),
        {"pattern": Causal() & Strided(3), "use_gate": True, "use_bias": False},
        CROSS,
        5,
    ),
    "dropout": (layers.MultiHeadAttention, (2, 4), {"dropout": 0.2, "sliding_window": 3}, CROSS, 8),
    "losses": (layers.MultiHeadAttention, (2, 4), {"kernel_regularizer": "l2"}, CROSS, 8),
    "scores": (
        layers.MultiHeadAttention,
        (2, 4),
        {"score_mod": [SoftCap(5), ALiBi(2)], "output_shape": 3},
        CROSS,
        8,
    ),
    "relative": (with_relative_bias, (2, 4), {"pattern": Local(2)}, CROSS, 9),
    "grouped": (layers.GroupedQueryAttention, (4, 4, 2), {"pattern": Local(2)}, CROSS, 8),
    "grouped gate": (layers.GroupedQueryAttention, (4, 4, 1), {"use_gate": True}, CROSS, 10),
    "self": (layers.SelfAttention, (2, 4, Causal() & Local(3)), {}, SELF, 8),
    "atrous": (layers.AtrousSelfAttention, (2, 4, 2), {"causal": True}, SELF, 8),
    "local": (layers.LocalSelfAttention, (2, 4, (3, None)), {}, SELF, 8),
    "strided": (layers.StridedSelfAttention, (2, 4, 3), {}, SELF, 8),
    "block": (layers.TransformerBlock, (2, 4, Local(3), 10), {"causal": True}, INPUTS, 16),
    "block, norm last": (
        layers.TransformerBlock,
        (2, 4, None, 10),
        {"norm_first": False, "dropout": 0.2, "seed": 1, "activation": "relu"},
        INPUTS,
        16,
    ),
    "block, options": (block_with_options, (4, 4, Strided(3), 10), {}, INPUTS, 11),
    "embedding": (layers.PositionEmbedding, (20,), {}, INPUTS, 1),
    "embedding, added": (layers.PositionEmbedding, (20,), {"add": True}, INPUTS, 1),
    "sine, added": (layers.SinePositionEncoding, (), {"add": True}, INPUTS, 0),
    "sine": (layers.SinePositionEncoding, (), {}, INPUTS, 0),
    "rotary": (layers.RotaryEmbedding, (), {}, INPUTS, 0),
}


@pytest.mark.parametrize(
    ("kind", "args", "options", "shapes", "weights"), CASES.values(), ids=CASES
)
def test_layer(kind, args, options, shapes, weights, tmp_path):
    check_layer(
        lambda **given: kind(*args, **options, **given),
        shapes,
        num_weights=weights,
        num_losses=4 if "kernel_regularizer" in options else 0,
        num_seed_generators=_generators(kind) if "dropout" in options else 0,
        quantizes=weights > 0,
        folder=tmp_path,
    )


def _generators(kind):
    return 3 if kind is layers.TransformerBlock else 1


def test_no_layer_is_left_out():
    tested = {kind for kind, *_ in CASES.values()}
    # In "relative" it is a part of another layer.
    assert {getattr(layers, name) for name in layers.__all__} - tested == {
        layers.RelativePositionBias
    }
