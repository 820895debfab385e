"""Plots show the pattern, its plan and its weights; svg and text need no matplotlib."""

import builtins

import numpy as np
import pytest

from sparse_attn import Atrous, BigBird, Causal, Full, Local, PerHead, Strided, plan
from sparse_attn.layers import SelfAttention
from tests.cases import EXPRESSIONS, LEAVES
from tests.compare import to_numpy

matplotlib = pytest.importorskip("matplotlib", reason="plots need matplotlib, of the extra [plot]")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    matplotlib.pyplot.close("all")


def colours(ax):
    """The colours of the picture's cells: an `(n, m, 3)` array."""
    return np.asarray(ax.images[0].get_array())


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_allowed_pairs_have_a_colour_and_others_are_white_or_grey(pattern):
    n = 40
    picture = colours(pattern.plot(n))
    assert picture.shape == (n, n, 3)
    coloured = np.ptp(picture, axis=-1) > 0.1
    np.testing.assert_array_equal(coloured, pattern.mask(n))
    background = np.where(Causal().mask(n), picture.mean(-1) == 1, picture.mean(-1) < 0.95)
    assert background[~coloured].all()


def test_parts_of_a_plan_have_colours_and_are_told():
    pattern = Causal() & Strided(8)
    ax = pattern.plot(64)
    parts = plan(pattern, 64).parts
    assert len(parts) == 2
    told = labels(ax)
    assert len(told) == 3
    for part, label in zip(parts, told, strict=False):
        assert f"{part.scored_pairs:,} pairs scored" in label
    assert told[-1] == "keys ahead of the query"
    picture = colours(ax)
    for part in parts:
        found = {tuple(colour) for colour in picture[part.pattern.mask(64)]}
        assert len(found) == 1
    assert ax.get_title() == "Causal() & Strided(8)"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key position", "query position")


def test_tiles_are_outlined():
    ax = Local(3).plot(64)
    (boxes,) = ax.collections
    (part,) = plan(Local(3), 64).parts
    assert len(boxes.get_paths()) == part.layout.tiles
    assert not Local(3).plot(16384).collections  # too many
    assert not Atrous(8).plot(64).collections  # its queries are no neighbours


def test_cells_of_a_long_pattern_are_shares():
    picture = colours(Local(256).plot(4096))
    assert picture.shape == (128, 128, 3)
    assert (np.ptp(picture[0], axis=-1) > 0.1).sum() == 9  # 256 of 32 each, and the own


def test_other_axes_and_unequal_lengths():
    _, axes = matplotlib.pyplot.subplots(1, 2)
    ax = Local(3).plot(10, 30, ax=axes[1])
    assert ax is axes[1]
    assert colours(ax).shape == (10, 30, 3)
    assert not axes[0].images


def test_heads_are_plotted_side_by_side():
    pattern = PerHead([Local(3), Causal(), Local(3), Full()])
    axes = pattern.plot(20)
    titles = ["Local(3)\nheads 0, 2", "Causal()\nhead 1", "Full()\nhead 3"]
    assert [ax.get_title() for ax in axes] == titles
    with pytest.raises(ValueError, match="`ax` must be 3 axes, one for each pattern"):
        pattern.plot(20, ax=axes[:2])


def test_weights_of_a_layer_over_its_pattern():
    pattern, n = Causal() & Local(4), 12
    x = np.random.default_rng(0).normal(size=(2, n, 8)).astype("float32")
    _, weights = SelfAttention(2, 4, pattern)(x, return_attention_scores=True)
    ax = pattern.plot(n, weights=weights[0])
    drawn = ax.images[1].get_array()
    np.testing.assert_array_equal(~np.ma.getmaskarray(drawn), pattern.mask(n))
    expected = to_numpy(weights)[0].mean(axis=0)
    np.testing.assert_allclose(drawn.filled(0), expected, rtol=1e-6)
    bar = ax.figure.axes[-1]
    assert bar.get_xlabel() == "mean weight of a pair"


def test_weights_in_cells_are_means():
    n = 512
    weights = np.random.default_rng(0).random((n, n))
    drawn = Full().plot(n, weights=weights).images[1].get_array()
    expected = weights.reshape(128, 4, 128, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)


def test_weights_of_heads_of_their_own():
    pattern = PerHead([Local(1), Full()])
    weights = np.stack([np.full((6, 6), 0.25), np.full((6, 6), 0.5)])
    local, full = pattern.plot(6, weights=weights)
    assert (local.images[1].get_array().compressed() == 0.25).all()
    assert (full.images[1].get_array().compressed() == 0.5).all()


def test_weights_and_axes_of_another_kind():
    with pytest.raises(ValueError, match="`weights` must be finite"):
        Full().plot(2, weights=np.array([[1, np.nan], [0, 1]]))
    with pytest.raises(TypeError, match=r"`ax` must be matplotlib axes\. Received: ax='red'"):
        Full().plot(2, ax="red")


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 6, 5), (1, 2, 6, 6), (0, 6, 6)])
def test_weights_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"`weights` must be of shape \(6, 6\) or \(heads, 6, 6\)"):
        Full().plot(6, weights=np.zeros(shape))


def test_lengths_are_checked():
    with pytest.raises(ValueError, match=r"`n` must be a positive int\. Received: n=0"):
        Local(3).plot(0)
    with pytest.raises(ValueError, match="made for lengths up to 300"):
        BigBird(300, 16).plot(400)


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install '\.\[plot\]' in a checkout"):
        Local(3).plot(10)
    assert "<svg" in Local(3)._repr_svg_()


def test_a_per_head_shows_itself_in_a_notebook():
    drawing = PerHead([Local(3), Causal()])._repr_svg_()
    assert drawing.count("<svg") == 3  # one for each, and the whole
