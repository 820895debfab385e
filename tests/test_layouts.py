"""Layouts: nothing is lost by cutting into tiles, and every tile has the keys it must."""

import keras
import numpy as np
import pytest
from einops import rearrange

from sparse_attn.layouts import (
    Gather,
    Halo,
    Stairs,
    band_layout,
    crop,
    grid_layout,
    select_layout,
    sum_rows,
)
from tests.cases import LENGTHS
from tests.compare import BACKEND, to_numpy


def lists(blocks, listed, numbers):
    """For each block of queries, blocks of keys; some of them do not exist."""
    return np.random.default_rng(blocks).integers(-1, numbers + 1, size=(blocks, listed))


def blocks(size, n):
    return grid_layout((size,), [(0, 0, 1), (None, None, 1)], n, n)


def columns(count, n, m):
    return select_layout(None, None, None, None, n, min(count, m))


LAYOUTS = {
    "halo": lambda n: Halo(1, 4, -3, 6, n),
    "dilated halo": lambda n: Halo(3, 2, -1, 3, n),
    "halo ahead": lambda n: Halo(2, 4, 5, 12, n),
    "halo behind": lambda n: Halo(2, 4, -9, -2, n),
    "blocks": lambda n: blocks(5, n),
    "near blocks": lambda n: grid_layout((3,), [(1, 1, 1), (None, None, 1)], n, n),
    "neighborhood": lambda n: grid_layout((5,), [(2, 2, 1), (1, 1, 1)], n, n),
    "dilated neighborhood": lambda n: grid_layout((5,), [(2, 2, 2), (3, 3, 3)], n, n),
    "film": lambda n: grid_layout((3, 4), [(1, 1, 1), (1, 0, 1), (2, 2, 1)], n, n),
    "columns of a film": lambda n: grid_layout(
        (3, 4), [(0, 0, 1), (None, None, 1), (0, 0, 1)], n, n
    ),
    "rows and columns": lambda n: grid_layout((5,), [(None, 0, 1), (1, 1, 1)], n, n),
    "band": lambda n: band_layout(3, 2, 2, n, n),
    "causal": lambda n: band_layout(None, 0, 1, n, n),
    "comb": lambda n: band_layout(None, None, 3, n, n),
    "columns": lambda n: columns(4, n, n),
    "rows": lambda n: Gather(keras.ops.arange(n)[:, None] + keras.ops.arange(3)[None, :]),
    "gathered blocks": lambda n: Gather(lists(-(-n // 4), 3, -(-n // 2)), queries=4, keys=2),
}


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_join_undoes_split_bit_for_bit(name, n):
    layout = LAYOUTS[name](n)
    x = np.random.default_rng(0).normal(size=(2, n, 3, 4)).astype("float32")
    tiles = layout.split_queries(keras.ops.convert_to_tensor(x))
    np.testing.assert_array_equal(to_numpy(layout.join(tiles, n)), x)


@pytest.mark.parametrize("m", [1, 5, 12, 257])
@pytest.mark.parametrize("n", [1, 7, 13, 64])
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in LAYOUTS
        if "halo" in name or name in ("blocks", "band", "causal", "comb", "columns")
    ],
)
def test_keys_of_a_tile_are_where_the_layout_says(name, n, m):
    layout = LAYOUTS[name](n)
    if isinstance(layout, Stairs):  # these are made for both lengths
        layout = {
            "band": band_layout(3, 2, 2, n, m),
            "causal": band_layout(None, 0, 1, n, m),
            "comb": band_layout(None, None, 3, n, m),
            "columns": columns(4, n, m),
        }[name]
    x = np.arange(1, m + 1, dtype="float32")  # 0 is padding
    tiles = layout.split_keys(keras.ops.convert_to_tensor(x[None, :, None, None]), n)
    found = [to_numpy(rearrange(tile, "1 1 t j 1 -> t j")) for tile in tiles]
    if isinstance(layout, Halo):
        blocks = -(-n // (layout.rate * layout.width))
        starts = [(r, t * layout.width) for r in range(layout.rate) for t in range(blocks)]
        expected = [
            [
                [(u * layout.rate + r) for u in range(at + layout.first, at + layout.last)]
                for r, at in starts
            ]
        ]
    else:
        keys = -(-m // layout.rate)
        expected = [
            [
                [u * layout.rate + r for u in range(k0, keys if k1 is None else k1)]
                for r in range(layout.rate)
            ]
            for _, _, k0, k1, _ in layout.steps
        ]
    for tile, positions in zip(found, expected, strict=True):
        positions = np.array(positions)
        inside = (positions >= 0) & (positions < m)
        np.testing.assert_array_equal(tile, np.where(inside, positions + 1, 0))


def test_gather_lists_rows_and_pads_with_zeros():
    layout = Gather(keras.ops.convert_to_tensor(np.array([[0, 2], [-1, 4], [3, 5]])))
    x = keras.ops.convert_to_tensor(np.arange(1.0, 6.0)[None, :, None, None])
    (tile,) = layout.split_keys(x, 3)
    assert to_numpy(tile)[0, 0, :, :, 0].tolist() == [[1, 3], [0, 5], [4, 0]]


@pytest.mark.parametrize("n", [1, 7, 13, 257])
@pytest.mark.parametrize("name", LAYOUTS)
def test_sum_keys_is_the_adjoint_of_split_keys(name, n):
    layout = LAYOUTS[name](n)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, n, 3, 4))
    tiles = layout.split_keys(keras.ops.convert_to_tensor(x), n)
    others = [rng.normal(size=tile.shape) for tile in tiles]
    back = layout.sum_keys([keras.ops.convert_to_tensor(y) for y in others], n, n)
    assert back.shape == x.shape
    there = sum((to_numpy(tile) * y).sum() for tile, y in zip(tiles, others, strict=True))
    eps = 1e-5 if BACKEND == "jax" else 1e-12
    np.testing.assert_allclose((to_numpy(back) * x).sum(), there, rtol=eps)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_of_gathered_blocks_are_its_tiles(chunk):
    n, m = 17, 11
    whole = Gather(lists(5, 3, 6), queries=4, keys=2)
    x = keras.ops.convert_to_tensor(np.arange(1.0, m + 1)[None, :, None, None])
    (expected,) = (to_numpy(tile) for tile in whole.split_keys(x, n))
    cut = whole.cut(chunk * 4 * 3 * 2)
    (run,) = cut.runs()
    assert run.count == -(-5 // chunk)
    found = [to_numpy(run.layout.of_chunk(c).split_keys(x, n)[0]) for c in range(run.count)]
    found = np.concatenate(found, axis=2)
    np.testing.assert_array_equal(found[:, :, :5], expected)
    assert (found[:, :, 5:] == 0).all()


def test_sum_rows_adds_what_overlaps_and_leaves_out_what_is_beyond():
    rng = np.random.default_rng(0)
    starts, sizes, length = [-3, 2, 4, 15, 18], [7, 5, 2, 3, 9], 20
    pieces = [rng.normal(size=(2, size, 1, 3)) for size in sizes]
    expected = np.zeros((2, length + 20, 1, 3))
    for piece, start in zip(pieces, starts, strict=True):
        expected[:, start + 10 : start + 10 + piece.shape[1]] += piece
    found = sum_rows([keras.ops.convert_to_tensor(x) for x in pieces], starts, length)
    np.testing.assert_allclose(to_numpy(found), expected[:, 10 : 10 + length], rtol=1e-6)


@pytest.mark.parametrize("start", [-7, -2, 0, 3, 9])
@pytest.mark.parametrize("length", [1, 5, 12])
def test_crop(start, length):
    x = np.arange(1.0, 7.0)[None, :, None]
    rows = [x[0, i, 0] if 0 <= i < 6 else 0 for i in range(start, start + length)]
    assert to_numpy(crop(keras.ops.convert_to_tensor(x), start, length))[0, :, 0].tolist() == rows


@pytest.mark.parametrize("size", [4, 64])
def test_a_length_that_divides_gets_no_extra_block(size):
    x = keras.ops.zeros((1, 4 * size, 1, 1))
    (tile,) = blocks(size, 4 * size).split_queries(x)
    assert tuple(tile.shape) == (1, 1, 4, size, 1)
