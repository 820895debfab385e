"""Plots of a pattern, with matplotlib: its pairs, the parts of its plan, their tiles."""

import textwrap

import numpy as np

from sparse_attn import pictures
from sparse_attn.checks import received
from sparse_attn.costs import tile_positions
from sparse_attn.patterns import PerHead
from sparse_attn.plan import plan

CELLS = 128  # along each axis, at most
TILES = 512  # of a part that has more of them, none is outlined
# By Okabe and Ito, told apart by the colour-blind too: blue, vermilion, green, purple.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
AHEAD, BEHIND, OUTLINE = "#e4e7ea", "#ffffff", "#24292f"
SIDE = 5.0  # of a plot, in inches
LONGEST = 3  # times as long as it is high, or the other way: beyond, cells are no squares


def plot(pattern, n, m=None, weights=None, ax=None):
    """See `Pattern.plot`."""
    pyplot = _import_matplotlib().pyplot
    n, m = pattern._lengths(n, m)
    if weights is not None:
        weights = _check_weights(weights, n, m)
    if isinstance(pattern, PerHead):
        return _plot_heads(pyplot, pattern, n, m, weights, ax)
    if ax is None:
        _, (ax,) = _subplots(pyplot, [pattern], n, m, weights)
    elif not hasattr(ax, "add_collection"):
        raise TypeError(received("ax", "matplotlib axes", ax))
    if weights is None:
        _draw_plan(ax, pattern, n, m)
    else:
        _draw_weights(ax, pattern, n, m, weights.mean(axis=0))
    ax.set_title(textwrap.fill(repr(pattern), 52, max_lines=3), fontsize="medium", color=OUTLINE)
    ax.set_xlabel("key position")
    ax.set_ylabel("query position")
    for axis, share in (("x", m / n), ("y", n / m)):
        ax.locator_params(axis=axis, nbins=8 if share > 0.5 else 4, integer=True)
    return ax


def _import_matplotlib():
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError(
            "`plot` needs matplotlib: pip install matplotlib, or pip install '.[plot]' in a "
            "checkout of sparse_attn. Without it there are `text` and `svg`."
        ) from error
    return matplotlib


def _check_weights(weights, n, m):
    """The weights as a `(heads, n, m)` array."""
    from keras import ops

    try:
        weights = ops.convert_to_numpy(weights)
        weights = np.asarray(weights, None if "float" in str(weights.dtype) else "float64")
    except (TypeError, ValueError):
        raise TypeError(received("weights", "an array of numbers", weights)) from None
    if weights.ndim not in (2, 3) or weights.shape[-2:] != (n, m) or not weights.size:
        requirement = f"of shape ({n}, {m}) or (heads, {n}, {m}), as a layer's for one row are"
        raise ValueError(received("weights", requirement, weights.shape))
    if not np.isfinite(weights.astype("float32")).all():
        raise ValueError("`weights` must be finite. Received: NaN or infinite ones")
    return weights.reshape(-1, n, m)


def _plot_heads(pyplot, pattern, n, m, weights, axes):
    """A plot for each distinct pattern, side by side."""
    heads = len(pattern.patterns) if weights is None else len(weights)
    groups = pattern.groups(heads)
    if axes is None:
        _, axes = _subplots(pyplot, groups, n, m, weights)
    axes = np.ravel(axes)
    if len(axes) != len(groups):
        raise ValueError(received("ax", f"{len(groups)} axes, one for each pattern", len(axes)))
    for (each, numbers), ax in zip(groups.items(), axes, strict=True):
        plot(each, n, m, None if weights is None else weights[numbers], ax)
        told = f"head {numbers[0]}" if len(numbers) == 1 else f"heads {_listed(numbers)}"
        ax.set_title(f"{ax.get_title()}\n{told}", fontsize="medium", color=OUTLINE)
    return axes


def _subplots(pyplot, patterns, n, m, weights):
    """A figure with room for a plot of each pattern, and its axes."""
    below = 2.0  # titles, labels and a bar
    if weights is None:
        below = 1.6 + 0.4 * max(len(plan(pattern, n, m)) for pattern in patterns)
    size = len(patterns) * SIDE, float(np.clip(SIDE * n / m, SIDE / LONGEST, 2 * SIDE)) + below
    figure, axes = pyplot.subplots(
        1, len(patterns), figsize=size, layout="constrained", squeeze=False
    )
    return figure, axes[0]


def _listed(numbers):
    whole = list(range(numbers[0], numbers[-1] + 1)) == list(numbers)
    return f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers))


def _draw_plan(ax, pattern, n, m):
    from matplotlib.patches import Patch

    parts = plan(pattern, n, m).parts
    shape = min(n, CELLS), min(m, CELLS)
    shares = [_shares(part.pattern, n, m, *shape) for part in parts]
    picture, legend = _background(*shape, n, m), []
    most = np.max(shares, axis=0, initial=0) if shares else None
    for part, share, colour in zip(parts, shares, COLOURS * len(parts), strict=False):
        here = (share > 0) & (share == most)
        depth = (0.35 + 0.65 * share[here])[:, None]  # even one pair in a cell is seen
        picture[here] = depth * _rgb(colour) + (1 - depth)
        name = textwrap.shorten(repr(part.pattern), 44, placeholder=" ...")
        legend.append(Patch(color=colour, label=f"{name}\n{part.scored_pairs:,} pairs scored"))
        _outline(ax, tile_positions(part, n, m), colour)
    _show(ax, picture, n, m)
    if m > 1:
        legend.append(Patch(facecolor=AHEAD, edgecolor=OUTLINE, label="keys ahead of the query"))
    ax.legend(handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0), **_LEGEND)


# Below the labels of the axis, which are that many lines high.
_LEGEND = {"fontsize": "small", "frameon": False, "handlelength": 1.2, "borderaxespad": 4.5}


def _draw_weights(ax, pattern, n, m, weights):
    """The mean weight of the pairs in each cell where some are allowed."""
    from matplotlib.colors import PowerNorm

    rows, columns = shape = min(n, CELLS), min(m, CELLS)
    allowed = _shares(pattern, n, m, *shape) > 0
    edges = pictures.edges(n, rows), pictures.edges(m, columns)
    means = np.add.reduceat(np.add.reduceat(weights, edges[0][:-1], 0), edges[1][:-1], 1)
    means = means / (np.diff(edges[0])[:, None] * np.diff(edges[1]))
    most = float(np.quantile(means[allowed], 0.99)) if allowed.any() else 1.0
    norm = PowerNorm(0.5, vmin=0, vmax=max(most, 1e-9))  # a few queries have few keys to share
    _show(ax, _background(rows, columns, n, m), n, m)
    image = _show(ax, np.ma.masked_where(~allowed, means), n, m, cmap="cividis", norm=norm)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.7, location="bottom", extend="max")
    bar.set_label("mean weight of a pair")
    ticks = np.array([0, 0.25, 1]) * norm.vmax  # equally far apart
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])


def _shares(pattern, n, m, rows, columns):
    return pictures.shares(pattern._answer, n, m, rows, columns, pattern.rows_apart(n))


def _background(rows, columns, n, m):
    """Colours of the cells: another where all keys lie ahead of the queries."""
    last, first = pictures.edges(n, rows)[1:] - 1, pictures.edges(m, columns)[:-1]
    ahead = first[None, :] > last[:, None]
    return np.where(ahead[:, :, None], _rgb(AHEAD), _rgb(BEHIND))


def _rgb(colour):
    from matplotlib.colors import to_rgb

    return np.array(to_rgb(colour))


def _show(ax, picture, n, m, **options):
    aspect = "equal" if 1 / LONGEST <= n / m <= LONGEST else "auto"
    options |= {"extent": (0, m, n, 0), "interpolation": "nearest", "aspect": aspect}
    return ax.imshow(picture, zorder=0, **options)


def _outline(ax, tiles, colour):
    """The outlines of tiles whose queries are neighbours."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    if sum(len(queries) for queries, _ in tiles) > TILES:
        return
    boxes = []
    for queries, keys in tiles:
        for rows, columns in zip(queries, keys, strict=True):
            down, across = _stretches(rows), _stretches(columns)
            if len(down) == 1 and len(across) * len(keys) <= TILES:
                ((q0, q1),) = down
                boxes += [Rectangle((k0, q0), k1 - k0, q1 - q0) for k0, k1 in across]
    if not boxes:
        return
    style = {"facecolor": "none", "edgecolor": colour, "linewidth": 0.7, "alpha": 0.8}
    ax.add_collection(PatchCollection(boxes, **style))


def _stretches(positions):
    """Positions as stretches `(start, stop)`."""
    positions = np.unique(positions[positions >= 0])
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
