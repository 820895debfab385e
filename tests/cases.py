"""Patterns to test with: some fixed, and random expressions over all of them."""

from dataclasses import dataclass

import keras
from hypothesis import settings
from hypothesis import strategies as st

from sparse_attn import (
    Atrous,
    Axial,
    Band,
    BigBird,
    Blocks,
    Causal,
    Dilated,
    Fixed,
    Full,
    Global,
    Grid,
    Local,
    Longformer,
    Neighborhood,
    Pattern,
    Prefix,
    PrefixLM,
    Random,
    SparseTransformer,
    StreamingLLM,
    Strided,
)

LENGTHS = [1, 2, 3, 5, 7, 8, 12, 13, 257]
UNEQUAL = [(1, 5), (5, 1), (7, 12), (12, 7), (13, 257), (257, 13)]


@keras.saving.register_keras_serializable(package="tests")
class Diagonals(Pattern):
    """A user's plain subclass: it defines nothing but the predicate."""

    def __call__(self, q_pos, k_pos):
        return (q_pos - k_pos) * (q_pos - k_pos) % 3 == 1


@keras.saving.register_keras_serializable(package="tests")
@dataclass(frozen=True)
class Near(Pattern):
    """A user's dataclass with parameters of its own."""

    reach: int
    sides: tuple = (1, 1)

    def __call__(self, q_pos, k_pos):
        left, right = self.sides
        distance = k_pos - q_pos
        return (distance >= -left * self.reach) & (distance <= right * self.reach)


LEAVES = [
    Full(),
    Causal(),
    Local(0),
    Local(3),
    Local((4, 1)),
    Local((None, 2)),
    Local((2, None)),
    Atrous(1),
    Atrous(3),
    Atrous(64),
    Strided(1),
    Strided(4),
    Dilated(2, 3),
    Blocks(1),
    Blocks(5),
    Prefix(0),
    Prefix(4),
    Band(-2, 5),
    Blocks(3, reach=1),
    Fixed(4),
    Fixed(3, 2),
    Global(0),
    Global(2),
    Global((0, 3, 4, 5, 11)),
    Random(300, 4, 2, seed=1),
    Random(300, 3, 2, skip=Local(1)),
    Random(300, 5, 0),
    Grid((3, 2), (Band(1, 0), Band(), Band(0, 1))),
    Neighborhood((300,), 2),
    Neighborhood((60, 5), 1),
    Neighborhood((50, 6), (1, 2), (2, 1)),
    Neighborhood((30, 3, 4), 1),
    Axial((60, 5)),
    Axial((30, 3, 4)),
    Longformer(2, 1),
    Longformer((3, 0), (0, 6)),
    BigBird(300, 4, 2),
    BigBird(257, 3, 1, seed=3),
    StreamingLLM(3, 2),
    PrefixLM(4),
    SparseTransformer(4),
    SparseTransformer(4, "fixed", 2),
    Diagonals(),
    Near(2),
]

EXPRESSIONS = [
    Causal() & Local(3),
    Causal() & Strided(4),
    Causal() & (Local(3) | Prefix(2)),
    Causal() | Prefix(4),
    Atrous(4) & Local(10),
    Atrous(4) & Atrous(6),
    Local(2) | Local(5),
    Local(2) | Causal(),
    ~Causal(),
    ~Local(2),
    ~(Local(2) | Atrous(3)),
    ~(Causal() & Atrous(2)),
    Blocks(4) & Causal(),
    Blocks(4) | Blocks(6),
    Blocks(6) & Atrous(2),
    Prefix(3) & Local(6),
    Atrous(2) | Atrous(3) | Atrous(5) | Blocks(7) | Prefix(1),
    Causal() & ~Causal(),
    Causal() & Fixed(4),
    Causal() & Global((1, 5)) & Local(6),
    Causal() & Neighborhood((60, 5), 2),
    Neighborhood((60, 5), 2) & Axial((60, 5)),
    ~Global(2) & Local(4),
    Random(300, 4, 2) | Local(3) | Global(1),
    ~Random(300, 4, 2) & Blocks(8),
    Random(300, 2, 3) & Causal(),
    Blocks(3, reach=2) & Blocks(3),
    Blocks(4) & Neighborhood((75, 4), 1),
    Fixed(6, 2) & ~Blocks(6),
    Diagonals() & Local(4),
    (Diagonals() | Near(1)) & ~Prefix(1),
]


EACH_CLASS = {  # every pattern class of the package, and some joined, for 64 positions
    "bands": [Full(), Causal(), Local(3), Atrous(3), Strided(4), Dilated(2, 3), Band(-2, 5)],
    "chosen": [Fixed(4), Prefix(2), Global((1, 5)), Longformer(2, (0, 9)), StreamingLLM(3, 2)],
    "blocks": [Blocks(4), PrefixLM(4), SparseTransformer(4), Random(64, 4, 2), BigBird(64, 4, 1)],
    "grids": [Neighborhood((16, 4), 1), Axial((16, 4)), Grid((3,), (Band(1, 0), Band()))],
    "combined": [
        Causal() & Neighborhood((4, 4, 4), 2),
        Random(64, 4, 2) | Local(3) | Global(1),
        ~Random(64, 4, 2) & Blocks(8),
        Causal() & (Axial((8, 8)) | BigBird(64, 4, 1)),
    ],
}


def examples(count):
    """As many random examples of a test; fewer on JAX, which compiles for each shape."""
    count = count // 8 if keras.backend.backend() == "jax" else count
    return settings(max_examples=count, deadline=None)


def longest(pattern):
    """The longest of some lengths that the pattern has a meaning for."""
    for n in (4096, 300, 257):
        try:
            pattern.check_lengths(n, n)
        except ValueError:
            continue
        return n
    raise ValueError(pattern)


def _leaves():
    small = st.integers(0, 6)
    rate = st.integers(1, 6)
    side = st.one_of(st.none(), small)
    signed = st.one_of(st.none(), st.integers(-6, 6))
    return st.one_of(
        st.just(Full()),
        st.just(Causal()),
        st.just(Diagonals()),
        st.builds(Local, small),
        st.builds(Local, st.tuples(side, side)),
        st.builds(Atrous, rate),
        st.builds(Strided, rate),
        st.builds(Dilated, small, rate),
        st.builds(Blocks, rate),
        st.builds(Prefix, small),
        st.builds(Band, signed, signed, rate),
        st.builds(Blocks, rate, st.integers(0, 2)),
        st.integers(1, 6).flatmap(lambda s: st.builds(Fixed, st.just(s), st.integers(1, s))),
        st.builds(Global, st.one_of(small, st.lists(st.integers(0, 70), max_size=4).map(tuple))),
        st.builds(Random, st.just(70), rate, small, small),
        st.builds(Random, st.just(70), rate, small, small, st.builds(Local, small)),
        st.builds(Neighborhood, st.tuples(st.just(70), rate), small, rate),
        st.builds(Neighborhood, st.tuples(st.just(70), rate, rate), small, rate),
        st.builds(Axial, st.tuples(st.just(70), rate)),
        st.builds(Longformer, small, small),
        st.builds(BigBird, st.just(70), rate, small, small),
        st.builds(Near, small),
    )


def _join(inner):
    return st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    )


expressions = st.recursive(_leaves(), _join, max_leaves=6)
lengths = st.sampled_from([1, 2, 3, 5, 7, 8, 12, 13, 29, 67])
