"""Cases: a random call each, made by a seed and a number alone.

A group of `GROUP` numbers shares all that a compiled function is made for, so that it is
compiled once: the pattern, the options, the lengths that it knows. The rest, that is the
numbers in the tensors, the masks and the lengths that it does not know, each case has of its own.
"""

import dataclasses
import zlib

import keras
import ml_dtypes
import numpy as np

from sparse_attn import Causal, Pattern
from tests.campaign import mods, oracle, patterns

BACKEND = keras.backend.backend()
GROUP = 10
MODES = {  # how often a group is run in each mode
    "tensorflow": {"eager": 0.2, "known": 0.38, "unknown": 0.38, "xla": 0.04},
    "jax": {"known": 0.9, "unknown": 0.1},
    "torch": {"eager": 1.0},
}[BACKEND]


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `sparse_attention`.

    Args:
        seed, number: those of the tensors, together with their sizes.
        mode: "eager", or compiled for lengths that are "known" or "unknown" ("xla": by XLA).
        varying: what an "unknown" function does not know, of "b", "n" and "m".
        poison: what stands in padding, and "everywhere" whether in all that nobody may see.
        attention_mask, bias: the axes of these, such as "b1nm", or "" for none.
        bias_dtype, bias_forbids: the bias may be of another dtype, and hold `-inf`.
        segments: "one" for both sides or a "pair", and "sorted" or not; "" for none.
        mods: of `mods.py`.
        positions: how `query_positions` come, "int", "scalar", "arange" or "array"; "" for none.
        first: the position of the first query.
        arrays: whether masks come as numpy arrays where the mode allows it.
        piece_bytes: those of a piece of work.
        long: whether plans are made as for long sequences.
    """

    seed: int
    number: int
    mode: str
    pattern: Pattern
    batch: int
    n: int
    m: int
    heads: int = 1
    key_heads: int = 1
    dim: int = 4
    value_dim: int = 4
    dtype: str = "float32"
    varying: str = "bnm"
    query_mask: bool = False
    key_mask: bool = False
    poison: str = ""
    attention_mask: str = ""
    bias: str = ""
    bias_dtype: str = "float32"
    bias_forbids: bool = False
    segments: str = ""
    mods: tuple = ()
    scale: float | None = None
    positions: str = ""
    first: int = 0
    return_lse: bool = True
    arrays: bool = False
    max_score_bytes: int = 2**30
    piece_bytes: int = 2**24
    long: bool = True

    def __str__(self):
        fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        told = [f"{f.name}={x!r}" for f, x in fields if x != f.default]
        return f"Case({', '.join(told)})"


def pick(rng, shares):
    """One of the keys of a dict, as often as its value says."""
    keys, weights = list(shares), np.array(list(shares.values()), float)
    return keys[rng.choice(len(keys), p=weights / weights.sum())]


def case(seed, number, mode=None):
    """The case of a seed and a number; its mode is drawn too, unless it is given."""
    rng = np.random.default_rng([seed, number // GROUP])
    drawn_mode = pick(rng, MODES)
    mode = mode or drawn_mode
    longest = pick(rng, {int(rng.integers(1, 71)): 5, 16: 1, 33: 1, 64: 1, 128: 0.4, 300: 0.2})
    key_heads, repeats = int(rng.integers(1, 5)), pick(rng, {1: 3, 2: 1, 4: 0.5})
    key_heads = key_heads if longest < 100 else min(key_heads, 2)
    heads = key_heads * min(repeats, 8 // key_heads)
    pattern, own_mods = patterns.draw(rng, longest, heads), mods.draw(rng, heads)
    if any(mod.causal for mod in own_mods):
        pattern = Causal() & pattern
    dim, dtype = int(rng.integers(1, 17)), pick(rng, DTYPES)
    positions = _positions(rng)
    same = not positions and rng.random() < 0.7
    segments = pick(rng, {"": 3, "one" if same else "pair": 1})
    structure = {
        "heads": heads,
        "key_heads": key_heads,
        "dim": dim,
        "value_dim": dim if rng.random() < 0.7 else int(rng.integers(1, 17)),
        "dtype": dtype,
        "varying": pick(rng, {"bnm": 6, "nm": 1, "b": 0.5, "nm" if same else "n": 1}),
        "query_mask": bool(rng.random() < 0.35),
        "key_mask": bool(rng.random() < 0.4),
        "poison": pick(rng, {"": 2, "padding": 1, "everywhere": 1}),
        "attention_mask": _axes(rng, 0.3),
        "bias": _axes(rng, 0.3),
        "bias_dtype": pick(rng, {"float32": 3, dtype: 3, "int32": 0.5}),
        "bias_forbids": bool(rng.random() < 0.5),
        "segments": segments and segments + pick(rng, {"": 1, " sorted": 1}),
        "mods": own_mods,
        "scale": pick(rng, {None: 5, 1.0: 1, 0.3: 1, 0.0: 0.2, -0.7: 0.5}),
        "positions": positions,
        "return_lse": bool(rng.random() < 0.6),
        "arrays": bool(rng.random() < 0.5),
        "max_score_bytes": pick(rng, {2**30: 2, 0: 1, 4000: 0.5}),
        # Several pieces, but no more than some twenty for each row of the batch.
        "piece_bytes": pick(rng, {2**24: 1, max(2000, longest**2 * heads * 4 // 20): 1}),
        "long": bool(rng.random() < 0.8),
    }
    own = np.random.default_rng([seed, number // GROUP, number % GROUP])
    varying = {"eager": "bnm", "unknown": structure["varying"]}.get(mode, "")
    sizes = {}
    for name, limit in (("b", 3), ("n", longest), ("m", longest)):
        drawn, fixed = (_size(x, limit, mode) for x in (own, rng))
        sizes[name] = drawn if name in varying else fixed
    if same:
        sizes["m"] = sizes["n"]
    b, n, m = sizes.values()
    if positions:  # an int is a constant, what else has them may differ
        limit = 2**31 if pattern.max_length is None else min(pattern.max_length, 2**31)
        last = limit - longest - (positions == "arange")  # an `arange` has an end that is int32
        rng = rng if positions == "int" else own
        near = int(rng.integers(0, min(max(last, 0), 2 * longest) + 1))
        # Far away only where no mod rounds such a distance.
        structure["first"] = last if rng.random() < 0.2 and last > 0 and not own_mods else near
    return Case(seed, number, mode, pattern, b, n, m, **structure)


DTYPES = {"float32": 6, "float64": 1.5, "bfloat16": 1.2, "float16": 1.2}
if BACKEND == "jax":  # which computes in float32 unless told otherwise for the whole process
    del DTYPES["float64"]


def _size(rng, limit, mode):
    empty = 0.02 if mode in ("eager", "unknown") and BACKEND != "jax" else 0.0
    return pick(rng, {0: empty, int(rng.integers(1, limit + 1)): 0.7, limit: 0.3})


def _axes(rng, share):
    """The axes of a table of pairs, perhaps of size 1, or "" for no table."""
    axes = "bhnm" if rng.random() < 0.5 else pick(rng, {"bnm": 1, "nm": 1})
    axes = "".join("1" if rng.random() < 0.25 else axis for axis in axes)
    return axes if rng.random() < share else ""


def _positions(rng):
    """How the positions of the queries come."""
    kinds = {"": 8, "int": 1, "scalar": 1, "array": 1, "arange": 0.7}
    if BACKEND == "jax":  # whose `arange` knows no traced lengths
        del kinds["arange"]
    return pick(rng, kinds)


# ---- Tensors ----------------------------------------------------------------------------


def tensors(case):
    """All tensors of a call, numpy arrays by name, and the gradients that reach its outputs."""
    b, n, m, h, g = case.batch, case.n, case.m, case.heads, case.key_heads
    numbers = {
        "query": (b, n, h, case.dim),
        "key": (b, m, g, case.dim),
        "value": (b, m, g, case.value_dim),
        "d_out": (b, n, h, case.value_dim),
    }
    found = {name: _normal(case, name, shape, case.dtype) for name, shape in numbers.items()}
    if case.return_lse:
        found["d_lse"] = _normal(case, "d_lse", (b, n, h), wide(case.dtype))
    if any(mod.has_table for mod in case.mods):
        size = h * (2 * mods.REACH + 1)
        found["table"] = _normal(case, "table", (size,), wide(case.dtype))
    if case.query_mask:
        found["query_mask"] = _padding(case, "query_mask", b, n)
    if case.key_mask:
        found["key_mask"] = _padding(case, "key_mask", b, m)
    sizes = {"1": 1, "b": b, "h": h, "n": n, "m": m}
    if case.attention_mask:
        rng = _rng(case, "attention_mask")
        shape = [sizes[axis] for axis in case.attention_mask]
        found["attention_mask"] = rng.random(shape) < 0.8
        found["attention_mask"] &= rng.random(shape[-1]) < 0.8  # keys that nobody may see
        found["attention_mask"] &= rng.random((*shape[:-1], 1)) < 0.95  # queries without keys
    if case.bias:
        dtype = case.bias_dtype
        bias = _normal(case, "bias", [sizes[axis] for axis in case.bias], dtype)
        if case.bias_forbids and dtype != "int32":
            bias[_rng(case, "forbidden").random(bias.shape) < 0.1] = -np.inf
        found["bias"] = bias
    if case.segments:
        found["segments"] = _segments(case, "segments", b, n)
        if "pair" in case.segments:
            found["key_segments"] = _segments(case, "key_segments", b, m)
    if case.positions:
        start = np.int32(case.first)
        if case.positions == "array":
            start = start + _rng(case, "positions").permutation(n).astype("int32")
        found["positions"] = np.asarray(start)
    if case.poison:
        _poison(case, found)
    return found


def wide(dtype):
    return "float64" if dtype == "float64" else "float32"


def _rng(case, name):
    """Each tensor has numbers of its own: without one option the others stay as they are."""
    return np.random.default_rng([case.seed, case.number, zlib.crc32(name.encode())])


def _normal(case, name, shape, dtype):
    return _rng(case, name).normal(size=shape).astype(as_numpy(dtype))


def as_numpy(dtype):
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


def _padding(case, name, b, length):
    """Rows padded at the end, or anywhere; now and then nothing is valid."""
    rng = _rng(case, name)
    valid = np.arange(length) < rng.integers(0, length + 1, (b, 1))
    if rng.random() < 0.5:
        valid = rng.random((b, length)) < 0.7
    return valid & (rng.random((b, 1)) < 0.95)


def _segments(case, name, b, length):
    ids = _rng(case, name).integers(-1, 3, (b, length)).astype("int32")
    return np.sort(ids, axis=1) if "sorted" in case.segments else ids


def _poison(case, given):
    """NaN and the like where nobody looks: in padding, or in all keys that no query may see."""
    unseen = np.zeros((case.batch, case.m, case.key_heads), bool)
    if case.key_mask:
        unseen |= ~given["key_mask"][..., None]
    # Lengths that are not known are taken to be equal: "NaN and infinite numbers" in the docs.
    by_masks = case.attention_mask or case.bias or case.positions
    may_fail = case.mode == "unknown" and case.m > case.n and not by_masks
    if case.poison == "everywhere" and not may_fail:
        groups = case.key_heads, case.heads // case.key_heads
        may = oracle.pairs(case, given).any(axis=2).reshape(case.batch, *groups, case.m)
        unseen |= np.moveaxis(~may.any(axis=2), 1, 2)
    places = {"key": unseen, "value": unseen}
    if case.query_mask:
        places["query"] = np.broadcast_to(~given["query_mask"][..., None], given["query"].shape[:3])
    for name, place in places.items():
        values = np.array([np.nan, np.inf, -np.inf, 1e30])
        drawn = values[_rng(case, "poison of " + name).integers(4, size=given[name].shape)]
        with np.errstate(over="ignore"):  # 1e30 in float16
            given[name][place] = drawn.astype(given[name].dtype)[place]
