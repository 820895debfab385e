"""Some rows or heads of a tensor: picked out of all, and put back at their places."""

import itertools

from keras import ops

from sparse_attn.layouts import crop
from sparse_attn.masking import zero_masked
from sparse_attn.reshaping import rearrange
from sparse_attn.tracing import custom_gradient, gather, most, size_of


class Chosen:
    """The queries or the keys at chosen positions, of a sequence of some length.

    Args:
        ranges: the `Ranges` of the positions, or `None` for all of them.
        size: the length of the sequence, int or int tensor.

    Attributes:
        count: how many are chosen, int or int tensor. Where the length is not
            known, there may be some beyond its end.
        positions: `(count,)` int32 tensor.
        all_exist: whether all of them certainly lie within the sequence.
    """

    def __init__(self, ranges, size):
        self.ranges, self.size = ranges, size
        known = isinstance(size, int)
        self.all_exist = known or ranges is None
        if ranges is None:
            self.count, self.positions = size, ops.arange(size, dtype="int32")
        elif known or ranges.period is None:
            rows = ranges.positions(size if known else ranges.ranges[-1][1])
            self.count, self.positions = len(rows), ops.convert_to_tensor(rows)
        else:
            period = ranges.period
            base = ops.convert_to_tensor(ranges.positions(period))
            starts = ops.arange((size + period - 1) // period, dtype="int32") * period
            self.positions = rearrange(starts[:, None] + base[None, :], "t i -> (t i)")
            self.count = size_of(self.positions, 0)

    def pick(self, x):
        """The chosen rows of axis 1; zeros where one is beyond its end."""
        if self.ranges is None:
            return x
        if self._is_one_range():
            return crop(x, self._start, self.count)
        return _pick(x, self.positions, self._places())

    def place(self, x, fill):
        """The inverse of `pick`: rows of axis 1 at their places, and a number elsewhere."""
        if self.ranges is None:
            return x
        if self._is_one_range():
            x = crop(x, -self._start, self.size)
        else:
            x = _pick(x, self._places(), self.positions)
        if fill == 0:
            return x
        inside = self.ranges(ops.arange(self.size, dtype="int32"))
        inside = ops.reshape(inside, (1, -1) + (1,) * (len(x.shape) - 2))
        return ops.where(inside, x, ops.full((), fill, x.dtype))

    def _is_one_range(self):
        return self.ranges.period is None and len(self.ranges.ranges) == 1

    @property
    def _start(self):
        return self.ranges.ranges[0][0]

    def _places(self):
        """For each position of the sequence its number among the chosen ones, or -1."""
        numbers = ops.arange(self.size, dtype="int32")
        total = sum(b - a for a, b in self.ranges.ranges)
        period = self.ranges.period
        rest = numbers if period is None else numbers % period
        before = 0 if period is None else numbers // period * total
        for a, b in self.ranges.ranges:
            before = before + ops.clip(rest - a, 0, b - a)
        return ops.where(self.ranges(numbers), before, -1)


def _pick(x, rows, back):
    """Rows of axis 1 by number, zeros for numbers that are no row; `back` are those of its adjoint.

    The gradient is a pick as well: what frameworks do instead is slow.
    """

    @custom_gradient
    def pick(x, rows, back):
        count = size_of(x, 1)
        inside = (rows >= 0) & (rows < count)
        # A graph of TensorFlow, which does not know the count, takes no row 0 where there is none.
        some = crop(x, 0, most(count, 1)) if x.shape[1] is None else x
        found = zero_masked(gather(some, ops.where(inside, rows, 0), axis=1), inside[None])

        def grad(*given, upstream=None):
            upstream = given[-1] if upstream is None else upstream
            return _pick(upstream, back, rows), None, None

        return found, grad

    return pick(x, rows, back)


def share_out(x, heads, axis):
    """A tensor's heads, shared out: for each list of heads a tensor of these.

    Args:
        x: a tensor, or `None`; an axis of size 1 is that of every head.
        heads: lists of numbers.
        axis: that of the heads.
    """
    numbers = list(itertools.chain(*heads))
    if x is None or x.shape[axis] == 1 < len(numbers):
        return [x] * len(heads)
    if sorted(numbers) == list(range(x.shape[axis])):
        ends = list(itertools.accumulate(map(len, heads)))[:-1]
        x = _reorder(x, numbers, axis)
        return ops.split(x, ends, axis=axis) if ends else [x]
    single = ops.split(x, x.shape[axis], axis=axis)  # some are in several lists
    return [ops.concatenate([single[number] for number in own], axis=axis) for own in heads]


def bring_together(tensors, heads, axis):
    """The inverse of `share_out`."""
    x = tensors[0] if len(tensors) == 1 else ops.concatenate(tensors, axis=axis)
    order = list(itertools.chain(*heads))
    return _reorder(x, sorted(range(len(order)), key=order.__getitem__), axis)


def _reorder(x, order, axis):
    if order == sorted(order):
        return x
    heads = ops.split(x, len(order), axis=axis)  # its gradient is a concatenation
    return ops.concatenate([heads[number] for number in order], axis=axis)
