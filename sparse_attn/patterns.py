"""Patterns: which pairs of positions may attend to one another.

A pattern is a small frozen object, called with positions:
`pattern(q_pos, k_pos)` is True where the query at `q_pos` may attend to the
key at `k_pos`. It knows no length and no framework: predicates are written
with operators only, so that one line serves numpy arrays and the tensors of
every backend. Patterns combine with `|`, `&` and `~`.

>>> from sparse_attn import Causal, Local
>>> pattern = Causal() & Local(2)
>>> pattern.mask(4).astype(int)
array([[1, 0, 0, 0],
       [1, 1, 0, 0],
       [1, 1, 1, 0],
       [0, 1, 1, 1]])
"""

import abc
import dataclasses
import functools
import inspect
import math
import operator

import numpy as np

from sparse_attn import pictures
from sparse_attn.checks import check_int, received, within_int32


class _Frozen(abc.ABCMeta):
    """Makes the instances of a class, and of plain subclasses too, unchangeable once made."""

    def __call__(cls, *args, **kwargs):
        pattern = super().__call__(*args, **kwargs)
        object.__setattr__(pattern, "_made", True)
        return pattern

    @property
    def __signature__(cls):
        """What `help` shows: the arguments of `__init__`, not those of `__call__` above."""
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Pattern(metaclass=_Frozen):
    """The base of every pattern. A subclass need only define `__call__`.

    Give a subclass with parameters its fields by `@dataclass(frozen=True)`;
    equality, hash, `repr`, `get_config` and `from_config` follow from them.

    Example:

    >>> from dataclasses import dataclass
    >>> from sparse_attn import Causal, Pattern
    >>> @dataclass(frozen=True)
    ... class SameParity(Pattern):
    ...     def __call__(self, q_pos, k_pos):
    ...         return (q_pos - k_pos) % 2 == 0
    >>> (SameParity() & Causal()).mask(3).astype(int)
    array([[1, 0, 0],
           [0, 1, 0],
           [1, 0, 1]])
    """

    @abc.abstractmethod
    def __call__(self, q_pos, k_pos):
        """Tell which pairs may attend.

        Args:
            q_pos: int positions of queries, numpy array or backend tensor.
            k_pos: int positions of keys, of a shape that broadcasts with it.

        Returns:
            A bool array or tensor of a shape that broadcasts with
            `q_pos - k_pos`; True = may be attended.
        """

    @property
    def max_length(self):
        """The pattern has no meaning at positions from here on; `None` if it has everywhere.

        A pattern made for one length, such as a table, overrides this. Where a
        length is not known before, it is looked at once it is there.
        """
        return None

    @property
    def grid_shapes(self):
        """A tuple with the shapes of the grids that positions are read from, row by row.

        An input of a layer with several axes of positions, such as an image,
        must have these axes; the first may be shorter, and is `None` where it may
        be any. None for most patterns; combinations tell those of all their parts.
        """
        return ()

    def check_lengths(self, n, m):
        """Raise `ValueError` if `n` queries and `m` keys cannot be related.

        Any lengths up to `max_length` will do for most patterns. A pattern with
        another rule overrides this; combinations ask all their parts.

        Args:
            n: number of queries, or `None` while it is unknown.
            m: number of keys, or `None` while it is unknown.
        """
        limit = self.max_length
        if limit is not None and any(size is not None and size > limit for size in (n, m)):
            raise ValueError(f"{self!r} is made for lengths up to {limit}. Received: n={n}, m={m}")

    def rows_apart(self, n):
        """Queries, of `n`, whose keys may be quite other ones than their neighbours': ints.

        Pictures of long patterns, in which a few queries stand for many, look at
        each of these.
        """
        return np.zeros(0, int)

    def mask(self, n, m=None):
        """The pattern as an `(n, m)` boolean numpy array, to look at.

        Args:
            n: number of queries.
            m: number of keys, `n` by default.

        Returns:
            A bool array of shape `(n, m)`; True = may be attended.

        Raises:
            TypeError, ValueError: if a length is no positive int, if the
                pattern cannot relate these lengths, or if it does not
                answer with bools of a shape that broadcasts to `(n, m)`.
        """
        n, m = self._lengths(n, m)
        return self._answer(np.arange(n), np.arange(m)).copy()

    def text(self, n, m=None, width=64, shades=pictures.SHADES):
        """The pattern as lines of text: queries down, keys across.

        A character stands for a cell of pairs: blank where none may attend,
        `░ ▒ ▓ █` for up to a quarter, a half, three quarters and all of them.

        Args:
            n: number of queries.
            m: number of keys, `n` by default.
            width: characters across, at most; half as many lines.
            shades: a str of at least two characters, from the one of a cell
                without pairs to the one of a full cell. `" .:+#"` is for
                terminals that know ASCII only.

        Returns:
            A str of lines.

        Raises:
            TypeError, ValueError: for arguments of another kind, and as `mask`.

        Example:

        >>> from sparse_attn import Causal
        >>> print(Causal().text(4, width=8))
        █
        ██
        ███
        ████
        """
        n, m = self._lengths(n, m)
        width = check_int("width", width, minimum=2)
        check_shades(shades)
        return pictures.text(self._answer, n, m, width, self.rows_apart(n), shades)

    def svg(self, n, m=None, cells=64):
        """The pattern as a picture: queries down, keys across, darker for more pairs.

        Args:
            n: number of queries.
            m: number of keys, `n` by default.
            cells: squares along each axis, at most.

        Returns:
            A str, an SVG document.
        """
        n, m = self._lengths(n, m)
        cells = check_int("cells", cells, minimum=1)
        return pictures.svg(self._answer, n, m, cells, repr(self), self.rows_apart(n))

    def plot(self, n, m=None, *, weights=None, ax=None):
        """A plot of the pattern, its plan and its tiles, or of attention weights over it.

        Queries go down and keys across. Each part of the plan has a colour,
        deeper where more pairs are allowed; what its tiles hold is outlined,
        where they are few and hold neighbours. Keys ahead of their query lie on
        grey.

        Args:
            n: number of queries.
            m: number of keys, `n` by default.
            weights: `(n, m)` or `(heads, n, m)` attention weights, such as a
                layer's `return_attention_scores` gives for one row of the batch.
                Their mean over the heads is drawn instead of the plan, where
                the pattern allows a pair.
            ax: matplotlib axes to draw on, one for each distinct pattern of a
                `PerHead`; those of a new figure by default.

        Returns:
            The matplotlib `Axes`; an array of them for a `PerHead`.

        Raises:
            ImportError: if matplotlib, of the extra `[plot]`, is not installed.
            TypeError, ValueError: as `mask`, and if `weights` has another shape.
        """
        from sparse_attn.plots import plot

        return plot(self, n, m, weights, ax)

    def cost(self, n, num_heads=1, head_dim=64, dtype="float32", batch=1):
        """What `sparse_attention` costs with this pattern, beside dense attention.

        Pairs and operations are counted. Bytes are estimated, for TensorFlow
        on a CPU with known lengths and the default `max_score_bytes`: the most
        that its allocator has given out at any time, query, key and value
        among it. Nearly all are right within a quarter. A process takes more:
        what the allocator keeps for later.

        Args:
            n: number of queries and of keys, a positive int.
            num_heads: a positive int.
            head_dim: features of a query, a key and a value in each head, a
                positive int.
            dtype: "float64", "float32", "bfloat16" or "float16".
            batch: a positive int.

        Returns:
            A `Cost`; printed, it is a table.

        Raises:
            TypeError, ValueError: for arguments of another kind, and for a
                length that the pattern cannot relate.

        Example:

        >>> from sparse_attn import Causal, Local
        >>> cost = (Causal() & Local(256)).cost(4096, num_heads=8)
        >>> cost.pairs, cost.scored_pairs, cost.dense.pairs
        (1019776, 1572864, 16777216)
        >>> cost.beats_dense_from
        256
        """
        from sparse_attn.costs import cost

        return cost(self, n, num_heads, head_dim, dtype, batch)

    def receptive_field(self, layers, n):
        """How far positions reach through some layers that all have this pattern.

        A layer adds to what it gets, so that what is reached stays so. Where
        heads have patterns of their own, a position reaches what any of them
        lets it see.

        Args:
            layers: a non-negative int.
            n: number of positions.

        Returns:
            A `ReceptiveField`: how many positions each one reaches through
            `layers` layers, and how many layers it takes until every position
            reaches every other.

        Raises:
            TypeError, ValueError: for arguments of another kind, and for a
                length that the pattern cannot relate.

        Example:

        >>> from sparse_attn import Local
        >>> field = Local(64).receptive_field(2, 4096)
        >>> int(field.reached.max()), field.layers_to_all
        (257, 64)
        """
        from sparse_attn.costs import receptive_field

        return receptive_field(self, layers, n)

    def _repr_svg_(self):
        """How a notebook shows a pattern: at a telling length, or by name if it has none."""
        try:
            return self.svg(self._telling_length())
        except ValueError:
            return None

    def _telling_length(self):
        """The shortest of some lengths at which a pattern allows something and leaves much out."""
        longest = 4096 if self.max_length is None else min(4096, self.max_length)
        lengths = [2**i for i in range(6, 13) if 2**i < longest] + [longest]
        shares = {}
        for n in lengths:
            try:
                self.check_lengths(n, n)
                q_pos = np.linspace(0, n - 1, min(n, 64)).astype(int)
                shares[n] = self._answer(q_pos, np.arange(n)).mean()
            except ValueError:  # it has another rule for lengths
                continue
            if 0 < shares[n] < 0.6:
                return n
        some = [n for n, share in shares.items() if share > 0]
        return (some or lengths)[0]

    def _answer(self, q_pos, k_pos):
        """The predicate at `(n,)` by `(m,)` positions, checked: an `(n, m)` bool array."""
        answer = np.asarray(ask(self, q_pos[:, None], k_pos[None, :]))
        shape = (len(q_pos), len(k_pos))
        if answer.dtype != bool:
            raise TypeError(f"{self!r} must answer with bools. Received: dtype={answer.dtype}")
        try:
            return np.broadcast_to(answer, shape)
        except ValueError:
            raise ValueError(
                f"{self!r} must answer with a shape that broadcasts to {shape}. "
                f"Received: shape={answer.shape}"
            ) from None

    def _lengths(self, n, m):
        n = check_int("n", n, minimum=1)
        m = n if m is None else check_int("m", m, minimum=1)
        self.check_lengths(n, m)
        return n, m

    def get_config(self):
        """The fields by name, as JSON types; inner patterns serialized by Keras."""
        from keras.saving import serialize_keras_object  # a pattern meets Keras only to be saved

        return {name: serialize_keras_object(value) for name, value in self._fields()}

    @classmethod
    def from_config(cls, config):
        """The pattern that `get_config` described."""
        from keras.saving import deserialize_keras_object

        return cls(**{k: _tuples(deserialize_keras_object(v)) for k, v in config.items()})

    def _fields(self):
        """What makes the value: dataclass fields, or the attributes of a plain subclass."""
        if dataclasses.is_dataclass(self):
            return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        slots = [name for kind in type(self).__mro__ for name in getattr(kind, "__slots__", ())]
        attributes = {**vars(self), **{name: getattr(self, name) for name in slots}}
        return [(name, value) for name, value in attributes.items() if name != "_made"]

    def __setattr__(self, name, value):
        if "_made" in vars(self):
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)

    def __eq__(self, other):
        if type(self) is not type(other):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self):
        return hash((type(self), *self._fields()))

    def __repr__(self):
        arguments = [f"{name}={value!r}" for name, value in self._fields()]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def __and__(self, other):
        return _join(And, self, other)

    def __rand__(self, other):
        return _join(And, other, self)

    def __or__(self, other):
        return _join(Or, self, other)

    def __ror__(self, other):
        return _join(Or, other, self)

    def __invert__(self):
        return Not(self)

    def __bool__(self):
        raise TypeError(
            f"A pattern has no truth value: join patterns by `&`, `|` and `~`, "
            f"not by `and`, `or` and `not`. Received: {self!r}"
        )


def _window(name, value):
    """Read `window`: an int, or a pair of ints and Nones; returns an int or a pair."""
    requirement = "a non-negative int or a pair (left, right) of them, None = unlimited"
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(received(name, requirement, value))
    try:
        if isinstance(value, (tuple, list)):
            return tuple(None if side is None else check_int(name, side, 0) for side in pair)
        return check_int(name, value, 0)
    except TypeError:
        raise TypeError(received(name, requirement, value)) from None
    except ValueError:
        raise ValueError(received(name, requirement, value)) from None


def _sizes(name, value):
    """Read sizes of axes: a tuple of positive ints."""
    requirement = "a tuple of positive ints"
    if not isinstance(value, (tuple, list)):
        raise TypeError(received(name, requirement, value))
    try:
        return tuple(check_int(name, size, 1) for size in value)
    except (TypeError, ValueError) as error:
        raise type(error)(received(name, requirement, value)) from None


def _for_each_axis(name, value, axes, minimum):
    """Read an int, or a tuple of one for each axis; equal ones are one int."""
    if not isinstance(value, (tuple, list)):
        return check_int(name, value, minimum)
    kind = {0: "non-negative", 1: "positive"}[minimum]
    requirement = f"a {kind} int or a tuple of {axes} of them"
    if len(value) != axes:
        raise ValueError(received(name, requirement, value))
    try:
        values = tuple(check_int(name, x, minimum) for x in value)
    except (TypeError, ValueError) as error:
        raise type(error)(received(name, requirement, value)) from None
    return values[0] if len(set(values)) == 1 else values


@dataclasses.dataclass(frozen=True, repr=False)
class Ranges:
    """Some positions: those in one of some ranges.

    Args:
        ranges: a tuple of pairs `(start, stop)`, sorted, apart and not empty.
        period: an int, if the ranges come again and again so far apart, or `None`.
    """

    ranges: tuple[tuple[int, int], ...]
    period: int | None = None

    @classmethod
    def of(cls, positions):
        """Sorted ints as ranges."""
        positions = np.asarray(positions, "int64")
        cuts = np.flatnonzero(np.diff(positions) > 1) + 1
        runs = np.split(positions, cuts) if len(positions) else []
        return cls(tuple((int(run[0]), int(run[-1]) + 1) for run in runs))

    @classmethod
    def of_blocks(cls, numbers, size, length):
        """The positions of blocks, whose numbers are sorted."""
        ranges = cls.of(numbers).ranges
        return cls(tuple((a * size, min(b * size, length)) for a, b in ranges))

    def __repr__(self):
        ranges = " ".join(f"{a}:{b}" for a, b in self.ranges[:4])
        more = " ..." if len(self.ranges) > 4 else ""
        return f"[{ranges}{more}{'' if self.period is None else f' of {self.period}'}]"

    def count(self, stop):
        """How many of them lie in `[0, stop)`; ints or arrays of ints."""
        whole, rest = (0, stop) if self.period is None else np.divmod(stop, self.period)
        total = sum(b - a for a, b in self.ranges)
        return whole * total + sum(np.clip(rest - a, 0, b - a) for a, b in self.ranges)

    def positions(self, stop):
        """All of them in `[0, stop)`, sorted: an int32 array."""
        period = stop if self.period is None else self.period
        base = np.concatenate([np.arange(a, b, dtype="int32") for a, b in self.ranges])
        starts = np.arange(0, stop, max(period, 1), dtype="int32")
        found = (starts[:, None] + base).reshape(-1)
        return found[found < stop]

    def __call__(self, positions):
        x = positions if self.period is None else positions % within_int32(self.period)
        edges = [(within_int32(a), within_int32(b)) for a, b in self.ranges]
        tests = [(x >= a) & (x < b) if b - a != 1 else x == a for a, b in edges]
        return functools.reduce(operator.or_, tests, x != x)


def check_shades(shades):
    """Raise `TypeError` or `ValueError` unless `shades` are characters to draw with."""
    requirement = "a str of at least 2 printable characters"
    if not isinstance(shades, str):
        raise TypeError(received("shades", requirement, shades))
    if len(shades) < 2 or not shades.isprintable():
        raise ValueError(received("shades", requirement, shades))


def ask(pattern, q_pos, k_pos):
    """`pattern(q_pos, k_pos)`; an error of a predicate that cannot be traced names the pattern.

    Raises:
        TypeError, ValueError: from the framework's error.
    """
    try:
        return pattern(q_pos, k_pos)
    except (ArithmeticError, AttributeError, IndexError, NotImplementedError) as error:
        raise TypeError(_no_predicate(pattern, error)) from error
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "oolean value" not in str(error):
            raise  # memory, a device
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(_no_predicate(pattern, error)) from error


def _no_predicate(pattern, error):
    return (
        f"{pattern!r} could not be evaluated on positions that are arrays or tensors. A predicate "
        "may use operators (+ - * // % == != < <= & | ~), `keras.ops` and `look_up`; no functions "
        "of numpy, and no `and`, `or`, `not`, `if` or `in`, which ask for values that a tensor "
        f"does not have while it is traced. The error was: {type(error).__name__}: {error}"
    )


def check_pattern(name, value):
    """Return `value` if it is a pattern that a plan can be kept for, or raise `TypeError`."""
    if not isinstance(value, Pattern):
        raise TypeError(received(name, "a Pattern, such as Local(64)", value))
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            received(name, "hashable: a frozen dataclass without arrays or lists", value)
        ) from None
    return value


def _tuples(value):
    """JSON knows lists only; a frozen pattern holds tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _check_operands(symbol, *operands):
    for operand in operands:
        if not isinstance(operand, Pattern):
            raise TypeError(f"`{symbol}` joins patterns, such as Local(64). Received: {operand!r}")
        if isinstance(operand, PerHead):
            raise TypeError(
                f"And, Or and Not take patterns of one head; write `{symbol}`, which goes into a "
                f"PerHead. Received: {operand!r}"
            )


def _check_position(name, value, minimum=0):
    """Return `value` as an int of at least `minimum` that can be a position, or raise."""
    value = check_int(name, value, minimum)
    if value >= 2**31:
        raise ValueError(received(name, "an int less than 2**31", value))
    return value


def _join(kind, first, second):
    """`kind(first, second)`; with a `PerHead`, head by head."""
    sizes = {len(x.patterns) for x in (first, second) if isinstance(x, PerHead)}
    if not sizes:
        return kind(first, second)
    if len(sizes) > 1:
        raise ValueError(f"Two PerHead must have equally many patterns. Received: {sizes}")
    (size,) = sizes
    first, second = (x.patterns if isinstance(x, PerHead) else (x,) * size for x in (first, second))
    return PerHead(tuple(_join(kind, a, b) for a, b in zip(first, second, strict=True)))


def _wrap(pattern, *kinds):
    """The operand's code, in brackets where Python would read it otherwise."""
    return f"({pattern!r})" if isinstance(pattern, kinds) else repr(pattern)


def leaf(cls):
    """A frozen dataclass whose `repr` is positional: `Local(64)`, `Band(None, 0)`."""

    def __repr__(self):
        fields = dataclasses.fields(self)
        values = [getattr(self, field.name) for field in fields]
        while values and values[-1] == fields[len(values) - 1].default:
            values.pop()
        return f"{type(self).__name__}({', '.join(map(repr, values))})"

    if "__repr__" not in vars(cls):
        cls.__repr__ = __repr__
    return dataclasses.dataclass(frozen=True, repr=False, eq=False)(cls)


def set_fields(pattern, **values):
    """Set checked fields of a frozen pattern, while it is being made."""
    for name, value in values.items():
        object.__setattr__(pattern, name, value)


@leaf
class Full(Pattern):
    """Every query may attend to every key."""

    def __call__(self, q_pos, k_pos):
        return q_pos == q_pos


@leaf
class Causal(Pattern):
    """No look ahead: `k_pos <= q_pos`."""

    def __call__(self, q_pos, k_pos):
        return k_pos <= q_pos


@leaf
class Local(Pattern):
    """A sliding window: `-left <= k_pos - q_pos <= right`.

    The window is inclusive and counts per side: `Local(1)` allows a position
    itself and one neighbour each side. This is the meaning of JAX's
    `local_window_size` and of FlashAttention's `window_size`; Keras'
    `sliding_window=w` is `Local(w - 1)`.

    Args:
        window: a non-negative int for both sides, or a pair `(left, right)`
            of them, where `None` is unlimited.

    References:
        - [Longformer, Beltagy et al., 2020](https://arxiv.org/abs/2004.05150)
    """

    window: int | tuple[int | None, int | None]

    def __post_init__(self):
        window = _window("window", self.window)
        equal_sides = isinstance(window, tuple) and window[0] == window[1] is not None
        set_fields(self, window=window[0] if equal_sides else window)

    @property
    def sides(self):
        """The window as a pair `(left, right)`; `None` is unlimited."""
        return self.window if isinstance(self.window, tuple) else (self.window, self.window)

    def __call__(self, q_pos, k_pos):
        left, right = self.sides
        return Band(left, right)(q_pos, k_pos)


@leaf
class Atrous(Pattern):
    """A comb, as in atrous convolution: `(q_pos - k_pos) % rate == 0`.

    Args:
        rate: a positive int, the distance between the teeth.
    """

    rate: int

    def __post_init__(self):
        set_fields(self, rate=check_int("rate", self.rate, minimum=1))

    def __call__(self, q_pos, k_pos):
        return (q_pos - k_pos) % within_int32(self.rate) == 0


@leaf
class Strided(Pattern):
    """Dense nearby, sparse far away: `Local(stride) | Atrous(stride)`.

    `Causal() & Strided(stride)` is the strided pattern of the Sparse
    Transformer.

    Args:
        stride: a positive int: the window on each side, and the distance
            between the teeth of the comb beyond it.

    References:
        - [Sparse Transformers, Child et al., 2019](https://arxiv.org/abs/1904.10509)
    """

    stride: int

    def __post_init__(self):
        set_fields(self, stride=check_int("stride", self.stride, minimum=1))

    def __call__(self, q_pos, k_pos):
        return Local(self.stride)(q_pos, k_pos) | Atrous(self.stride)(q_pos, k_pos)


@leaf
class Dilated(Pattern):
    """A window with gaps: `|q_pos - k_pos| <= window * rate`, a multiple of `rate`.

    Args:
        window: a non-negative int, the number of neighbours on each side.
        rate: a positive int, how far apart they lie.

    References:
        - [Longformer, Beltagy et al., 2020](https://arxiv.org/abs/2004.05150)
    """

    window: int
    rate: int

    def __post_init__(self):
        set_fields(
            self,
            window=check_int("window", self.window, minimum=0),
            rate=check_int("rate", self.rate, minimum=1),
        )

    def __call__(self, q_pos, k_pos):
        reach = self.window * self.rate
        return Local(reach)(q_pos, k_pos) & Atrous(self.rate)(q_pos, k_pos)


@leaf
class Blocks(Pattern):
    """Blocks along the diagonal: `|q_pos // size - k_pos // size| <= reach`.

    Args:
        size: a positive int, the length of a block.
        reach: a non-negative int, how many blocks on each side a block sees
            beside its own; none by default.
    """

    size: int
    reach: int = 0

    def __post_init__(self):
        set_fields(
            self,
            size=check_int("size", self.size, minimum=1),
            reach=check_int("reach", self.reach, minimum=0),
        )

    @property
    def grid(self):
        """The same pairs as a `Grid`."""
        return Grid((self.size,), (Band(self.reach, self.reach), Band()))

    def __call__(self, q_pos, k_pos):
        return self.grid(q_pos, k_pos)


@leaf
class Fixed(Pattern):
    """Blocks, and the last keys of every block for all: the fixed pattern.

    `q_pos // stride == k_pos // stride`, or `k_pos % stride >= stride - summary`.
    `Causal() & Fixed(stride)` is the fixed pattern of the Sparse Transformer.

    Args:
        stride: a positive int, the length of a block.
        summary: a positive int up to `stride`: how many keys at the end of a
            block every query sees.

    References:
        - [Sparse Transformers, Child et al., 2019](https://arxiv.org/abs/1904.10509)
    """

    stride: int
    summary: int = 1

    def __post_init__(self):
        stride = check_int("stride", self.stride, minimum=1)
        summary = check_int("summary", self.summary, minimum=1)
        if summary > stride:
            raise ValueError(received("summary", f"at most the stride, {stride}", summary))
        set_fields(self, stride=stride, summary=summary)

    @property
    def ends(self):
        """The keys that every query sees, as `Ranges`."""
        return Ranges(((self.stride - self.summary, self.stride),), period=self.stride)

    def __call__(self, q_pos, k_pos):
        return Blocks(self.stride)(q_pos, k_pos) | self.ends(k_pos)


@leaf
class Global(Pattern):
    """Positions that see all and are seen by all: `q_pos` or `k_pos` is one of them.

    `Local(w) | Global(g)` is the pattern of Longformer.

    Args:
        positions: a non-negative int, the first so many; or a sequence of
            positions, non-negative ints.

    References:
        - [Longformer, Beltagy et al., 2020](https://arxiv.org/abs/2004.05150)
    """

    positions: int | tuple[int, ...]

    def __post_init__(self):
        requirement = "a non-negative int, how many, or a sequence of positions in [0, 2**31)"
        positions, value = self.positions, self.positions
        if isinstance(positions, np.ndarray):
            positions = positions.tolist()
        try:
            if isinstance(positions, (tuple, list, range, set, frozenset)):
                positions = tuple(sorted({_check_position("positions", x) for x in positions}))
            else:
                positions = check_int("positions", positions, 0)
        except TypeError:
            raise TypeError(received("positions", requirement, value)) from None
        except ValueError:
            raise ValueError(received("positions", requirement, value)) from None
        set_fields(self, positions=positions)

    @property
    def ranges(self):
        """The positions as `Ranges`."""
        if isinstance(self.positions, tuple):
            return Ranges.of(self.positions)
        return Ranges(((0, self.positions),) if self.positions else ())

    def rows_apart(self, n):
        return self.ranges.positions(n)

    def __call__(self, q_pos, k_pos):
        return self.ranges(q_pos) | self.ranges(k_pos)


@leaf
class Random(Pattern):
    """Random blocks: each block of queries sees the same number of blocks of keys.

    `k_pos // block_size` is one of the blocks drawn for `q_pos // block_size`,
    without replacement, from `RandomState(seed)`: the same in every process.

    Args:
        length: a positive int, the longest sequence; its blocks are drawn from.
        block_size: a positive int.
        num_blocks: a non-negative int, how many are drawn for each block of
            queries; all there are, if there are not as many.
        seed: an int in [0, 2**32).
        skip: a `Pattern` of block numbers: what it allows is not drawn. With
            `skip=Local(1)` a block never draws itself or its neighbours.

    References:
        - [BigBird, Zaheer et al., 2020](https://arxiv.org/abs/2007.14062)
    """

    length: int
    block_size: int = 64
    num_blocks: int = 3
    seed: int = 0
    skip: Pattern | None = None

    def __post_init__(self):
        seed = check_int("seed", self.seed, minimum=0)
        if seed >= 2**32:
            raise ValueError(received("seed", "an int in [0, 2**32)", seed))
        skip = self.skip
        if not (skip is None or (isinstance(skip, Pattern) and not isinstance(skip, PerHead))):
            raise TypeError(received("skip", "a Pattern of block numbers or None", skip))
        set_fields(
            self,
            length=_check_position("length", self.length, minimum=1),
            block_size=check_int("block_size", self.block_size, minimum=1),
            num_blocks=check_int("num_blocks", self.num_blocks, minimum=0),
            seed=seed,
        )

    @property
    def lists(self):
        """`(blocks, num_blocks)` ints, sorted: the blocks drawn; -1 where there were no more."""
        return _draw(self)

    @property
    def max_length(self):
        return self.length

    def __call__(self, q_pos, k_pos):
        size = within_int32(self.block_size)
        return listed(self.lists, q_pos // size, k_pos // size)


@functools.lru_cache(maxsize=64)
def _draw(pattern):
    blocks = -(-pattern.length // pattern.block_size)
    count = min(pattern.num_blocks, blocks)
    state = np.random.RandomState(pattern.seed)  # its numbers are the same in every numpy
    rows = np.arange(blocks)
    lists = np.full((blocks, count), -1, "int32")
    if count:
        # Some more than are wanted, of which those that are new and not skipped are taken.
        drawn = state.randint(0, blocks, (blocks, 2 * count + 8))
        taken = np.zeros(drawn.shape, bool)
        for column in range(drawn.shape[1]):
            new = (drawn[:, :column] != drawn[:, column : column + 1]).all(axis=1)
            taken[:, column] = new & ~_skips(pattern.skip, rows, drawn[:, column])
        taken &= np.cumsum(taken, axis=1) <= count
        full = taken.sum(axis=1) == count
        lists[full] = np.sort(drawn[full][taken[full]].reshape(-1, count), axis=1)
        for row in np.flatnonzero(~full):  # where few are left to draw from
            free = rows[~_skips(pattern.skip, np.full(blocks, row), rows)]
            chosen = state.permutation(free)[:count]
            lists[row, : len(chosen)] = np.sort(chosen)
    lists.flags.writeable = False
    return lists


def _skips(skip, rows, columns):
    """For each pair of blocks whether a pattern allows it."""
    if skip is None:
        return np.zeros(len(rows), bool)
    return np.broadcast_to(np.asarray(skip(rows, columns), bool), rows.shape)


def listed(table, q_block, k_block):
    """Whether the number `k_block` stands in row `q_block` of a table."""
    rows = look_up(table, q_block)
    columns = (rows[..., column] == k_block for column in range(table.shape[1]))
    return functools.reduce(operator.or_, columns, k_block != k_block)


def look_up(table, index):
    """`table[index]` for a numpy table, where the index may be a tensor of any backend.

    For the predicate of a pattern of your own.

    Args:
        table: a numpy array.
        index: ints, a numpy array or a tensor; beyond the ends of the table
            they count as its first and its last row.

    Returns:
        An array or a tensor, of shape `index.shape + table.shape[1:]`.
    """
    last = len(table) - 1
    if isinstance(index, (int, np.ndarray, np.integer)):
        return table[np.clip(index, 0, last)]
    from keras import ops

    from sparse_attn.tracing import gather

    return gather(ops.convert_to_tensor(table), ops.clip(index, 0, last), axis=0)


@leaf
class Prefix(Pattern):
    """The first keys, for every query: `k_pos < length`.

    `Causal() & (Local(w) | Prefix(4))` is a causal window with four attention
    sinks; `Causal() | Prefix(p)` is a language model with a prefix.

    Args:
        length: a non-negative int, how many keys.

    References:
        - [StreamingLLM, Xiao et al., 2023](https://arxiv.org/abs/2309.17453)
    """

    length: int

    def __post_init__(self):
        set_fields(self, length=check_int("length", self.length, minimum=0))

    def __call__(self, q_pos, k_pos):
        return k_pos < within_int32(self.length)


@leaf
class Band(Pattern):
    """The family of `Full`, `Causal`, `Local`, `Atrous` and their intersections.

    `-left <= k_pos - q_pos <= right`, and `(q_pos - k_pos) % rate == 0`.
    Unlike a `Local` window, the sides are signed: `Band(left=-1)` is
    `~Causal()`. Plans are written in bands.

    Args:
        left: how far back a query sees, an int, or `None` for unlimited.
        right: how far ahead it sees, an int, or `None` for unlimited.
        rate: a positive int, the distance between the keys it sees.
    """

    left: int | None = None
    right: int | None = None
    rate: int = 1

    def __post_init__(self):
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                set_fields(self, **{name: check_int(name, getattr(self, name))})
        set_fields(self, rate=check_int("rate", self.rate, minimum=1))

    def __call__(self, q_pos, k_pos):
        distance = k_pos - q_pos
        tests = []
        if self.left is not None:
            tests.append(distance >= within_int32(-self.left))
        if self.right is not None:
            tests.append(distance <= within_int32(self.right))
        if self.rate > 1:
            tests.append(distance % within_int32(self.rate) == 0)
        return functools.reduce(operator.and_, tests or [distance == distance])


@leaf
class Grid(Pattern):
    """A band along each axis of a grid whose points are read row by row.

    The position of the point `(x_0, x_1, ..., x_a)` is
    `((x_0 * sizes[0] + x_1) * sizes[1] + x_2) ...`: the first axis has no end.
    A pair may attend when `bands[a](q_a, k_a)` holds on every axis `a`.
    `Blocks`, `Neighborhood` and `Axial` are made of it.

    Args:
        sizes: a tuple of positive ints, the sizes of all axes but the first.
        bands: a tuple of `Band`, one for each axis.
    """

    sizes: tuple[int, ...]
    bands: tuple[Band, ...]

    def __post_init__(self):
        sizes = _sizes("sizes", self.sizes)
        bands = self.bands
        if not isinstance(bands, (tuple, list)) or not all(isinstance(x, Band) for x in bands):
            raise TypeError(received("bands", "a tuple of Band", bands))
        if len(bands) != len(sizes) + 1:
            raise ValueError(received("bands", f"{len(sizes) + 1} of Band", bands))
        set_fields(self, sizes=sizes, bands=tuple(bands))

    def __call__(self, q_pos, k_pos):
        answers = []
        for axis, band in enumerate(self.bands):
            if band != Band():
                answers.append(band(self.along(axis, q_pos), self.along(axis, k_pos)))
        return functools.reduce(operator.and_, answers or [q_pos == q_pos])

    @property
    def grid_shapes(self):
        return ((None, *self.sizes),) if self.sizes else ()

    def along(self, axis, positions):
        """The coordinates of positions along an axis."""
        behind = within_int32(math.prod(self.sizes[axis:]))
        x = positions // behind if behind > 1 else positions
        return x if axis == 0 else x % within_int32(self.sizes[axis - 1])


@leaf
class Neighborhood(Pattern):
    """Near along every axis of a grid whose points are read row by row.

    Along each axis `|q_a - k_a| <= window * dilation`, and a multiple of
    `dilation`. Edges are cut, not shifted. `Neighborhood((n,), w)` is
    `Local(w)`.

    Args:
        shape: a tuple of positive ints, the sizes of the axes; `(height, width)`
            for an image, `(frames, height, width)` for a film.
        window: a non-negative int, how many neighbours on each side, or one of
            them for each axis. NATTEN's `kernel_size=s` is `s // 2` away from
            the edges.
        dilation: a positive int, how far apart they lie, or one for each axis.

    References:
        - [Neighborhood Attention, Hassani et al., 2022](https://arxiv.org/abs/2204.07143)
    """

    shape: tuple[int, ...]
    window: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self):
        shape = _sizes("shape", self.shape)
        if not shape:
            raise ValueError(received("shape", "a tuple of positive ints", self.shape))
        window = _for_each_axis("window", self.window, len(shape), 0)
        dilation = _for_each_axis("dilation", self.dilation, len(shape), 1)
        set_fields(self, shape=shape, window=window, dilation=dilation)

    @property
    def grid(self):
        """The same pairs as a `Grid`."""
        axes = len(self.shape)
        windows, rates = (
            x if isinstance(x, tuple) else (x,) * axes for x in (self.window, self.dilation)
        )
        bands = [Band(w * r, w * r, r) for w, r in zip(windows, rates, strict=True)]
        return Grid(self.shape[1:], tuple(bands))

    @property
    def max_length(self):
        return math.prod(self.shape)

    @property
    def grid_shapes(self):
        return (self.shape,) if len(self.shape) > 1 else ()

    def __call__(self, q_pos, k_pos):
        return self.grid(q_pos, k_pos)


@leaf
class Axial(Pattern):
    """The same row or the same column of a grid whose points are read row by row.

    All coordinates but one are equal; with three axes, along each of them.
    `Axial((height, width))` is `Blocks(width) | Atrous(width)`.

    Args:
        shape: a tuple of positive ints, the sizes of the axes.

    References:
        - [Axial Attention, Ho et al., 2019](https://arxiv.org/abs/1912.12180)
    """

    shape: tuple[int, ...]

    def __post_init__(self):
        shape = _sizes("shape", self.shape)
        if len(shape) < 2:
            raise ValueError(received("shape", "a tuple of at least 2 positive ints", self.shape))
        set_fields(self, shape=shape)

    @property
    def grids(self):
        """A `Grid` for each axis: the pairs that lie along it."""
        axes = range(len(self.shape))
        return [
            Grid(self.shape[1:], tuple(Band() if a == axis else Band(0, 0) for a in axes))
            for axis in axes
        ]

    @property
    def max_length(self):
        return math.prod(self.shape)

    @property
    def grid_shapes(self):
        return (self.shape,)

    def __call__(self, q_pos, k_pos):
        return functools.reduce(operator.or_, (grid(q_pos, k_pos) for grid in self.grids))


def _shortest(*patterns):
    limits = [pattern.max_length for pattern in patterns]
    return min((limit for limit in limits if limit is not None), default=None)


@leaf
class And(Pattern):
    """Pairs that both patterns allow: `first & second`."""

    first: Pattern
    second: Pattern

    def __post_init__(self):
        _check_operands("&", self.first, self.second)

    def __call__(self, q_pos, k_pos):
        return self.first(q_pos, k_pos) & self.second(q_pos, k_pos)

    @property
    def max_length(self):
        return _shortest(self.first, self.second)

    @property
    def grid_shapes(self):
        return (*self.first.grid_shapes, *self.second.grid_shapes)

    def check_lengths(self, n, m):
        for part in (self.first, self.second):
            part.check_lengths(n, m)

    def rows_apart(self, n):
        return np.union1d(self.first.rows_apart(n), self.second.rows_apart(n))

    def __repr__(self):
        return f"{_wrap(self.first, Or)} & {_wrap(self.second, Or, And)}"


@leaf
class Or(Pattern):
    """Pairs that one of two patterns allows, or both: `first | second`."""

    first: Pattern
    second: Pattern

    def __post_init__(self):
        _check_operands("|", self.first, self.second)

    def __call__(self, q_pos, k_pos):
        return self.first(q_pos, k_pos) | self.second(q_pos, k_pos)

    @property
    def max_length(self):
        return _shortest(self.first, self.second)

    @property
    def grid_shapes(self):
        return (*self.first.grid_shapes, *self.second.grid_shapes)

    def check_lengths(self, n, m):
        for part in (self.first, self.second):
            part.check_lengths(n, m)

    def rows_apart(self, n):
        return np.union1d(self.first.rows_apart(n), self.second.rows_apart(n))

    def __repr__(self):
        return f"{self.first!r} | {_wrap(self.second, Or)}"


@leaf
class Not(Pattern):
    """Pairs that a pattern does not allow: `~pattern`."""

    pattern: Pattern

    def __post_init__(self):
        _check_operands("~", self.pattern)

    def __call__(self, q_pos, k_pos):
        # `~` of a Python bool would be -1 or -2, and `^` cannot be exported from PyTorch.
        return self.pattern(q_pos, k_pos) == (q_pos != q_pos)

    @property
    def max_length(self):
        return self.pattern.max_length

    @property
    def grid_shapes(self):
        return self.pattern.grid_shapes

    def check_lengths(self, n, m):
        self.pattern.check_lengths(n, m)

    def rows_apart(self, n):
        return self.pattern.rows_apart(n)

    def __repr__(self):
        return f"~{_wrap(self.pattern, And, Or)}"

    def __invert__(self):
        return self.pattern


@leaf
class PerHead(Pattern):
    """A pattern for each head, or for each group of heads.

    The heads are shared out evenly and in order: with 8 heads and 4 patterns,
    each pattern has two neighbouring heads. `&`, `|` and `~` go into it:
    `Causal() & PerHead(patterns)` is causal in every head.

    Args:
        patterns: a sequence of `Pattern`; not of `PerHead` in turn.

    Example:

    >>> from sparse_attn import Atrous, Local, PerHead
    >>> pattern = PerHead([Local(64)] * 4 + [Atrous(16)] * 4)
    >>> pattern.mask(100).shape
    (8, 100, 100)
    """

    patterns: tuple[Pattern, ...]

    def __post_init__(self):
        requirement = "a sequence of at least one Pattern, none of them a PerHead"
        if not isinstance(self.patterns, (tuple, list)):
            raise TypeError(received("patterns", requirement, self.patterns))
        if not self.patterns:
            raise ValueError(received("patterns", requirement, self.patterns))
        for pattern in self.patterns:
            if not isinstance(pattern, Pattern) or isinstance(pattern, PerHead):
                raise TypeError(received("patterns", requirement, self.patterns))
        set_fields(self, patterns=tuple(self.patterns))

    def groups(self, num_heads):
        """The heads of each distinct pattern: a dict of lists of numbers."""
        if num_heads % len(self.patterns):
            raise ValueError(
                f"The number of heads must be a multiple of {len(self.patterns)}, the number of "
                f"patterns of a PerHead. Received: {num_heads} heads"
            )
        share, groups = num_heads // len(self.patterns), {}
        for number, pattern in enumerate(self.patterns):
            heads = range(number * share, (number + 1) * share)
            groups.setdefault(pattern, []).extend(heads)
        return groups

    @property
    def max_length(self):
        return _shortest(*self.patterns)

    @property
    def grid_shapes(self):
        return tuple(shape for pattern in self.patterns for shape in pattern.grid_shapes)

    def check_lengths(self, n, m):
        for pattern in self.patterns:
            pattern.check_lengths(n, m)

    def _telling_length(self):
        longest = self.max_length
        found = max(pattern._telling_length() for pattern in self.patterns)
        return found if longest is None else min(found, longest)

    def mask(self, n, m=None):
        """The patterns as a `(patterns, n, m)` boolean numpy array; see `Pattern.mask`."""
        return np.stack([pattern.mask(n, m) for pattern in self.patterns])

    def text(self, n, m=None, width=64, shades=pictures.SHADES):
        """The distinct patterns, one below the other; see `Pattern.text`."""
        drawn = dict.fromkeys(self.patterns)
        return "\n\n".join(f"{each!r}\n{each.text(n, m, width, shades)}" for each in drawn)

    def svg(self, n, m=None, cells=64):
        """The distinct patterns side by side; see `Pattern.svg`."""
        drawn = [pattern.svg(n, m, cells) for pattern in dict.fromkeys(self.patterns)]
        return pictures.side_by_side(drawn)

    def cost(self, n, num_heads=None, head_dim=64, dtype="float32", batch=1):
        """See `Pattern.cost`. By default there is a head for each pattern."""
        num_heads = len(self.patterns) if num_heads is None else num_heads
        return super().cost(n, num_heads, head_dim, dtype, batch)

    def __call__(self, q_pos, k_pos):
        raise TypeError(
            "A PerHead has a predicate for each head: call one of its `patterns`. "
            f"Received: {self!r}"
        )

    def __invert__(self):
        return PerHead(tuple(~pattern for pattern in self.patterns))
