"""Pictures of a pattern: queries down, keys across, as text or as SVG.

Every picture is drawn from shares of cells: how many of a cell's pairs the
pattern allows. Where there are more than `PAIRS` of them, a few queries of a
tall cell stand for all but those that are known to differ from their
neighbours, so that a pattern can be shown at any length.
"""

import itertools
import re

import numpy as np

PAIRS = 2**24  # up to here, each is asked about
SHADES, ASCII_SHADES = " ░▒▓█", " .:+#"  # from no pair of a cell to all of them
_SAMPLES = 8  # queries of a tall cell, at least
_CELL = 6  # side of a cell in an SVG, in its own units
_GAP = 16  # between drawings
_ALLOWED = "#0b5fa5"
_EMPTY = "#eef1f4"


def shares(answer, n, m, rows, columns, apart=()):
    """How full each cell of a grid over a pattern is.

    Args:
        answer: a predicate of `(n,)` and `(m,)` positions, giving `(n, m)` bools.
        n, m: numbers of queries and keys.
        rows, columns: numbers of cells, at most `n` and `m`.
        apart: queries that no other one stands for, sorted ints.

    Returns:
        A `(rows, columns)` float array of shares in [0, 1].
    """
    bounds, apart = edges(m, columns), np.asarray(apart, int)
    k_pos = np.arange(m)
    samples = max(_SAMPLES, PAIRS // (rows * m))
    grid = []
    for start, stop in itertools.pairwise(edges(n, rows)):
        q_pos = np.linspace(start, stop - 1, min(samples, stop - start)).astype(int)
        share = answer(q_pos, k_pos).mean(axis=0)
        alone = apart[np.searchsorted(apart, start) : np.searchsorted(apart, stop)]
        if len(q_pos) < stop - start and len(alone):
            others = q_pos[~np.isin(q_pos, alone)]
            share = answer(others, k_pos).mean(axis=0) if len(others) else 0.0
            parts = [
                answer(some, k_pos).sum(axis=0)
                for some in np.array_split(alone, 1 + len(alone) // 64)
            ]
            weight = len(alone) / (stop - start)
            share = share * (1 - weight) + sum(parts) / (stop - start)
        grid.append(np.add.reduceat(share, bounds[:-1]) / np.diff(bounds))
    return np.array(grid)


def edges(size, cells):
    """Where cells of a picture begin and end: `(cells + 1,)` ints, about equally far apart."""
    return np.linspace(0, size, cells + 1).astype(int)


def text(answer, n, m, width, apart=(), shades=SHADES):
    """Lines of text, one character a cell; see `Pattern.text`."""
    grid = shares(answer, n, m, min(n, max(1, width // 2)), min(m, width), apart)
    levels = np.ceil(grid * (len(shades) - 1) - 1e-9).astype(int)
    return "\n".join("".join(shades[level] for level in line).rstrip() for line in levels)


def svg(answer, n, m, cells, title, apart=()):
    """An SVG drawing, one square a cell; see `Pattern.svg`."""
    grid = shares(answer, n, m, min(n, cells), min(m, cells), apart)
    height, width = (size * _CELL for size in grid.shape)
    squares = []
    for row, line in enumerate(grid):
        for start, stop, share in _runs(line):
            opacity = 0.25 + 0.75 * share  # even one pair in a cell is seen
            squares.append(
                f'<rect x="{start * _CELL}" y="{row * _CELL}" '
                f'width="{(stop - start) * _CELL}" height="{_CELL}" opacity="{opacity:.2f}"/>'
            )
    title = f"{title}, {n} queries (down) by {m} keys (across)"
    title = title.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{2 * width // 3}" height="{2 * height // 3}"><title>{title}</title>'
        f'<rect width="{width}" height="{height}" fill="{_EMPTY}"/>'
        f'<g fill="{_ALLOWED}" shape-rendering="crispEdges">{"".join(squares)}</g></svg>'
    )


def side_by_side(drawings):
    """SVG drawings in a row, as one."""
    sizes = [
        [int(x) for x in re.findall(r' (?:width|height)="(\d+)"', each)[:2]] for each in drawings
    ]
    starts = [*itertools.accumulate((width + _GAP for width, _ in sizes), initial=0)]
    width, height = starts[-1] - _GAP, max(height for _, height in sizes)
    placed = [
        f'<g transform="translate({x} 0)">{each}</g>'
        for x, each in zip(starts, drawings, strict=False)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">{"".join(placed)}</svg>'
    )


def _runs(line):
    """Stretches of equal shares above 0: `(start, stop, share)`."""
    cuts = [0, *(np.flatnonzero(np.diff(line)) + 1), len(line)]
    return [(a, b, line[a]) for a, b in itertools.pairwise(cuts) if line[a] > 0]
