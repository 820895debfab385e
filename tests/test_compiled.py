"""Compiled functions: with known and unknown length, with and without XLA."""

import keras
import numpy as np
import pytest

from sparse_attn import (
    Atrous,
    Axial,
    Band,
    BigBird,
    Blocks,
    Causal,
    Fixed,
    Full,
    Global,
    Local,
    Neighborhood,
    PositionBias,
    Prefix,
    Random,
    Strided,
    sparse_attention,
    stream,
)
from sparse_attn.reference import dense_attention
from tests.cases import Diagonals
from tests.compare import FLOAT, close, random_inputs, random_masks, to_numpy

tf = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="tf.function is TensorFlow's"
)

PATTERNS = [  # one of each kind of layout, and unions of them
    Full(),
    Causal(),
    Local(3),
    Strided(3),
    Fixed(5, 2),
    Random(80, 4, 2),
    Neighborhood((5, 4, 4), 1),
    Causal() & (Local(3) | Prefix(2)),
    Atrous(4) & Local(10),
    ~Global(2) & Local(4),
    (Diagonals() | Local(1)) & ~Prefix(1),
]


def with_gradients(pattern, **options):
    """A function of tensors: output, lse and gradients of a fixed weighted sum."""

    def function(q, k, v, key_mask, out_grad):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            out, lse = sparse_attention(
                q, k, v, pattern, key_mask=key_mask, return_lse=True, **options
            )
            finite = tf.math.is_finite(lse)
            loss = tf.reduce_sum(out * out_grad) + tf.reduce_sum(tf.where(finite, lse, 0))
        return out, lse, *tape.gradient(loss, [q, k, v], unconnected_gradients="zero")

    return function


def compiled(pattern, length, xla, **options):
    specs = [tf.TensorSpec((None, length, 2, size), FLOAT) for size in (4, 4, 3)]
    specs += [
        tf.TensorSpec((None, length), "bool"),
        tf.TensorSpec((None, length, 2, 3), FLOAT),
    ]
    return tf.function(with_gradients(pattern, **options), input_signature=specs, jit_compile=xla)


def check(function, pattern, n, b=2):
    q, k, v = random_inputs(n, n, b=b)
    key_mask = random_masks(n, n, b=b)["key_mask"]
    out_grad = np.random.default_rng(1).normal(size=(b, n, 2, 3)).astype(FLOAT)
    found = [to_numpy(x) for x in function(q, k, v, key_mask, out_grad)]
    _, lse = dense_attention(q, k, v, pattern, key_mask=key_mask)
    out, lse, gradients = dense_attention(
        q, k, v, pattern, key_mask=key_mask, out_grad=out_grad,
        lse_grad=np.isfinite(lse).astype(float),
    )  # fmt: skip
    for name, x, y in zip(
        ["out", "lse", *gradients], found, [out, lse, *gradients.values()], strict=True
    ):
        close(x, y, f"{name} of {pattern!r} at n = {n} with a batch of {b}")


@pytest.mark.parametrize("xla", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_compiled_equals_oracle(pattern, xla):
    function = compiled(pattern, None, xla)
    for n in (13, 70):  # no block divides these
        check(function, pattern, n)


@pytest.mark.parametrize("pattern", PATTERNS[1::2], ids=repr)
def test_compiled_for_one_length_equals_oracle(pattern):
    check(compiled(pattern, 13, xla=True), pattern, 13)


@pytest.mark.parametrize("xla", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize("max_score_bytes", [2**30, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize(
    "pattern",
    [Causal() & Local(5), Strided(4)],
    ids=repr,
)
def test_pieces_compiled_equal_oracle(pattern, max_score_bytes, xla, monkeypatch):
    monkeypatch.setattr(stream, "PIECE_BYTES", 20_000 if max_score_bytes else 2000)
    function = compiled(pattern, 37, xla, max_score_bytes=max_score_bytes)
    for b in (1, 3):
        check(function, pattern, 37, b)


def test_dropout_streamed_and_compiled_is_the_same_backwards(monkeypatch):
    # The output is linear in the values: its gradient by them gives it back.
    monkeypatch.setattr(stream, "PIECE_BYTES", 4000)
    q, k, v = random_inputs(37, 37)

    @tf.function
    def function(q, k, v):
        with tf.GradientTape() as tape:
            tape.watch(v)
            out = sparse_attention(q, k, v, Strided(4), dropout=0.5, seed=2, max_score_bytes=0)
            total = tf.reduce_sum(out)
        return total, tape.gradient(total, v)

    total, gradient = function(q, k, v)
    np.testing.assert_allclose((to_numpy(gradient) * v).sum(), total, rtol=1e-5)


def test_positions_of_a_decoder_may_be_a_tensor():
    pattern = Causal() & (Local(4) | Prefix(2))
    q, k, v = random_inputs(3, 40)
    spec = [tf.TensorSpec((2, None, 2, size), FLOAT) for size in (4, 4, 3)]

    @tf.function(input_signature=[*spec, tf.TensorSpec((), "int32")])
    def step(q, k, v, start):
        return sparse_attention(q, k, v, pattern, query_positions=start)

    for start in (0, 7, 37):
        expected, _ = dense_attention(q, k, v, pattern, query_positions=start)
        close(to_numpy(step(q, k, v, start)), expected, f"start {start}")


@pytest.mark.parametrize(
    ("pattern", "xla"),
    [
        (Blocks(100_000), False),
        (Prefix(5000), True),
        (Atrous(70_000), False),
        (Strided(3000), True),
        (Local(10**6), False),
    ],
)
def test_a_short_sequence_of_unknown_length_does_not_pay_for_a_long_pattern(pattern, xla):
    # Tiles made for the pattern would not fit in memory: dense is less here.
    function = compiled(pattern, None, xla)
    n = 16
    q, k, v = random_inputs(n, n)
    out, *_ = function(q, k, v, np.ones((2, n), bool), np.ones((2, n, 2, 3), FLOAT))
    close(to_numpy(out), dense_attention(q, k, v, pattern)[0], "out")


@pytest.mark.parametrize("positions", [None, 3])
def test_a_function_is_traced_without_a_warning(positions, caplog):
    q, k, v = random_inputs(8, 8)

    @tf.function
    def function(q, k, v):
        return sparse_attention(q, k, v, Causal() & Local(3), query_positions=positions)

    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        function(q, k, v)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "AutoGraph" in record.getMessage()]


def test_dropout_compiled_draws_anew_each_call():
    seed = keras.random.SeedGenerator(3)
    q, k, v = random_inputs(29, 29)

    @tf.function
    def function():
        return sparse_attention(q, k, v, Strided(3), dropout=0.5, seed=seed)

    first, second = to_numpy(function()), to_numpy(function())
    assert np.abs(first - second).max() > 0


# ---- Nothing of size n * n ---------------------------------------------------

SPARSE = [
    Causal() & Local(16),
    Prefix(8),
    Causal() & (Local(16) | Prefix(4)),
    Local(16) & Atrous(4),
    ~(Causal() | ~Local(16)),
    Local(16) | Blocks(32),
]


def largest_tensor(graph):
    """Elements of the largest tensor of a traced graph, in its functions too; constants too."""
    functions = [graph, *(f.graph for f in graph._functions.values() if hasattr(f, "graph"))]
    sizes = [
        int(np.prod(tensor.shape))
        for function in functions
        for operation in function.get_operations()
        for tensor in operation.outputs
        if tensor.shape.is_fully_defined()
    ]
    return max(sizes)


@pytest.mark.parametrize("max_score_bytes", [2**30, 0], ids=["kept", "streamed"])
@pytest.mark.parametrize("pattern", SPARSE, ids=repr)
def test_no_tensor_of_the_graph_grows_faster_than_the_length(pattern, max_score_bytes):
    def trace(n):
        specs = [tf.TensorSpec((1, n, 2, 8), "float32")] * 3
        specs += [tf.TensorSpec((1, n), "bool"), tf.TensorSpec((1, n, 2, 8), "float32")]
        function = with_gradients(pattern, max_score_bytes=max_score_bytes)
        return tf.function(function).get_concrete_function(*specs).graph

    short, long = largest_tensor(trace(2048)), largest_tensor(trace(16384))
    assert long <= 8.5 * short
    assert long < 16384**2 / 50


@pytest.mark.parametrize("pattern", [Local(64), Causal() & (Local(64) | Prefix(4))], ids=repr)
def test_a_length_whose_square_would_not_fit_in_memory(pattern):
    n = 200_000  # n * n bools are 40 GB
    x = np.ones((1, n, 1, 2), "float32")
    out = to_numpy(sparse_attention(x, x, x, pattern))
    np.testing.assert_allclose(out, x, rtol=1e-5)


# ---- Lengths that are unknown, or too long ------------------------------------


@pytest.mark.parametrize(("n", "m"), [(33, None), (None, 40), (None, None)])
@pytest.mark.parametrize(
    "pattern", [Full(), Local(3), Atrous(15), Blocks(20, 1), Fixed(4), Band(-4, 17, 2)], ids=repr
)
def test_lengths_may_be_unknown_and_segments_known(pattern, n, m):
    q, k, v = random_inputs(33, 40)
    rng = np.random.default_rng(0)
    segments = rng.integers(0, 2, (2, 33)), rng.integers(0, 2, (2, 40))
    for segment_ids in (None, segments):
        function = tf.function(
            lambda q, k, v, ids=segment_ids: sparse_attention(q, k, v, pattern, segment_ids=ids),
            input_signature=[
                tf.TensorSpec((2, size, 2, x.shape[-1]), FLOAT)
                for size, x in zip((n, m, m), (q, k, v), strict=True)
            ],
        )
        expected, _ = dense_attention(q, k, v, pattern, segment_ids=segment_ids)
        close(function(q, k, v), expected, "out")


@pytest.mark.parametrize("xla", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize("pattern", [*PATTERNS, BigBird(16, 2)], ids=repr)
def test_lengths_that_were_unknown_may_be_0(pattern, xla):
    function = compiled(pattern, None, xla)
    specs = [tf.TensorSpec((None, None, 2, size), FLOAT) for size in (4, 4, 3)]
    unmasked = tf.function(
        lambda q, k, v: sparse_attention(q, k, v, pattern, return_lse=True), input_signature=specs
    )
    sizes = [(2, 0, 0), (2, 0, 5), (2, 5, 0)]  # XLA compiles for each
    for b, n, m in sizes if xla else [*sizes, (0, 5, 5)]:
        (q, _, _), (_, k, v) = random_inputs(n, n, b=b), random_inputs(m, m, b=b)
        given = q, k, v, np.ones((b, m), bool), np.ones((b, n, 2, 3), FLOAT)
        plain = unmasked(q, k, v)[1]
        np.testing.assert_array_equal(plain, np.full((b, n, 2), -np.inf))
        out, lse, *gradients = [to_numpy(x) for x in function(*given)]
        np.testing.assert_array_equal(out, np.zeros((b, n, 2, 3)))
        np.testing.assert_array_equal(lse, np.full((b, n, 2), -np.inf))
        for x, gradient in zip((q, k, v), gradients, strict=True):
            np.testing.assert_array_equal(gradient, np.zeros_like(x))


@pytest.mark.parametrize("pattern", [Strided(3) | Atrous(9), Fixed(8), Causal()], ids=repr)
def test_tables_that_were_unknown_may_be_empty(pattern):
    """A mask of pairs and a bias of no batch, of no queries, or of no keys."""
    specs = [tf.TensorSpec((None, None, 2, size), FLOAT) for size in (4, 4, 3)]
    specs += [tf.TensorSpec((None, None, None), dtype) for dtype in ("bool", FLOAT)]

    @tf.function(input_signature=specs)
    def function(q, k, v, mask, bias):
        with tf.GradientTape() as tape:
            tape.watch([q, bias])
            out = sparse_attention(q, k, v, pattern, attention_mask=mask, bias=bias)
            loss = tf.reduce_sum(out)
        return out, *tape.gradient(loss, [q, bias])

    for b, n, m in ((2, 0, 0), (2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 5, 5)):
        (q, _, _), (_, k, v) = random_inputs(n, n, b=b), random_inputs(m, m, b=b)
        mask, bias = np.ones((b, n, m), bool), np.zeros((b, n, m), FLOAT)
        out, by_q, by_bias = [to_numpy(x) for x in function(q, k, v, mask, bias)]
        assert (by_q.shape, by_bias.shape) == (q.shape, bias.shape)
        if 0 in (b, n, m):
            np.testing.assert_array_equal(out, np.zeros((b, n, 2, 3)))
            np.testing.assert_array_equal(by_q, np.zeros(q.shape))
        else:
            close(out, dense_attention(q, k, v, pattern)[0], "out")


@pytest.mark.parametrize("shared", [(), (1, 2), (2, 1)], ids=["all", "rows", "heads"])
@pytest.mark.parametrize(
    "pattern",
    [Strided(32), Strided(4) | Atrous(3), Axial((4, 8)), Local(3), Causal() & Blocks(5)],
    ids=repr,
)
def test_a_bias_that_is_shared_has_its_gradient_at_unknown_lengths(pattern, shared):
    specs = [tf.TensorSpec((None, None, 2, size), FLOAT) for size in (4, 4, 3)]

    @tf.function(input_signature=[*specs, tf.TensorSpec((*shared, None, None), FLOAT)])
    def function(q, k, v, bias):
        with tf.GradientTape() as tape:
            tape.watch(bias)
            loss = tf.reduce_sum(sparse_attention(q, k, v, pattern, bias=bias) ** 2)
        return tape.gradient(loss, bias)

    for n, axes in ((18, (18, 18)), (29, (1, 29)), (7, (7, 1))):
        q, k, v = random_inputs(n, n)
        bias = np.random.default_rng(n).normal(size=(*shared, *axes)).astype(FLOAT)
        of_all = np.broadcast_to(bias, (2, 2, n, n))
        out, _ = dense_attention(q, k, v, pattern, bias=of_all)
        *_, gradients = dense_attention(q, k, v, pattern, bias=of_all, out_grad=2 * out)
        expected = gradients["bias"]
        expected = expected.sum(axis=tuple(range(4 - bias.ndim)))
        axes = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
        expected = expected.sum(axis=axes, keepdims=True)
        close(to_numpy(function(q, k, v, bias)), expected, f"gradient of bias {bias.shape}")


def test_xla_is_told_the_sizes_of_pieces():
    """Of a batch that is unknown in the graph: it would make each piece twice as large."""
    spec = tf.TensorSpec((None, 1024, 2, 4))
    function = tf.function(
        lambda x: sparse_attention(x, x, x, Local(16), max_score_bytes=0),
        input_signature=[spec],
        jit_compile=True,
    )
    x = tf.zeros((2, 1024, 2, 4))
    assert "while" in (text := function.experimental_get_compiler_ir(x)(stage="hlo"))
    assert "set-dimension-size" not in text


@pytest.mark.parametrize(
    "pattern", [BigBird(16, 2), Random(16, 4, 2), Neighborhood((4, 4), 1)], ids=repr
)
def test_a_length_that_was_unknown_and_is_too_long_is_refused(pattern):
    def function(x):
        return sparse_attention(x, x, x, pattern)

    signature = [tf.TensorSpec((None, None, 2, 4))]
    plain = tf.function(function, input_signature=signature)
    xla = tf.function(function, input_signature=signature, jit_compile=True)
    good, bad = (random_inputs(n, n, dtype="float32")[0] for n in (16, 17))
    expected, _ = dense_attention(good, good, good, pattern)
    np.testing.assert_allclose(plain(good), expected, atol=1e-5)
    np.testing.assert_allclose(xla(good), expected, atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="is made for lengths up to 16"):
        plain(bad)
    assert np.isnan(xla(bad)).all()  # it has no errors


@pytest.mark.parametrize("pattern", [Fixed(8), Global(2), Causal() & (Local(3) | Prefix(20))])
@pytest.mark.parametrize("given_as", ["attention_mask", "bias"])
def test_keys_beyond_the_end_are_no_pairs_of_a_mask(pattern, given_as):
    """Where the length is unknown, chosen keys may lie beyond it."""
    specs = [tf.TensorSpec((None, None, 2, size), FLOAT) for size in (4, 4, 3)]
    dtype = "bool" if given_as == "attention_mask" else FLOAT

    @tf.function(input_signature=[*specs, tf.TensorSpec((None, None, None), dtype)])
    def function(q, k, v, table):
        return sparse_attention(q, k, v, pattern, **{given_as: table})

    for n in (16, 24, 10, 3):
        q, k, v = random_inputs(n, n)
        table = np.random.default_rng(n).random((2, n, n)) < 0.7
        table = table if dtype == "bool" else np.where(table, 0.5, -np.inf).astype(FLOAT)
        expected, _ = dense_attention(q, k, v, pattern, **{given_as: table})
        close(to_numpy(function(q, k, v, table)), expected, f"n = {n}")


@pytest.mark.parametrize(
    "pattern", [Local(3), Neighborhood((6, 2), 1), Random(12, 2, 2), Atrous(3)], ids=repr
)
def test_positions_of_unknown_shape_are_as_many_as_the_queries(pattern):
    q, k, v = random_inputs(4, 12)

    @tf.function
    def function(start):
        positions = tf.range(start, start + 4)
        assert positions.shape == (None,)
        return sparse_attention(q, k, v, pattern, query_positions=positions)

    expected, _ = dense_attention(q, k, v, pattern, query_positions=3)
    close(to_numpy(function(tf.constant(3))), expected, "out")


@pytest.mark.parametrize("pattern", [Local(3), Causal() & Strided(4)], ids=repr)
def test_a_function_of_scores_may_lose_their_sizes(pattern):
    def function(scores, q_pos, k_pos, head):
        return 2 * tf.raw_ops.PlaceholderWithDefault(input=scores, shape=[None] * len(scores.shape))

    check_function = compiled(pattern, None, False, score_mod=function)
    q, k, v = random_inputs(13, 13)
    mask, out_grad = np.ones((2, 13), bool), np.ones((2, 13, 2, 3), FLOAT)
    out = check_function(q, k, v, mask, out_grad)[0]
    close(to_numpy(out), dense_attention(2 * q, k, v, pattern)[0], "out")


@pytest.mark.parametrize("xla", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize("pattern", [Causal() & Local(5), Causal() & Strided(4)], ids=repr)
def test_a_compiled_function_meets_allowed_pairs_only(pattern, xla):
    def by_root(scores, q_pos, k_pos, head):
        return scores * tf.sqrt(tf.cast(q_pos - k_pos, scores.dtype))

    check_modified(pattern, 29, xla, by_root, lambda s, q, k, h: s * np.sqrt(q - k))


class FarLogarithms(PositionBias):
    """What has a meaning only where a key is more than 140 positions before the query."""

    def bias(self, q_pos, k_pos, head):
        return tf.math.log(tf.cast(q_pos - k_pos - 140, FLOAT))


@pytest.mark.parametrize("n", [100, 200])
@pytest.mark.parametrize("xla", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize(
    "pattern", [Causal() & ~Local(140), Random(200, 8, 12) & Causal() & ~Local(140)], ids=repr
)
def test_a_compiled_bias_meets_allowed_pairs_only_where_the_first_positions_have_none(
    pattern, xla, n
):
    """At the shorter length, which is not known before, there is none at all."""
    mod = FarLogarithms()
    check_modified(pattern, n, xla, mod, lambda s, q, k, h: s + np.log(q - k - 140))


def check_modified(pattern, n, xla, mod, expected):
    """`expected` is the same of numpy as `mod`."""
    function = compiled(pattern, None, xla, score_mod=mod)
    q, k, v = random_inputs(n, n)
    mask, out_grad = random_masks(n, n)["key_mask"], np.ones((2, n, 2, 3), FLOAT)
    found = [to_numpy(x) for x in function(q, k, v, mask, out_grad)]
    options = {"key_mask": mask, "score_mod": expected}
    _, lse = dense_attention(q, k, v, pattern, **options)
    out, lse, gradients = dense_attention(
        q, k, v, pattern, out_grad=out_grad, lse_grad=np.isfinite(lse).astype(float), **options
    )
    for x, y in zip(found, [out, lse, *gradients.values()], strict=True):
        close(x, y, "compiled")


@pytest.mark.parametrize("xla", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize(
    "pattern", [Local(2**40), Blocks(2**40), ~Fixed(2**33), Neighborhood((2**40, 2), 2**33)]
)
def test_parameters_beyond_int32_at_unknown_lengths(pattern, xla):
    check(compiled(pattern, None, xla), pattern, 13)
