"""What may be done to scores before the softmax: a bias by position, or any function of them.

A plain function `(scores, q_pos, k_pos, head) -> scores` will do. A `ScoreMod`
does the same, and says what tensors it needs a gradient for; then its scores
need not be kept for the backward pass. A `PositionBias` only adds something
that the scores themselves do not matter for.
"""

import abc
import dataclasses
import functools

import keras
import numpy as np
from keras import ops

from sparse_attn.checks import check_int, check_positive, received, takes
from sparse_attn.masking import at_least_lowest, is_not_masked
from sparse_attn.tracing import any_of, gather


def saved(cls):
    """A frozen dataclass that Keras saves by its fields."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    cls.get_config = dataclasses.asdict
    cls.from_config = classmethod(lambda cls, config: cls(**config))
    return keras.saving.register_keras_serializable(package="sparse_attn")(cls)


class ScoreMod(abc.ABC):
    """Something that is done to each score before the softmax, wherever the score lies.

    To be saved with a layer, its class must have `get_config` and be registered with Keras.

    Attributes:
        tensors: the tensors or variables that `modify` gets besides, and that it may
            have to train; a tuple.
        by_distance: whether positions matter by `k_pos - q_pos` alone.
        defined_everywhere: whether `modify` returns finite numbers, with finite
            gradients, at every pair of positions. If not, as by default, it gets
            the positions of allowed pairs only, as far as there are any.
    """

    tensors = ()
    by_distance = False
    defined_everywhere = False

    @abc.abstractmethod
    def modify(self, scores, q_pos, k_pos, head, *tensors):
        """The new scores.

        Args:
            scores: float tensor, scaled products of queries and keys.
            q_pos: int32 positions of queries, of a shape that broadcasts with it.
            k_pos: int32 positions of keys, likewise, none negative.
            head: int32 numbers of heads, likewise.
            *tensors: `tensors`.

        Returns:
            A tensor of the shape and dtype of `scores`: finite, or `-inf` to
            forbid a pair, whatever the next `ScoreMod` makes of it.
        """


class PositionBias(ScoreMod):
    """A `ScoreMod` that adds `bias(q_pos, k_pos, head)`."""

    @abc.abstractmethod
    def bias(self, q_pos, k_pos, head, *tensors):
        """What is added: a finite float tensor that broadcasts with the scores."""

    def modify(self, scores, q_pos, k_pos, head, *tensors):
        return scores + ops.cast(self.bias(q_pos, k_pos, head, *tensors), scores.dtype)


@saved
class ALiBi(PositionBias):
    """Attention with linear biases: `-slope[head] * |q_pos - k_pos|` is added.

    With `num_heads` a power of two, the slopes are `2 ** (-8 * (head + 1) / num_heads)`.
    Otherwise they are those of the next lower power of two, and then every
    second one of the next higher.

    Args:
        num_heads: a positive int, that of the queries.

    Raises:
        TypeError, ValueError: if `num_heads` is no positive int.

    References:
        - [Train Short, Test Long, Press et al., 2021](https://arxiv.org/abs/2108.12409)

    Example:

    >>> from sparse_attn import ALiBi
    >>> [float(x) for x in ALiBi(4).slopes]
    [0.25, 0.0625, 0.015625, 0.00390625]
    """

    num_heads: int
    by_distance = True
    defined_everywhere = True

    def __post_init__(self):
        object.__setattr__(self, "num_heads", check_int("num_heads", self.num_heads, minimum=1))

    @property
    def slopes(self):
        """`(num_heads,)` float32 array."""
        lower = 2 ** (self.num_heads.bit_length() - 1)
        found = _slopes(lower)
        if lower < self.num_heads:
            found = np.concatenate([found, _slopes(2 * lower)[::2][: self.num_heads - lower]])
        return found.astype("float32")

    def bias(self, q_pos, k_pos, head):
        distance = ops.cast(ops.abs(q_pos - k_pos), "float32")
        return -gather(ops.convert_to_tensor(self.slopes), head, axis=0) * distance


def _slopes(num_heads):
    return 2.0 ** (-8 * np.arange(1, num_heads + 1) / num_heads)


@saved
class SoftCap(ScoreMod):
    """Scores that stay within `(-cap, cap)`: `cap * tanh(score / cap)`.

    Args:
        cap: a positive number.

    Raises:
        TypeError, ValueError: if `cap` is no positive finite number.

    References:
        - [Gemma 2, Gemma Team, 2024](https://arxiv.org/abs/2408.00118)
    """

    cap: float
    by_distance = True
    defined_everywhere = True

    def __post_init__(self):
        object.__setattr__(self, "cap", check_positive("cap", self.cap))

    def modify(self, scores, q_pos, k_pos, head):
        return self.cap * ops.tanh(scores / self.cap)


class FromFunction(ScoreMod):
    """A plain function as a `ScoreMod`. What it needs a gradient for is not known."""

    def __init__(self, function):
        self.function = function

    def modify(self, scores, q_pos, k_pos, head):
        found = self.function(scores, q_pos, k_pos, head)
        shape = getattr(found, "shape", None)
        if shape is None or not _may_be_equal(shape, scores.shape):
            raise ValueError(
                "`score_mod` must give a tensor of the shape of the scores, "
                f"{tuple(scores.shape)}. Received: {found if shape is None else tuple(shape)}"
            )
        return ops.cast(found, scores.dtype)


def _may_be_equal(shape, other):
    """Whether two shapes are equal, as far as their sizes are known."""
    return len(shape) == len(other) and all(
        None in pair or pair[0] == pair[1] for pair in zip(shape, other, strict=True)
    )


def read_mods(score_mod, num_heads):
    """The argument `score_mod` as a tuple of `ScoreMod`.

    Args:
        score_mod: `None`, a `ScoreMod`, a function, or a list or tuple of these.
        num_heads: int, that of the queries.
    """
    requirement = "a ScoreMod, a function (scores, q_pos, k_pos, head), or a list of these"
    if score_mod is None:
        return ()
    given = score_mod if isinstance(score_mod, (list, tuple)) else [score_mod]
    found = []
    for mod in given:
        if not isinstance(mod, ScoreMod):
            if not callable(mod) or isinstance(mod, type) or not takes(_called(mod), 4):
                raise TypeError(received("score_mod", requirement, score_mod))
            mod = FromFunction(mod)
        heads = getattr(mod, "num_heads", None)
        if heads not in (None, num_heads):
            raise ValueError(received("score_mod", f"made for {num_heads} heads", mod))
        found.append(mod)
    return tuple(found)


def _called(mod):
    """What is called when a function, an object or a layer is, with the arguments that it tells."""
    return mod.call if isinstance(mod, keras.layers.Layer) else mod


def tensors_of(mods):
    """For each mod its tensors, a tuple: the values of variables."""
    return [
        tuple(x.value if isinstance(x, keras.Variable) else ops.convert_to_tensor(x) for x in own)
        for own in (mod.tensors for mod in mods)
    ]


def is_differentiable(mods):
    """Whether all say what they need a gradient for."""
    return not any(isinstance(mod, FromFunction) for mod in mods)


def only_add(mods):
    """Whether what they do does not depend on the scores."""
    return all(isinstance(mod, PositionBias) for mod in mods)


def are_defined_everywhere(mods):
    """Whether no pair has to be kept from any of them."""
    return all(mod.defined_everywhere for mod in mods)


def apply_mods(mods, scores, positions, tensors, allowed=None, example=(0, 0, 0)):
    """`scores` after all of some mods, one after the other.

    A pair that is not allowed, or that a mod before forbids, meets no mod but
    those that are defined everywhere: neither what they would return there nor
    its gradient, which may be infinite, reaches anything.

    Args:
        mods: a sequence of `ScoreMod`.
        scores: finite float tensor.
        positions: `(q_pos, k_pos, head)`.
        tensors: for each mod its tensors.
        allowed: bool tensor that broadcasts with the scores, or `None` for all.
        example: `(q_pos, k_pos, head)` of a pair at which the mods are evaluated where
            none of these is allowed, ints.

    Returns:
        `(scores, allowed)`: finite scores, any number where they are not
        allowed; the pairs that are allowed now, or `None` for all of them.
    """
    for mod, own in zip(mods, tensors, strict=True):
        if mod.defined_everywhere:
            scores = mod.modify(scores, *positions, *own)
            continue
        if allowed is not None:
            scores = ops.where(allowed, scores, ops.zeros((), scores.dtype))
        own = linked_if_any(own, allowed)
        found = mod.modify(scores, *at_allowed(positions, allowed, example), *own)
        kept = is_not_masked(found)
        allowed = kept if allowed is None else allowed & kept
        scores = ops.where(allowed, found, ops.zeros((), found.dtype))
    return scores, allowed


def add_biases(mods, dtype, positions, tensors, allowed=None, example=(0, 0, 0)):
    """The sum of the biases of some mods that only add, 0 for other pairs; see `apply_mods`."""
    everywhere = are_defined_everywhere(mods)
    if not everywhere:
        positions = at_allowed(positions, allowed, example)
        tensors = [linked_if_any(own, allowed) for own in tensors]
    found = [
        ops.cast(mod.bias(*positions, *own), dtype) for mod, own in zip(mods, tensors, strict=True)
    ]
    total = functools.reduce(ops.add, found)
    if everywhere:
        return total
    total = at_least_lowest(total)
    return total if allowed is None else ops.where(allowed, total, ops.zeros((), total.dtype))


def at_allowed(positions, allowed, example):
    """`(q_pos, k_pos, head)`, where pairs that are not allowed have the positions of one that is.

    Args are those of `apply_mods`.
    """
    if allowed is None:
        return positions
    *pair, head = positions
    # Where all heads allow the same pairs, any head will do.
    by_head = any(x != 1 != y for x, y in zip(allowed.shape, head.shape, strict=True))
    moved, fixed = (positions, []) if by_head else (pair, [head])
    for x in moved:
        allowed = allowed & (x == x)  # of the shape of all of them
    first = ops.argmax(ops.cast(_with_last(allowed, True), "int32"))
    found = []
    for x, last in zip(moved, example, strict=False):
        values = _with_last(ops.broadcast_to(x, ops.shape(allowed)), last)
        found.append(ops.where(allowed, x, gather(values, first, axis=0)))
    return *found, *fixed


def linked_if_any(tensors, allowed):
    """Tensors to which no gradient leads where no pair is allowed; see `apply_mods`."""
    if allowed is None or not tensors:
        return tensors
    some = any_of(allowed)
    return tuple(ops.where(some, x, ops.stop_gradient(x)) for x in tensors)


def _with_last(x, last):
    """The entries of a tensor in one row, and another one behind them."""
    last = ops.full((1,), last, x.dtype)
    return ops.concatenate([ops.reshape(x, (-1,)), last])
