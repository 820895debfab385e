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
import operator

import numpy as np

from sparse_attn import pictures
from sparse_attn.checks import check_int, received


class _Frozen(abc.ABCMeta):
    """Makes the instances of a class, and of plain subclasses too, unchangeable once made."""

    def __call__(cls, *args, **kwargs):
        pattern = super().__call__(*args, **kwargs)
        object.__setattr__(pattern, "_made", True)
        return pattern


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

    def check_lengths(self, n, m):
        """Raise `ValueError` if `n` queries and `m` keys cannot be related.

        Any lengths will do for most patterns. A pattern made for one length,
        such as a table, overrides this; combinations ask all their parts.

        Args:
            n: number of queries, or `None` while it is unknown.
            m: number of keys, or `None` while it is unknown.
        """
        del n, m

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

    def text(self, n, m=None, width=64):
        """The pattern as lines of text: queries down, keys across.

        A character stands for a cell of pairs: blank where none may attend,
        `░ ▒ ▓ █` for up to a quarter, a half, three quarters and all of them.

        Args:
            n: number of queries.
            m: number of keys, `n` by default.
            width: characters across, at most; half as many lines.

        Returns:
            A str of lines.

        Example:

        >>> from sparse_attn import Causal
        >>> print(Causal().text(4, width=8))
        █
        ██
        ███
        ████
        """
        n, m = self._lengths(n, m)
        return pictures.text(self._answer, n, m, check_int("width", width, minimum=2))

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
        return pictures.svg(self._answer, n, m, cells, title=repr(self))

    def _repr_svg_(self):
        """How a notebook shows a pattern: at 64 positions, or by name if it has none there."""
        try:
            return self.svg(64)
        except ValueError:
            return None

    def _answer(self, q_pos, k_pos):
        """The predicate at `(n,)` by `(m,)` positions, checked: an `(n, m)` bool array."""
        answer = np.asarray(self(q_pos[:, None], k_pos[None, :]))
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
        return And(self, other)

    def __rand__(self, other):
        return And(other, self)

    def __or__(self, other):
        return Or(self, other)

    def __ror__(self, other):
        return Or(other, self)

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


def _wrap(pattern, *kinds):
    """The operand's code, in brackets where Python would read it otherwise."""
    return f"({pattern!r})" if isinstance(pattern, kinds) else repr(pattern)


def _leaf(cls):
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


def _set(pattern, **values):
    """Set checked fields of a frozen pattern, while it is being made."""
    for name, value in values.items():
        object.__setattr__(pattern, name, value)


@_leaf
class Full(Pattern):
    """Every query may attend to every key."""

    def __call__(self, q_pos, k_pos):
        return q_pos == q_pos


@_leaf
class Causal(Pattern):
    """No look ahead: `k_pos <= q_pos`."""

    def __call__(self, q_pos, k_pos):
        return k_pos <= q_pos


@_leaf
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
        _set(self, window=window[0] if equal_sides else window)

    @property
    def sides(self):
        """The window as a pair `(left, right)`; `None` is unlimited."""
        return self.window if isinstance(self.window, tuple) else (self.window, self.window)

    def __call__(self, q_pos, k_pos):
        left, right = self.sides
        return Band(left, right)(q_pos, k_pos)


@_leaf
class Atrous(Pattern):
    """A comb, as in atrous convolution: `(q_pos - k_pos) % rate == 0`.

    Args:
        rate: a positive int, the distance between the teeth.
    """

    rate: int

    def __post_init__(self):
        _set(self, rate=check_int("rate", self.rate, minimum=1))

    def __call__(self, q_pos, k_pos):
        return (q_pos - k_pos) % self.rate == 0


@_leaf
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
        _set(self, stride=check_int("stride", self.stride, minimum=1))

    def __call__(self, q_pos, k_pos):
        return Local(self.stride)(q_pos, k_pos) | Atrous(self.stride)(q_pos, k_pos)


@_leaf
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
        _set(
            self,
            window=check_int("window", self.window, minimum=0),
            rate=check_int("rate", self.rate, minimum=1),
        )

    def __call__(self, q_pos, k_pos):
        reach = self.window * self.rate
        return Local(reach)(q_pos, k_pos) & Atrous(self.rate)(q_pos, k_pos)


@_leaf
class Blocks(Pattern):
    """Blocks along the diagonal: `q_pos // size == k_pos // size`.

    Args:
        size: a positive int, the length of a block.
    """

    size: int

    def __post_init__(self):
        _set(self, size=check_int("size", self.size, minimum=1))

    def __call__(self, q_pos, k_pos):
        return q_pos // self.size == k_pos // self.size


@_leaf
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
        _set(self, length=check_int("length", self.length, minimum=0))

    def __call__(self, q_pos, k_pos):
        return k_pos < self.length


@_leaf
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
                _set(self, **{name: check_int(name, getattr(self, name))})
        _set(self, rate=check_int("rate", self.rate, minimum=1))

    def __call__(self, q_pos, k_pos):
        distance = k_pos - q_pos
        tests = []
        if self.left is not None:
            tests.append(distance >= -self.left)
        if self.right is not None:
            tests.append(distance <= self.right)
        if self.rate > 1:
            tests.append(distance % self.rate == 0)
        return functools.reduce(operator.and_, tests or [distance == distance])


@_leaf
class And(Pattern):
    """Pairs that both patterns allow: `first & second`."""

    first: Pattern
    second: Pattern

    def __post_init__(self):
        _check_operands("&", self.first, self.second)

    def __call__(self, q_pos, k_pos):
        return self.first(q_pos, k_pos) & self.second(q_pos, k_pos)

    def check_lengths(self, n, m):
        self.first.check_lengths(n, m)
        self.second.check_lengths(n, m)

    def __repr__(self):
        return f"{_wrap(self.first, Or)} & {_wrap(self.second, Or, And)}"


@_leaf
class Or(Pattern):
    """Pairs that one of two patterns allows, or both: `first | second`."""

    first: Pattern
    second: Pattern

    def __post_init__(self):
        _check_operands("|", self.first, self.second)

    def __call__(self, q_pos, k_pos):
        return self.first(q_pos, k_pos) | self.second(q_pos, k_pos)

    def check_lengths(self, n, m):
        self.first.check_lengths(n, m)
        self.second.check_lengths(n, m)

    def __repr__(self):
        return f"{self.first!r} | {_wrap(self.second, Or)}"


@_leaf
class Not(Pattern):
    """Pairs that a pattern does not allow: `~pattern`."""

    pattern: Pattern

    def __post_init__(self):
        _check_operands("~", self.pattern)

    def __call__(self, q_pos, k_pos):
        return self.pattern(q_pos, k_pos) ^ True  # `~` of a Python bool would be -1 or -2

    def check_lengths(self, n, m):
        self.pattern.check_lengths(n, m)

    def __repr__(self):
        return f"~{_wrap(self.pattern, And, Or)}"

    def __invert__(self):
        return self.pattern
