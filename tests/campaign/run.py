"""Running a case on the backend in use, and comparing what comes with the oracle."""

import functools

import keras
import numpy as np
from keras import ops

from sparse_attn import sparse_attention, stream
from tests.campaign import oracle
from tests.campaign.cases import BACKEND, GROUP, as_numpy, tensors, wide
from tests.conftest import COSTS, DEFAULTS, use

# How much farther off than plain dense attention in the same dtype a result may be, and what is
# allowed anyway, of the largest number in it, of 1, or of the norm of what it sums up.
FACTOR = 2
FLOOR = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 0.02, "float16": 0.0025}
DIFFERENTIABLE = ("query", "key", "value", "bias", "table")


def check(case):
    """Run a case; raise an `AssertionError` that says what is wrong, if anything is."""
    given = tensors(case)
    expected, norms = oracle.attention(case, given)
    measure, _ = oracle.attention(case, given, case.dtype)
    found = run(case, given)
    wrong = [
        f"{name}: {told}"
        for name, x in found.items()
        for told in _compare(
            name, x, expected[name], measure[name], norms.get(name, 0), case, given
        )
    ]
    if wrong:
        raise AssertionError("; ".join(wrong))


def failure(case):
    """What is wrong with a case, a text, or `None`."""
    try:
        check(case)
    except Exception as error:
        told = " ".join(str(error).split())
        told = told if len(told) < 400 else f"{told[:150]} ... {told[-250:]}"
        return told if isinstance(error, AssertionError) else f"{type(error).__name__}: {told}"
    return None


def _compare(name, x, expected, measure, norm, case, given):
    """What is wrong with a result, as texts."""
    dtype = {"out": case.dtype, "lse": wide(case.dtype)}.get(name) or str(given[name].dtype)
    found_dtype, x = x
    if found_dtype != dtype:
        yield f"its dtype is {found_dtype}, not {dtype}"
    if x.shape != expected.shape:
        yield f"its shape is {x.shape}, not {expected.shape}"
        return
    if not np.array_equal(np.isfinite(x), np.isfinite(expected)):
        count = int((np.isfinite(x) != np.isfinite(expected)).sum())
        yield f"{count} of {x.size} numbers are finite where they should not be, or not finite"
        return
    exact = _exact_zeros(name, case, given)
    if exact is not None and (x[exact] != (-np.inf if name == "lse" else 0)).any():
        yield "not exactly 0, or -inf, where there is no pair"
    x, expected, measure = (np.where(np.isfinite(y), y, 0) for y in (x, expected, measure))
    error, allowed = np.abs(x - expected), FACTOR * np.abs(measure - expected).max(initial=0)
    size = max(np.abs(expected).max(initial=1), np.max(norm, initial=0))
    allowed += max(FLOOR[case.dtype], FLOOR[dtype]) * size
    if error.max(initial=0) > allowed:
        place = np.unravel_index(error.argmax(), error.shape)
        yield (
            f"off by {error.max():.3g} where {allowed:.3g} is allowed, at "
            f"{tuple(map(int, place))}: {x[place]:.6g}, not {expected[place]:.6g}"
        )


def _exact_zeros(name, case, given):
    """Where a result must be exactly 0, since no pair has to do with it."""
    may = oracle.pairs(case, given)
    if name in ("out", "lse", "query"):
        return ~np.moveaxis(may.any(axis=3), 1, 2)
    if name in ("key", "value"):
        groups = case.key_heads, case.heads // case.key_heads
        seen = may.any(axis=2).reshape(case.batch, *groups, case.m).any(axis=2)
        return ~np.moveaxis(seen, 1, 2)
    return None


# ---- The call ---------------------------------------------------------------------------


def call(case, given):
    """`sparse_attention` of tensors: its results by name."""
    given = dict(given)
    options = {
        name: given[name]
        for name in ("query_mask", "key_mask", "attention_mask", "bias")
        if name in given
    }
    if case.segments:
        options["segment_ids"] = given["segments"]
        if "pair" in case.segments:
            options["segment_ids"] = given["segments"], given["key_segments"]
    if case.positions:
        start = case.first if case.positions == "int" else given["positions"]
        if case.positions == "arange":
            start = ops.arange(start, start + ops.shape(given["query"])[1], dtype="int32")
        options["query_positions"] = start
    built = [mod.build(case.heads, given.get("table")) for mod in case.mods]
    found = sparse_attention(
        given["query"], given["key"], given["value"], case.pattern,
        score_mod=built[0] if len(built) == 1 else built or None,
        scale=case.scale,
        return_lse=case.return_lse,
        max_score_bytes=case.max_score_bytes,
        **options,
    )  # fmt: skip
    return dict(zip(("out", "lse"), found, strict=True)) if case.return_lse else {"out": found}


def loss(case, given):
    """`sum(out * d_out) + sum(lse * d_lse)`, and the results."""
    found = call(case, given)
    total = 0.0
    for name, x in found.items():
        x = ops.cast(ops.where(ops.isfinite(x), x, ops.zeros_like(x)), wide(case.dtype))
        total = total + ops.sum(x * ops.cast(given["d_" + name], x.dtype))
    return total, found


def run(case, given):
    """The results and gradients of a case: by name its dtype and a float64 array."""
    use(COSTS if case.long else DEFAULTS)
    usual, stream.PIECE_BYTES = stream.PIECE_BYTES, case.piece_bytes
    try:
        found = RUN(case, given)
        return {name: (_dtype(x), _to_numpy(x)) for name, x in found.items()}
    finally:
        stream.PIECE_BYTES = usual
        use(COSTS)


def _dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


def _to_numpy(x):
    x = x if _dtype(x) == "float64" else ops.cast(x, "float32")
    return ops.convert_to_numpy(x).astype("float64")


def _differentiable(case, given):
    found = [name for name in DIFFERENTIABLE if name in given]
    return [name for name in found if not (name == "bias" and case.bias_dtype == "int32")]


def _arrays(case):
    """What an eager call gets as numpy arrays, not as tensors."""
    masks = ["query_mask", "key_mask", "attention_mask", "segments", "key_segments"]
    if case.positions != "arange":
        masks.append("positions")
    return masks if case.arrays else []


def _key(case):
    """What a compiled function is made for: the same for a group, but for what is not known."""
    sizes = {"b": "batch", "n": "n", "m": "m"}
    varying = sizes if case.mode == "eager" else case.varying if case.mode == "unknown" else ""
    fields = {sizes[axis]: -1 for axis in varying}
    if case.positions != "int":
        fields["first"] = 0
    return case.__class__(**{**vars(case), "number": case.number // GROUP, **fields})


def forget():
    """Let go of what was compiled, and what the frameworks keep of it."""
    for made in (_tensorflow_function, _jax_function, _jax_export):
        made.cache_clear()
    keras.backend.clear_session()
    if BACKEND == "jax":
        import jax

        jax.clear_caches()


# ---- TensorFlow -------------------------------------------------------------------------


def _tensorflow(case, given):
    import tensorflow as tf

    if case.mode == "eager":
        kept = _arrays(case)
        given = {name: x if name in kept else tf.constant(x) for name, x in given.items()}
        return _tensorflow_gradients(case, given)
    function = _tensorflow_function(_key(case), tuple(given))
    return function({name: tf.constant(x) for name, x in given.items()})


def _tensorflow_gradients(case, given):
    import tensorflow as tf

    names = _differentiable(case, given)
    with tf.GradientTape() as tape:
        tape.watch([given[name] for name in names])
        total, found = loss(case, given)
    zero = tf.UnconnectedGradients.ZERO
    gradients = tape.gradient(total, [given[name] for name in names], unconnected_gradients=zero)
    for name, x in zip(names, gradients, strict=True):
        by_framework = any(type(mod).__name__ == "TimesByFunction" for mod in case.mods)
        if not tf.is_tensor(x) and not by_framework:
            raise AssertionError(f"the gradient by {name} is no tensor: {type(x).__name__}")
        found[name] = tf.convert_to_tensor(x)
    return found


@functools.lru_cache(maxsize=2)
def _tensorflow_function(key, names):
    import tensorflow as tf

    unknown = dict.fromkeys(key.varying) if key.mode == "unknown" else {}
    specs = {}
    for name, (axes, dtype) in _axes_of(key).items():
        if name in names:
            sizes = {"b": key.batch, "n": key.n, "m": key.m} | unknown
            shape = [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in axes]
            specs[name] = tf.TensorSpec(shape, dtype)

    @tf.function(input_signature=[specs], jit_compile=key.mode == "xla")
    def function(given):
        return _tensorflow_gradients(key, given)

    return function


def _axes_of(case):
    """For each tensor that may be given its axes, ints or names of sizes, and its dtype."""
    heads = {"1": 1, "h": case.heads}
    pair = {
        name: [heads.get(axis, axis) for axis in getattr(case, name)]
        for name in ("attention_mask", "bias")
    }
    table = case.heads * 7
    wider = wide(case.dtype)
    return {
        "query": (["b", "n", case.heads, case.dim], case.dtype),
        "key": (["b", "m", case.key_heads, case.dim], case.dtype),
        "value": (["b", "m", case.key_heads, case.value_dim], case.dtype),
        "d_out": (["b", "n", case.heads, case.value_dim], case.dtype),
        "d_lse": (["b", "n", case.heads], wider),
        "table": ([table], wider),
        "query_mask": (["b", "n"], "bool"),
        "key_mask": (["b", "m"], "bool"),
        "attention_mask": (pair["attention_mask"], "bool"),
        "bias": (pair["bias"], case.bias_dtype),
        "segments": (["b", "n"], "int32"),
        "key_segments": (["b", "m"], "int32"),
        "positions": (["n"] if case.positions == "array" else [], "int32"),
    }


# ---- JAX --------------------------------------------------------------------------------


def _jax(case, given):
    import jax

    given = {name: jax.numpy.asarray(x) for name, x in given.items()}
    if case.mode == "unknown":
        return _jax_export(_key(case), tuple(given))(given)
    if case.mode == "eager":
        with jax.disable_jit():
            return _jax_gradients(case, given)
    return _jax_function(_key(case))(given)


def _jax_gradients(case, given):
    import jax

    names = _differentiable(case, given)

    def of_some(some):
        return loss(case, given | some)

    some = {name: given[name] for name in names}
    gradients, found = jax.grad(of_some, has_aux=True)(some)
    return found | gradients


@functools.lru_cache(maxsize=2)
def _jax_function(key):
    import jax

    return jax.jit(functools.partial(_jax_gradients, key))


@functools.lru_cache(maxsize=2)
def _jax_export(key, names):
    """Exported for unknown lengths: the results alone, as a model is exported."""
    import jax
    from jax import export

    sizes = {"b": key.batch, "n": key.n, "m": key.m}
    symbol = {"b": "b", "n": "n", "m": "n" if key.segments.startswith("one") else "m"}
    free = list(dict.fromkeys(symbol[axis] for axis in sizes if axis in key.varying))
    symbols = dict(zip(free, export.symbolic_shape(",".join(free)), strict=True))
    sizes |= {axis: symbols[symbol[axis]] for axis in key.varying}
    specs = {
        name: jax.ShapeDtypeStruct(tuple(sizes.get(axis, axis) for axis in axes), as_numpy(dtype))
        for name, (axes, dtype) in _axes_of(key).items()
        if name in names
    }
    function = jax.jit(lambda given: call(key, given))
    return jax.jit(export.export(function)(specs).call)


# ---- PyTorch ----------------------------------------------------------------------------


def _torch(case, given):
    import torch

    made = {}
    for name, x in given.items():
        if name in _arrays(case):
            made[name] = x
        elif x.dtype == as_numpy("bfloat16"):
            made[name] = torch.tensor(x.astype("float32")).to(torch.bfloat16)
        else:
            made[name] = torch.tensor(x)
    names = _differentiable(case, given)
    for name in names:
        made[name].requires_grad_()
    total, found = loss(case, made)
    # An input without a link is an error here, as in DistributedDataParallel.
    gradients = torch.autograd.grad(total, [made[name] for name in names])
    found = {name: x.detach() for name, x in found.items()}
    return found | dict(zip(names, gradients, strict=True))


RUN = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[BACKEND]
