"""Pieces: however a call is cut up, kept or worked out again, the result is the same."""

import gc
import weakref

import keras
import numpy as np
import pytest

from sparse_attn import (
    Atrous,
    Axial,
    BigBird,
    Blocks,
    Causal,
    Dilated,
    Fixed,
    Full,
    Global,
    Local,
    Longformer,
    Neighborhood,
    Prefix,
    Random,
    Strided,
    sparse_attention,
    stream,
)
from sparse_attn.layouts import Halo, band_layout, grid_layout
from sparse_attn.reference import dense_attention
from sparse_attn.stream import PIECE_BYTES, schedule, score_bytes
from tests.cases import Diagonals, Near
from tests.compare import (
    BACKEND,
    FLOAT,
    assert_equals_oracle,
    at_once,
    close,
    gradients_of,
    outputs_and_gradients,
    random_inputs,
    random_masks,
    to_numpy,
)

PATTERNS = [
    Full(),
    Causal(),
    Local(3),
    Causal() & Local(5),
    Local((6, 1)),
    Local(6) & ~Local(2),
    Atrous(3),
    Dilated(2, 3),
    Blocks(4),
    Causal() & Strided(4),
    Causal() & (Local(3) | Prefix(2)),
    Local(4) & Diagonals(),
    Diagonals(),
    Near(3),
    Longformer(3, (0, 20)),
    Causal() & Fixed(6, 2),
    BigBird(40, 4, 1),
    Random(40, 4, 2),
    Neighborhood((7, 6), 1),
    Neighborhood((8, 5), 1, 2) & Causal(),
    Neighborhood((4, 3, 4), 1),
    Axial((4, 3, 4)),
]
# How small the pieces are, and whether they are kept.
MODES = {
    "whole": (PIECE_BYTES, 2**30),
    "heads": (4000, 2**30),
    "chunks": (800, 2**30),
    "streamed": (PIECE_BYTES, 0),
    "streamed chunks": (800, 0),
}


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """Sets the size of pieces, and returns `max_score_bytes`."""
    piece_bytes, max_score_bytes = MODES[request.param]
    monkeypatch.setattr(stream, "PIECE_BYTES", piece_bytes)
    return {"max_score_bytes": max_score_bytes}


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_every_path_equals_oracle(pattern, mode):
    assert_equals_oracle(pattern, 37, 37, **random_masks(37, 37), **mode)


@pytest.mark.parametrize("lengths", [(13, 29), (29, 13)], ids=str)
@pytest.mark.parametrize("pattern", [Local((3, 1)), Strided(4)], ids=repr)
def test_every_path_takes_unequal_lengths(pattern, lengths, mode):
    assert_equals_oracle(pattern, *lengths, **random_masks(*lengths), **mode)


@pytest.mark.parametrize("pattern", [Local(3), Causal(), Causal() & Strided(4)], ids=repr)
def test_every_path_takes_a_mask_of_pairs(pattern, mode):
    mask = np.random.default_rng(5).random((2, 2, 37, 37)) < 0.6
    for shape in (mask, mask[:, :1], mask[:1, 0]):
        assert_equals_oracle(pattern, 37, 37, attention_mask=shape, **mode)


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_every_path_takes_segments(pattern, mode):
    segments = np.sort(np.random.default_rng(5).integers(0, 5, (2, 37)), axis=1)
    assert_equals_oracle(pattern, 37, 37, segment_ids=segments, **random_masks(37, 37), **mode)


@pytest.mark.parametrize("pattern", [Local(3), Causal() & Strided(4), Global(2)], ids=repr)
def test_every_path_takes_segments_of_queries_and_keys(pattern, mode):
    rng = np.random.default_rng(5)
    segments = rng.integers(0, 3, (2, 21)), rng.integers(0, 4, (2, 37))
    assert_equals_oracle(pattern, 21, 37, segment_ids=segments, **mode)


@pytest.mark.parametrize("pattern", [Local(3), Causal()], ids=repr)
def test_every_path_takes_a_bias(pattern, mode):
    bias = np.random.default_rng(5).normal(size=(1, 2, 29, 29))
    assert_equals_oracle(pattern, 29, 29, bias=bias, **mode)


@pytest.mark.parametrize(
    "pattern", [Causal(), Local(2), Causal() & Strided(4), Global(2)], ids=repr
)
def test_gradients_of_gradients(pattern, mode):
    """Along a random direction, as the oracle's gradients change."""
    n = 29
    inputs, masks = random_inputs(n, n), random_masks(n, n)
    rng = np.random.default_rng(7)
    out_grad = keras.ops.convert_to_tensor(rng.normal(size=(2, n, 2, 3)).astype(FLOAT))
    cotangents, direction = ([rng.normal(size=x.shape).astype(FLOAT) for x in inputs] for _ in "ab")

    def weighted(q, k, v):
        return sparse_attention(q, k, v, pattern, **masks, **mode) * out_grad

    found, second = outputs_and_gradients(gradients_of(weighted), inputs, cotangents)

    def expected(step):
        moved = [x.astype("float64") + step * way for x, way in zip(inputs, direction, strict=True)]
        *_, gradients = dense_attention(*moved, pattern, out_grad=to_numpy(out_grad), **masks)
        return [gradients[name] for name in ("query", "key", "value")]

    for one, other in zip(found, expected(0), strict=True):
        close(one, other, "gradients")
    weights = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}  # a derivative, right to step**4
    change, step = 0.0, 1e-3
    for place, weight in weights.items():
        pairs = zip(cotangents, expected(place * step), strict=True)
        change += weight / step * sum((cotangent * x).sum() for cotangent, x in pairs)
    along = sum((x * way).sum() for x, way in zip(second, direction, strict=True))
    np.testing.assert_allclose(along, change, rtol=1e-3 if FLOAT == "float32" else 1e-8)


def dropped(pattern, cotangent, max_score_bytes, seed=4):
    """Output and gradients under dropout, and a function that gives the output alone."""

    def function(q, k, v):
        options = {"dropout": 0.3, "seed": seed, "max_score_bytes": max_score_bytes}
        return (sparse_attention(q, k, v, pattern, **options),)

    inputs, jitted = random_inputs(37, 37), at_once(function)
    (out,), gradients = outputs_and_gradients(function, inputs, (cotangent,))
    return inputs, out, gradients, lambda *x: to_numpy(jitted(*x)[0]).astype("float64")


@pytest.mark.parametrize("pattern", [Local(3), Causal(), Strided(4)], ids=repr)
def test_gradients_under_dropout_are_those_of_the_output(pattern, mode):
    # The backward pass must drop what the forward pass did, or a small step goes elsewhere.
    rng = np.random.default_rng(1)
    cotangent = rng.normal(size=(2, 37, 2, 3))
    inputs, _, gradients, output = dropped(pattern, cotangent, **mode)
    eps, tolerance = (1e-2, 2e-2) if BACKEND == "jax" else (1e-6, 1e-5)
    for i, gradient in enumerate(gradients):
        step = rng.normal(size=inputs[i].shape)
        ahead, behind = (
            output(*[(x + sign * eps * step).astype(FLOAT) if i == j else x
                     for j, x in enumerate(inputs)])
            for sign in (1, -1)
        )  # fmt: skip
        slope = ((ahead - behind) / (2 * eps) * cotangent).sum()
        expected = (gradient * step).sum()
        assert abs(slope - expected) < tolerance * max(1, abs(expected))


def test_no_two_pieces_drop_alike(mode):
    # Every tile of `Blocks` has the same queries, keys and values here.
    def function(q, k, v):
        return sparse_attention(q, k, v, Blocks(4), dropout=0.5, seed=7, **mode)

    x = np.ones((2, 32, 2, 3), "float32")
    out = np.asarray(keras.ops.convert_to_numpy(function(x, x, x)))
    rows = out[..., 0].reshape(2, 8, 4, 2).transpose(0, 1, 3, 2).reshape(32, 4)
    assert len(np.unique(rows, axis=0)) > 20


def test_dropout_keeps_the_mean_on_every_path(mode):
    x = np.ones((1, 64, 2, 4), "float32")
    outs = [
        keras.ops.convert_to_numpy(
            sparse_attention(x, x, x, Local(7), dropout=0.4, seed=seed, **mode)
        )
        for seed in range(12)
    ]
    assert abs(np.mean(outs) - 1) < 0.03


# ---- Queries without a key, empty batches -------------------------------------


@pytest.mark.parametrize("pattern", [Local(2), Causal(), Blocks(4)], ids=repr)
def test_a_query_without_a_key_gets_0_where_no_lse_is_asked_for(pattern, mode):
    inputs = random_inputs(37, 37)
    key_mask = np.random.default_rng(2).random((2, 37)) < 0.4
    key_mask[:, :8] = False
    cotangent = np.random.default_rng(3).normal(size=(2, 37, 2, 3)).astype(FLOAT)

    def function(q, k, v):
        return (sparse_attention(q, k, v, pattern, key_mask=key_mask, **mode),)

    (out,), gradients = outputs_and_gradients(function, inputs, (cotangent,))
    expected, _, grads = dense_attention(*inputs, pattern, key_mask=key_mask, out_grad=cotangent)
    assert (expected == 0).all(axis=(0, 2, 3)).any()
    close(out, expected, "out")
    np.testing.assert_array_equal(out == 0, expected == 0)
    for name, gradient in zip(grads, gradients, strict=True):
        close(gradient, grads[name], name)


@pytest.mark.parametrize("max_score_bytes", [0, 2**30])
@pytest.mark.parametrize("pattern", [Local(2), Causal(), Strided(4)], ids=repr)
def test_an_empty_batch_gives_an_empty_output(pattern, max_score_bytes):
    q, k, v = (x[:0] for x in random_inputs(37, 37))
    out = sparse_attention(q, k, v, pattern, max_score_bytes=max_score_bytes)
    assert tuple(out.shape) == (0, 37, 2, 3)


@pytest.mark.parametrize("pattern", [Causal() & ~Local(5), Local(3)], ids=repr)
def test_gradients_are_0_where_nothing_can_attend(pattern):
    n = 0 if pattern == Local(3) else 5
    inputs = random_inputs(5, 5, b=2 if n else 0)
    cotangents = (np.ones((len(inputs[0]), 5, 2, 3), FLOAT),)

    def function(q, k, v):
        return (sparse_attention(q, k, v, pattern),)

    (out,), gradients = outputs_and_gradients(function, inputs, cotangents)
    assert not out.any()
    for x, gradient in zip(inputs, gradients, strict=True):
        np.testing.assert_array_equal(gradient, np.zeros_like(x))


@pytest.mark.parametrize("pattern", [Local((3, 1)), Causal() & Strided(4), Blocks(4)], ids=repr)
def test_every_path_takes_query_positions(pattern, mode):
    positions = np.array([28, 3, 3, 17, 0, 40])
    masks = random_masks(6, 31)
    assert_equals_oracle(pattern, 6, 31, query_positions=positions, **masks, **mode)


on_torch = pytest.mark.skipif(BACKEND != "torch", reason="what PyTorch's tensors hold")


@on_torch
def test_what_the_backward_pass_held_goes_with_it(monkeypatch):
    import torch

    made = []

    class Seen(stream._Pieces):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(weakref.ref(self))

    monkeypatch.setattr(stream, "_Pieces", Seen)
    q, k, v = (torch.tensor(x, requires_grad=True) for x in random_inputs(13, 13))
    gc.disable()
    try:
        out = sparse_attention(q, k, v, Local(3))
        assert made[0]() is not None
        torch.autograd.grad(out.sum(), q)
        assert made[0]() is None
        sparse_attention(q, k, v, Local(3))
        assert made[1]() is None
    finally:
        gc.enable()


@on_torch
def test_no_weights_are_kept_where_no_gradient_can_come(monkeypatch):
    import torch

    kept = []
    forward = stream._Pieces.forward

    def spy(self):
        packed = forward(self)
        kept.append(len(self.kept))
        return packed

    monkeypatch.setattr(stream._Pieces, "forward", spy)
    q, k, v = (torch.tensor(x, requires_grad=True) for x in random_inputs(13, 13))
    sparse_attention(q, k, v, Local(3))
    with torch.no_grad():
        sparse_attention(q, k, v, Local(3))
    sparse_attention(*(x.detach() for x in (q, k, v)), Local(3))
    assert kept == [1, 0, 0]


@on_torch
def test_a_graph_that_is_retained_gives_its_gradient_twice(mode):
    import torch

    q, k, v = (torch.tensor(x, requires_grad=True) for x in random_inputs(37, 37))
    out = sparse_attention(q, k, v, Strided(4), dropout=0.3, seed=1, **mode)
    first = torch.autograd.grad((out**2).sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad((out**2).sum(), (q, k, v))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_allclose(to_numpy(x), to_numpy(y), rtol=1e-12)


# ---- How a call is cut up ----------------------------------------------------


def test_a_small_call_is_one_piece():
    found = schedule(band_layout(16, 16, 1, 128, 128), 1, 8, 4, "float32")
    assert found.num_pieces(1, 8) == 1


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        band_layout(256, 256, 1, 2**17, 2**17),
        band_layout(None, 0, 1, 8192, 8192),
        band_layout(None, None, 1, 8192, 8192),
        band_layout(100, 0, 7, 2**18, 2**18),
        grid_layout((512,), [(0, 0, 1), (None, None, 1)], 2**16, 2**16),
        band_layout(None, None, 1, 2**17, 300),
        grid_layout((256,), [(3, 3, 1), (3, 3, 1)], 2**16, 2**16),
    ],
    ids=repr,
)
def test_pieces_are_small_and_hold_what_the_layout_does(layout, streamed):
    found = schedule(layout, 3, 8, 4, "float32", streamed)
    runs = found.layout.runs()
    for run in runs:
        batch = 1 if streamed else 3
        bytes_ = score_bytes(run.scored_pairs, batch, found.heads, "float32")
        assert bytes_ <= (2.1 if found.heads == 1 else 1) * PIECE_BYTES
    pairs = sum(run.count * run.scored_pairs for run in runs)
    assert layout.scored_pairs <= pairs <= 1.05 * layout.scored_pairs


def test_a_long_dense_layout_has_few_runs():
    assert len(band_layout(None, None, 1, 2**17, 2**17).cut(1000).runs()) == 1
    assert len(band_layout(None, 0, 1, 2**17, 2**17).cut(10**6).runs()) <= 16


def test_chunks_are_even():
    # 33 blocks in chunks of at most 16 are 3 times 11, not 16, 16 and 1.
    layout = Halo(1, 4, -4, 8, 33 * 4).cut(16 * 4 * 12)
    assert (layout.chunk, layout.runs()[0].count) == (11, 3)


def test_an_unknown_batch_counts_as_8():
    assert score_bytes(10, None, 2, "bfloat16") == score_bytes(10, 8, 2, "float32") == 640
