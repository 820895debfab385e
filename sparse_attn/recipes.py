"""Named patterns of papers, made of the others."""

import abc

from sparse_attn.checks import check_int, received
from sparse_attn.patterns import (
    Blocks,
    Causal,
    Fixed,
    Global,
    Local,
    Pattern,
    Prefix,
    Random,
    Strided,
    leaf,
    set_fields,
)


class Recipe(Pattern):
    """A pattern that is a name for another one, its `pattern`."""

    @property
    @abc.abstractmethod
    def pattern(self):
        """The `Pattern` that it stands for."""

    @property
    def max_length(self):
        return self.pattern.max_length

    @property
    def grid_shapes(self):
        return self.pattern.grid_shapes

    def rows_apart(self, n):
        return self.pattern.rows_apart(n)

    def __call__(self, q_pos, k_pos):
        return self.pattern(q_pos, k_pos)


@leaf
class Longformer(Recipe):
    """A window and a few global positions: `Local(window) | Global(global_positions)`.

    Args:
        window: as in `Local`, the neighbours on each side. The
            `attention_window=w` of other implementations is `w // 2` here.
        global_positions: as in `Global`, how many at the start, or which.

    References:
        - [Longformer, Beltagy et al., 2020](https://arxiv.org/abs/2004.05150)
    """

    window: int | tuple[int | None, int | None]
    global_positions: int | tuple[int, ...] = 1

    def __post_init__(self):
        try:
            positions = Global(self.global_positions).positions
        except (TypeError, ValueError) as error:
            told = str(error).replace("`positions`", "`global_positions`")
            raise type(error)(told.replace(" positions=", " global_positions=")) from None
        set_fields(self, window=Local(self.window).window, global_positions=positions)

    @property
    def pattern(self):
        return Local(self.window) | Global(self.global_positions)


@leaf
class BigBird(Recipe):
    """Neighbouring blocks, the first and the last block for all, and random blocks.

    `Blocks(block_size, reach=1) | Global(the first and the last block) |
    Random(length, block_size, num_random_blocks, seed, skip=the others)`.
    A block of queries sees itself, the block on each side of it, the first
    block, the last one, and `num_random_blocks` others that are drawn for it.
    The first and the last block see everything.

    Args:
        length: a positive int, that of the sequence.
        block_size: a positive int.
        num_random_blocks: a non-negative int.
        seed: an int in [0, 2**32), of the draw.

    References:
        - [BigBird, Zaheer et al., 2020](https://arxiv.org/abs/2007.14062)
    """

    length: int
    block_size: int = 64
    num_random_blocks: int = 3
    seed: int = 0

    def __post_init__(self):
        num_blocks = check_int("num_random_blocks", self.num_random_blocks, minimum=0)
        drawn = Random(self.length, self.block_size, num_blocks, self.seed)
        set_fields(
            self,
            length=drawn.length,
            block_size=drawn.block_size,
            num_random_blocks=drawn.num_blocks,
            seed=drawn.seed,
        )

    @property
    def drawn(self):
        """The random blocks, a `Random`."""
        skip = Local(1) | Global((0, (self.length - 1) // self.block_size))
        return Random(self.length, self.block_size, self.num_random_blocks, self.seed, skip)

    @property
    def pattern(self):
        size, last = self.block_size, (self.length - 1) // self.block_size
        ends = Global((*range(size), *range(last * size, self.length)))
        return Blocks(size, reach=1) | ends | self.drawn


@leaf
class StreamingLLM(Recipe):
    """A causal window and attention sinks: `Causal() & (Local(window) | Prefix(sinks))`.

    Args:
        window: a non-negative int, how many keys before its own a query sees.
        sinks: a non-negative int, how many of the first keys all see.

    References:
        - [StreamingLLM, Xiao et al., 2023](https://arxiv.org/abs/2309.17453)
    """

    window: int
    sinks: int = 4

    def __post_init__(self):
        set_fields(
            self,
            window=check_int("window", self.window, minimum=0),
            sinks=check_int("sinks", self.sinks, minimum=0),
        )

    @property
    def pattern(self):
        return Causal() & (Local(self.window) | Prefix(self.sinks))


@leaf
class PrefixLM(Recipe):
    """A language model with a prefix that all see: `Causal() | Prefix(prefix)`.

    Args:
        prefix: a non-negative int, its length.

    References:
        - [T5, Raffel et al., 2019](https://arxiv.org/abs/1910.10683)
    """

    prefix: int

    def __post_init__(self):
        set_fields(self, prefix=check_int("prefix", self.prefix, minimum=0))

    @property
    def pattern(self):
        return Causal() | Prefix(self.prefix)


@leaf
class SparseTransformer(Recipe):
    """`Causal() & Strided(stride)`, or `Causal() & Fixed(stride, summary)`.

    Args:
        stride: a positive int.
        kind: "strided", for what has a period, such as the rows of an image; or
            "fixed", for what has none, such as text.
        summary: a positive int, for the fixed kind: how many keys at the end of
            a block all later queries see.

    References:
        - [Sparse Transformers, Child et al., 2019](https://arxiv.org/abs/1904.10509)
    """

    stride: int
    kind: str = "strided"
    summary: int = 1

    def __post_init__(self):
        if not isinstance(self.kind, str):
            raise TypeError(received("kind", '"strided" or "fixed"', self.kind))
        if self.kind not in ("strided", "fixed"):
            raise ValueError(received("kind", '"strided" or "fixed"', self.kind))
        fixed = Fixed(self.stride, self.summary)
        if self.kind == "strided" and fixed.summary != 1:
            raise ValueError(received("summary", 'left out unless kind="fixed"', self.summary))
        set_fields(self, stride=fixed.stride, summary=fixed.summary)

    @property
    def pattern(self):
        if self.kind == "strided":
            return Causal() & Strided(self.stride)
        return Causal() & Fixed(self.stride, self.summary)
