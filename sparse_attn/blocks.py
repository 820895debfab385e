"""The blocks of a pattern that are not empty, found by asking its predicate.

The predicate is asked about one row of blocks at a time, so that the work is
n * m where nothing is known of the pattern, and the memory never. Of a pattern
that is known to be the same in all of a block, one pair of it is asked about.
"""

import itertools
from dataclasses import dataclass

import numpy as np

SIZES = (32, 64, 128)  # of blocks
GROUPS = 3  # of rows whose lists are about equally long


@dataclass(frozen=True)
class Blocks:
    """The blocks of a pattern that are not empty, row by row.

    Args:
        size: the size of a block.
        rows: for each row of blocks the numbers of those that are not empty, an array.
        whole: for each row whether these are allowed as a whole, an array of bools.
        band: the least `left` and `right` of a band that holds all pairs, or `None`.
    """

    size: int
    rows: list
    whole: list
    band: tuple[int, int] | None = None

    def merged(self, factor):
        """The same in blocks that are larger by a factor."""
        if factor == 1:
            return self
        rows, whole = [], []
        for start in range(0, len(self.rows), factor):
            numbers = np.concatenate(self.rows[start : start + factor]) // factor
            flags = np.concatenate(self.whole[start : start + factor])
            found, places = np.unique(numbers, return_inverse=True)
            rows.append(found)
            whole.append(np.bincount(places, flags, len(found)) == factor * factor)
        return Blocks(self.size * factor, rows, whole, self.band)

    @property
    def counts(self):
        return np.array([len(row) for row in self.rows])


def find(answer, n, m, size, columns, same=1):
    """Find the blocks of a pattern that are not empty.

    Args:
        answer: a predicate of `(n,)` and `(m,)` positions, giving `(n, m)` bools.
        n, m: numbers of queries and keys.
        size: the size of a block, a multiple of `same`.
        columns: a function of the first and the last query of a row of blocks:
            which keys these may attend at most, as `(start, stop)`.
        same: the predicate is the same in all of a block of this size.

    Returns:
        `Blocks`.
    """
    rows, whole, left, right = [], [], [], []
    for first in range(0, n, size):
        q_pos = np.arange(first, min(first + size, n), same)
        start, stop = columns(first, min(first + size, n) - 1)
        start = start // size * size
        k_pos = np.arange(start, stop, same)
        if not len(k_pos):
            rows.append(np.zeros(0, int))
            whole.append(np.zeros(0, bool))
            continue
        found = answer(q_pos, k_pos)
        edges = np.arange(0, len(k_pos), size // same)
        some = np.flatnonzero(np.logical_or.reduceat(found.any(axis=0), edges))
        # Of a block at the end, only the keys that there are must be allowed.
        every = np.logical_and.reduceat(found.all(axis=0), edges)
        rows.append(some + start // size)
        whole.append(every[some])
        asked = np.flatnonzero(found.any(axis=1))
        if same == 1 and len(asked):
            queries, allowed = q_pos[asked], found[asked]
            left.append((queries - k_pos[0] - allowed.argmax(axis=1)).max())
            right.append((k_pos[-1] - allowed[:, ::-1].argmax(axis=1) - queries).max())
    band = (int(max(left)), int(max(right))) if left else None
    return Blocks(size, rows, whole, band)


def groups(counts, size, overhead):
    """Rows of blocks in a few groups, so that few blocks are added to make lists equally long.

    Args:
        counts: how many blocks are in the list of each row.
        size: the size of a block.
        overhead: what a group costs, in pairs.

    Returns:
        A list of arrays of numbers of rows; rows with no blocks are in none.
    """
    present = np.unique(counts[counts > 0])
    best, chosen = None, []
    if len(present) > 12:  # a few will do
        present = np.unique(np.quantile(present, np.linspace(0, 1, 12), method="higher"))
    for number in range(1, min(GROUPS, len(present)) + 1):
        for cuts in itertools.combinations(present[:-1], number - 1):
            limits = [0, *cuts, present[-1]]
            parts = [
                np.flatnonzero((counts > low) & (counts <= high))
                for low, high in itertools.pairwise(limits)
            ]
            pairs = sum(len(rows) * counts[rows].max() for rows in parts) * size**2
            total = pairs + overhead * (number - 1)
            if best is None or total < best:
                best, chosen = total, parts
    return chosen
