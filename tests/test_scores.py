"""Scores are modified, and heads of keys shared, as in the dense form: values and gradients."""

import dataclasses

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from sparse_attn import (
    ALiBi,
    Atrous,
    Axial,
    Band,
    BigBird,
    Blocks,
    Causal,
    Full,
    Global,
    Local,
    Neighborhood,
    Pattern,
    PerHead,
    PositionBias,
    Prefix,
    Random,
    ScoreMod,
    SoftCap,
    Strided,
    sparse_attention,
    stream,
)
from sparse_attn.reference import dense_attention
from tests.cases import Diagonals, examples, expressions, lengths
from tests.compare import (
    BACKEND,
    FLOAT,
    assert_equals_oracle,
    close,
    outputs_and_gradients,
    random_inputs,
    random_masks,
    to_numpy,
)

PATTERNS = [
    Local(3),
    Causal(),
    Causal() & Strided(4),
    Causal() & (Local(2) | Prefix(2)),
    Local(2) | Global((1, 7)),
    Blocks(5),
    Neighborhood((60, 5), 1),
    BigBird(300, 4, 2),
    Diagonals(),
    PerHead([Local(2), Causal()]),
]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
kept_or_not = pytest.mark.parametrize("max_score_bytes", [2**30, 0], ids=["kept", "streamed"])


def cap(scores, q_pos, k_pos, head):
    return 2 * np.tanh(scores / 2)


def alibi(scores, q_pos, k_pos, head):
    slopes = np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    return scores - slopes[head] * np.abs(q_pos - k_pos)


def own(scores, q_pos, k_pos, head):
    """Of a user: it matters where, and in which head, and how large a score is."""
    return scores * (1 + 0.1 * head) + 0.01 * q_pos * scores**2 - 0.02 * k_pos


def on_tensors(function):
    """The same of tensors: numpy's functions are those of `keras.ops`."""

    def mod(scores, q_pos, k_pos, head):
        if function is cap:
            return 2 * ops.tanh(scores / 2)
        q_pos, k_pos, head = (ops.cast(x, scores.dtype) for x in (q_pos, k_pos, head))
        return function(scores, q_pos, k_pos, head)

    return mod


MODS = {
    "alibi": (ALiBi(4), alibi),
    "cap": (SoftCap(2.0), cap),
    "both": ([SoftCap(2.0), ALiBi(4)], lambda s, q, k, h: alibi(cap(s, q, k, h), q, k, h)),
    "other order": ([ALiBi(4), SoftCap(2)], lambda s, q, k, h: cap(alibi(s, q, k, h), q, k, h)),
    "own": (on_tensors(own), own),
}
every_mod = pytest.mark.parametrize(("mod", "expected"), MODS.values(), ids=MODS)


@kept_or_not
@every_mod
@every_pattern
def test_modified_scores_equal_oracle(pattern, mod, expected, max_score_bytes):
    options = {"score_mod": mod, "oracle": {"score_mod": expected}, "h": 4}
    options |= random_masks(29, 29)
    assert_equals_oracle(pattern, 29, 29, max_score_bytes=max_score_bytes, **options)


def test_scores_that_xla_works_out_anew_have_gradients_by_their_log_sum_exp():
    # Of a largest score that equals none of the scores any more, the gradient was 0 / 0.
    options = {"score_mod": on_tensors(own), "oracle": {"score_mod": own}, "h": 4}
    assert_equals_oracle(Blocks(5), 29, 29, **options, **random_masks(29, 29))


@pytest.mark.parametrize("g", [1, 2])
@kept_or_not
@every_pattern
def test_shared_keys_equal_oracle(pattern, max_score_bytes, g):
    options = {"h": 4, "g": g, **random_masks(29, 29)}
    assert_equals_oracle(pattern, 29, 29, max_score_bytes=max_score_bytes, **options)


@pytest.mark.parametrize("positions", [None, 5])
@kept_or_not
@every_pattern
def test_everything_at_once(pattern, max_score_bytes, positions):
    n, m, h, g = (13, 29, 4, 2) if positions is None else (3, 29, 4, 2)
    rng = np.random.default_rng(1)
    if isinstance(pattern, Neighborhood):
        m = 20
    options = {
        "segment_ids": (rng.integers(0, 2, (2, n)), rng.integers(0, 2, (2, m))),
        "attention_mask": rng.random((2, h, n, m)) < 0.8,
        "bias": rng.normal(size=(1, h, n, m)),
        "score_mod": MODS["both"][0],
        "oracle": {"score_mod": MODS["both"][1]},
        "query_positions": positions,
        "max_score_bytes": max_score_bytes,
        **random_masks(n, m),
    }
    assert_equals_oracle(pattern, n, m, h=h, g=g, **options)


@examples(25)
@given(expressions, expressions, lengths, st.sampled_from([1, 2, 4]), st.sampled_from([0, 2**30]))
def test_any_expression_with_shared_keys_and_modified_scores(a, b, n, g, max_score_bytes):
    options = {"score_mod": MODS["both"][0], "oracle": {"score_mod": MODS["both"][1]}}
    options |= {"h": 4, "g": g, **random_masks(n, n)}
    for pattern in (a, PerHead([a, b])):
        assert_equals_oracle(pattern, n, n, max_score_bytes=max_score_bytes, **options)


@dataclasses.dataclass
class Distances(PositionBias):
    """A bias for each head and distance, taken from a table."""

    table: object
    by_distance = True

    @property
    def tensors(self):
        return (self.table,)

    def bias(self, q_pos, k_pos, head, table):
        place = ops.clip(k_pos - q_pos, -4, 4) + 4
        return ops.take(ops.reshape(table, (-1,)), head * 9 + place)


@dataclasses.dataclass
class Temperature(ScoreMod):
    """A factor for each head."""

    factors: object

    @property
    def tensors(self):
        return (self.factors,)

    def modify(self, scores, q_pos, k_pos, head, factors):
        return scores * ops.take(factors, head)


def dense_bias(table, n, m):
    distance = np.clip(np.arange(m) - np.arange(n)[:, None], -4, 4) + 4
    return table[:, distance], distance


def by_each_score(q, k, v, pattern, bias, out_grad, masks):
    """The gradient by the bias of each row of the batch by itself."""
    bias = np.broadcast_to(bias, (len(q), *bias.shape))
    options = {"bias": bias, "out_grad": out_grad, **masks}
    return dense_attention(q, k, v, pattern, **options)[2]["bias"]


@kept_or_not
@every_pattern
@pytest.mark.parametrize("given_as", ["bias", "mod", "function"])
def test_gradients_of_what_is_trained(given_as, pattern, max_score_bytes):
    """A table of biases: of a `PositionBias`, within a longer chain, or of a plain function."""
    n, h = 29, 4
    q, k, v = random_inputs(n, n, h=h, g=2)
    rng = np.random.default_rng(3)
    table, factors = rng.normal(size=(h, 9)).astype(FLOAT), np.ones(h, FLOAT)
    out_grad = rng.normal(size=(2, n, h, 3)).astype(FLOAT)
    masks = random_masks(n, n)

    def function(q, k, v, table, factors):
        mod = {
            "bias": Distances(table),
            "mod": [Temperature(factors), Distances(table)],
            "function": lambda s, *where: Distances(table).modify(s, *where, table),
        }[given_as]
        options = {"max_score_bytes": max_score_bytes, **masks}
        return [sparse_attention(q, k, v, pattern, score_mod=mod, **options)]

    (out,), found = outputs_and_gradients(function, [q, k, v, table, factors], [out_grad])
    bias, distance = dense_bias(table, n, n)
    expected, _, gradients = dense_attention(
        q, k, v, pattern, bias=bias[None], out_grad=out_grad, **masks
    )
    close(out, expected, "out")
    for name, gradient in zip(("query", "key", "value"), found, strict=False):
        close(gradient, gradients[name], name)
    by_table = np.zeros_like(table)
    for head in range(h):
        np.add.at(by_table[head], distance, gradients["bias"][0, head])
    close(found[3], by_table, "table")
    if given_as == "mod":  # a factor of 1: its gradient is that of the bias by the scores
        scores = np.einsum("bihd,bjhd->bhij", q, np.repeat(k, 2, axis=2)) / 2
        valid = masks["query_mask"][:, None, :, None] & masks["key_mask"][:, None, None, :]
        by_score = by_each_score(q, k, v, pattern, bias, out_grad, masks)
        close(found[4], np.where(valid, by_score * scores, 0).sum(axis=(0, 2, 3)), "factors")


def test_a_function_may_forbid_pairs():
    q, k, v = random_inputs(13, 13, h=2)

    def function(scores, q_pos, k_pos, head):
        return ops.where((k_pos + head) % 3 == 0, scores, -float("inf"))

    allowed = (np.arange(13)[None, None, :] + np.arange(2)[:, None, None]) % 3 == 0
    mask = np.broadcast_to(allowed, (1, 2, 13, 13))
    for return_lse in (False, True):
        found = sparse_attention(q, k, v, Local(0), score_mod=function, return_lse=return_lse)
        expected = sparse_attention(q, k, v, Local(0), attention_mask=mask, return_lse=return_lse)
        for x, y in zip(found, expected, strict=True) if return_lse else [(found, expected)]:
            np.testing.assert_allclose(x, y, atol=1e-5)


# ---- Pairs that are not allowed -------------------------------------------------


def less_log(scores, q_pos, k_pos, head, ops=np):
    return scores - ops.log(1 + q_pos - k_pos)


def quotient(scores, q_pos, k_pos, head, ops=np):
    return scores / (1 + q_pos - k_pos)


def by_root(scores, q_pos, k_pos, head, ops=np):
    return scores * ops.sqrt(q_pos - k_pos)


def of_tensors(function):
    """The same of tensors, where an int has no logarithm."""

    def mod(scores, q_pos, k_pos, head):
        q_pos, k_pos = (ops.cast(x, scores.dtype) for x in (q_pos, k_pos))
        return function(scores, q_pos, k_pos, head, ops)

    return mod


class Modifies(ScoreMod):
    """A function as a `ScoreMod`: its scores need not be kept."""

    def __init__(self, function):
        self.function = function

    def modify(self, scores, q_pos, k_pos, head):
        return self.function(scores, q_pos, k_pos, head)


@pytest.mark.parametrize("as_mod", [lambda x: x, Modifies, lambda x: [SoftCap(9.0), Modifies(x)]])
@pytest.mark.parametrize("function", [less_log, quotient, by_root])
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "Causal() &" in repr(p)] + [Causal()])
@kept_or_not
def test_a_function_meets_allowed_pairs_only(pattern, function, as_mod, max_score_bytes):
    """Ahead of a query these are NaN or infinite, and so are their derivatives."""
    mod = as_mod(of_tensors(function))

    def expected(scores, *where):
        scores = 9 * np.tanh(scores / 9) if isinstance(mod, list) else scores
        return function(scores, *where)

    for masks in (random_masks(29, 29), {"key_mask": np.arange(29) < np.array([[20], [0]])}):
        options = {"score_mod": mod, "oracle": {"score_mod": expected}, **masks}
        assert_equals_oracle(pattern, 29, 29, max_score_bytes=max_score_bytes, **options)


@dataclasses.dataclass
class Trained(PositionBias):
    """A bias with a trained factor."""

    factors: object

    @property
    def tensors(self):
        return (self.factors,)


class Logarithms(Trained):
    """A trained factor of the logarithm of the distance: a query may not attend to itself."""

    def bias(self, q_pos, k_pos, head, factors):
        return factors[0] * ops.log(ops.cast(q_pos - k_pos, factors.dtype))


@pytest.mark.parametrize("as_mod", [lambda x: x, lambda x: [Modifies(lambda s, *_: s), x]])
@pytest.mark.parametrize(
    "pattern", [Band(None, -1), Band(5, -1), Band(None, -1) & Strided(4)], ids=repr
)
@kept_or_not
def test_a_trained_bias_meets_allowed_pairs_only(pattern, as_mod, max_score_bytes):
    n = 29
    q, k, v = random_inputs(n, n)
    out_grad = np.random.default_rng(3).normal(size=(2, n, 2, 3)).astype(FLOAT)
    key_mask = np.arange(n) < np.array([[20], [0]])  # nothing at all in one sequence

    def function(q, k, v, factors):
        mod = as_mod(Logarithms(factors))
        options = {"key_mask": key_mask, "max_score_bytes": max_score_bytes}
        return [sparse_attention(q, k, v, pattern, score_mod=mod, **options)]

    (out,), found = outputs_and_gradients(function, [q, k, v, np.ones(1, FLOAT)], [out_grad])
    logs = np.log(np.maximum(np.arange(n)[:, None] - np.arange(n), 1))
    options = {"bias": logs[None, None], "key_mask": key_mask, "out_grad": out_grad}
    expected, _, gradients = dense_attention(q, k, v, pattern, **options)
    close(out, expected, "out")
    for name, gradient in zip(("query", "key", "value"), found, strict=False):
        close(gradient, gradients[name], name)
    close(found[3], [(gradients["bias"] * logs).sum()], "factors")


class Powers(Trained):
    """A trained factor of `1 / |q - k|`, that is infinite where a query attends to itself."""

    def bias(self, q_pos, k_pos, head, factors):
        return factors[0] / ops.cast(ops.abs(q_pos - k_pos), factors.dtype)


class Times(ScoreMod):
    """Scores times what a `PositionBias` would add."""

    def __init__(self, bias):
        self.bias, self.tensors = bias, bias.tensors

    def modify(self, scores, *where):
        return scores * self.bias.bias(*where)


def by_factor(q, k, v, pattern, times_scores, masks, out_grad):
    """What `Powers` of a factor of 1, or `Times` it, should give: `out` and all gradients."""
    pairs = (len(q), q.shape[2], q.shape[1], k.shape[1])
    first = masks.get("query_positions", 0)
    rows = first + np.arange(pairs[2]) if np.ndim(first) == 0 else np.asarray(first)
    far = 1 / np.maximum(np.abs(rows[:, None] - np.arange(pairs[3])), 1)
    mod, bias = (lambda s, q, k, h: s / np.abs(q - k)), np.zeros(pairs)
    if not times_scores:
        mod, bias = None, np.broadcast_to(far, pairs)
    options = {**masks, "score_mod": mod, "bias": bias, "out_grad": out_grad}
    out, _, found = dense_attention(q, k, v, pattern, **options)
    scores = np.einsum("bihd,bjhd->bhij", q, k) / 2 if times_scores else 1
    by_table = (found["bias"] * far * scores).sum()
    return out, [found["query"], found["key"], found["value"], [by_table]]


def check_factor(pattern, n, m, given_as, max_score_bytes, **masks):
    """A pattern under which no query may attend to itself, by all values and gradients."""
    q, k, v = random_inputs(n, m)
    out_grad = np.random.default_rng(3).normal(size=(2, n, 2, 3)).astype(FLOAT)

    def function(q, k, v, factors):
        mod = {
            "bias": Powers(factors),
            "mod": Times(Powers(factors)),
            "chain": [Modifies(lambda s, *_: s), Powers(factors)],
            "function": lambda s, *where: Times(Powers(factors)).modify(s, *where, factors),
        }[given_as]
        options = {"max_score_bytes": max_score_bytes, **masks}
        return [sparse_attention(q, k, v, pattern, score_mod=mod, **options)]

    (out,), found = outputs_and_gradients(function, [q, k, v, np.ones(1, FLOAT)], [out_grad])
    times_scores = given_as in ("mod", "function")
    expected, gradients = by_factor(q, k, v, pattern, times_scores, masks, out_grad)
    close(out, expected, "out")
    for name, x, y in zip(("query", "key", "value", "factors"), found, gradients, strict=True):
        close(x, y, f"gradient by {name}")


@keras.saving.register_keras_serializable(package="tests")
class Before(Pattern):
    """Of a user: nothing is known of it but the predicate, which allows nothing at first."""

    def __call__(self, q_pos, k_pos):
        return q_pos - k_pos > 140


FAR = [  # nothing among the first 128 positions
    Causal() & ~Local(140),
    Band(left=-141),
    (Causal() & ~Local(130)) & Global((5, 190)),
    Atrous(3) & Causal() & ~Local(150),
    Random(200, 8, 12) & ~Local(140),
    Axial((20, 10)) & Causal() & ~Local(150),
    Before(),
    PerHead([Causal() & ~Local(140), Band(None, -1)]),
]
each_way = pytest.mark.parametrize("given_as", ["bias", "mod", "chain", "function"])


@each_way
@pytest.mark.parametrize("pattern", FAR, ids=repr)
@kept_or_not
def test_a_pattern_may_allow_nothing_among_the_first_positions(
    pattern, given_as, max_score_bytes, monkeypatch
):
    monkeypatch.setattr(stream, "PIECE_BYTES", 2**15)  # some pieces have no pair
    key_mask = np.arange(200) < np.array([[190], [0]])  # nothing at all in one sequence
    check_factor(pattern, 200, 200, given_as, max_score_bytes, key_mask=key_mask)


@each_way
@pytest.mark.parametrize("positions", [0, 195, np.array([3, 150, 7, 199])], ids=str)
@pytest.mark.parametrize("pattern", [FAR[0], FAR[-1]], ids=repr)
def test_queries_at_other_positions_meet_allowed_pairs_only(pattern, positions, given_as):
    """At the first of them nothing is allowed at all."""
    n = np.size(positions) if np.ndim(positions) else 4
    check_factor(pattern, n, 200, given_as, 2**30, query_positions=positions)


@each_way
@kept_or_not
def test_pairs_that_masks_forbid_are_met_by_nothing(given_as, max_score_bytes):
    """The pattern allows every pair: what may be evaluated, the masks alone say."""
    n = 29
    masks = {
        "attention_mask": np.broadcast_to(np.tri(n, k=-1, dtype=bool), (2, 1, n, n)),
        "key_mask": np.arange(n) < np.array([[20], [0]]),  # nothing at all in one sequence
    }
    check_factor(Full(), n, n, given_as, max_score_bytes, **masks)


@pytest.mark.parametrize("given_as", ["bias", "mod", "chain"])
@kept_or_not
def test_nothing_is_met_where_no_pair_is_allowed(given_as, max_score_bytes):
    masks = {"attention_mask": np.zeros((2, 1, 29, 29), bool)}
    check_factor(Full(), 29, 29, given_as, max_score_bytes, **masks)


class Directions(Trained):
    """A trained factor of logarithms: of keys before a query in head 0, after it in head 1."""

    def bias(self, q_pos, k_pos, head, factors):
        ahead = ops.where(head == 0, q_pos - k_pos, k_pos - q_pos)
        return factors[0] * ops.log(ops.cast(ahead, factors.dtype))


@pytest.mark.parametrize("as_bias", [True, False])
@kept_or_not
def test_a_head_meets_its_own_allowed_pairs_only(as_bias, max_score_bytes):
    n = 29
    q, k, v = random_inputs(n, n)
    out_grad = np.random.default_rng(3).normal(size=(2, n, 2, 3)).astype(FLOAT)
    before = np.tri(n, k=-1, dtype=bool)
    mask = np.stack([before, before.T])[None]

    def function(q, k, v, factors):
        mod = Directions(factors) if as_bias else Times(Directions(factors))
        options = {"score_mod": mod, "max_score_bytes": max_score_bytes}
        return [sparse_attention(q, k, v, Full(), attention_mask=mask, **options)]

    (out,), found = outputs_and_gradients(function, [q, k, v, np.ones(1, FLOAT)], [out_grad])
    logs = np.log(np.maximum(np.abs(np.arange(n)[:, None] - np.arange(n)), 1))
    scores = 1 if as_bias else np.einsum("bihd,bjhd->bhij", q, k) / 2
    options = {"attention_mask": mask, "out_grad": out_grad}
    bias = np.broadcast_to(logs, (2, 2, n, n))
    if not as_bias:
        bias, options["score_mod"] = 0 * bias, lambda s, q, k, h: s * np.log(np.abs(q - k))
    expected, _, gradients = dense_attention(q, k, v, Full(), bias=bias, **options)
    close(out, expected, "out")
    for name, gradient in zip(("query", "key", "value"), found, strict=False):
        close(gradient, gradients[name], name)
    close(found[3], [(gradients["bias"] * logs * scores).sum()], "factors")


def forbid(scores, q_pos, k_pos, head):
    return ops.where((q_pos + k_pos) % 2 == 1, scores, -float("inf"))


@pytest.mark.parametrize("pattern", [Local(3), Causal() & Strided(4), Blocks(5)], ids=repr)
@pytest.mark.parametrize("first", [forbid, Modifies(forbid)], ids=["function", "mod"])
@kept_or_not
def test_what_a_modification_forbids_stays_forbidden(pattern, first, max_score_bytes):
    n, h = 29, 2
    q, k, v = random_inputs(n, n)
    out_grad = np.random.default_rng(3).normal(size=(2, n, h, 3)).astype(FLOAT)
    odd = (np.arange(n)[:, None] + np.arange(n)) % 2 == 1

    def function(q, k, v, factors, mask=None, first=()):
        mods = [*first, SoftCap(2.0), Temperature(factors), ALiBi(h)]
        options = {"attention_mask": mask, "max_score_bytes": max_score_bytes}
        out, lse = sparse_attention(q, k, v, pattern, score_mod=mods, return_lse=True, **options)
        return [out, ops.where(lse > -1e29, lse, ops.zeros_like(lse))]

    inputs = [q, k, v, np.ones(h, FLOAT)]
    cotangents = [out_grad, out_grad[..., 0]]
    found, gradients = outputs_and_gradients(
        lambda *x: function(*x, first=[first]), inputs, cotangents
    )
    expected, expected_gradients = outputs_and_gradients(
        lambda *x: function(*x, mask=odd), inputs, cotangents
    )
    for x, y in zip(found + gradients, expected + expected_gradients, strict=True):
        close(x, y, "what is forbidden by a mask")


@dataclasses.dataclass
class Steps(PositionBias):
    """A bias for each distance, whose table is read as it is."""

    table: object

    @property
    def tensors(self):
        return (self.table,)

    def bias(self, q_pos, k_pos, head, table):
        return ops.take(table, ops.clip(k_pos - q_pos, -4, 4) + 4, axis=0)


@dataclasses.dataclass
class Factors(Steps, ScoreMod):
    """A factor for each distance."""

    def modify(self, scores, q_pos, k_pos, head, table):
        return scores + self.bias(q_pos, k_pos, head, table)


@pytest.mark.parametrize("piece", [2**24, 2**12], ids=["one", "several"])
@pytest.mark.parametrize("given_as", ["bias", "mod", "chain", "function"])
@kept_or_not
def test_the_gradient_of_a_table_that_is_read_is_a_tensor(
    given_as, max_score_bytes, piece, monkeypatch
):
    monkeypatch.setattr(stream, "PIECE_BYTES", piece)
    n = 50
    q, k, v = random_inputs(n, n)
    out_grad = np.random.default_rng(3).normal(size=(2, n, 2, 3)).astype(FLOAT)

    def function(q, k, v, table):
        mod = {
            "bias": Steps(table),
            "mod": Factors(table),
            "chain": [SoftCap(1e4), Steps(table)],
            "function": lambda s, *where: s + Steps(table).bias(*where, table),
        }[given_as]
        options = {"score_mod": mod, "max_score_bytes": max_score_bytes}
        return [sparse_attention(q, k, v, Causal() & Strided(4), **options)]

    table = np.random.default_rng(4).normal(size=9).astype(FLOAT)
    _, found = outputs_and_gradients(function, [q, k, v, table], [out_grad])
    bias, distance = dense_bias(table[None], n, n)
    options = {"bias": bias[None], "out_grad": out_grad}
    gradients = dense_attention(q, k, v, Causal() & Strided(4), **options)[2]
    by_table = np.zeros_like(table)
    np.add.at(by_table, distance, gradients["bias"][0, 0])
    np.testing.assert_allclose(found[3], by_table, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="others return zeros for what is not linked")
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("given_as", ["bias", "mod", "function", "table of pairs"])
def test_what_is_trained_is_linked_to_where_its_gradient_is_0(given_as, m):
    """With one key the weights are 1; where no pair is allowed, nothing is computed."""
    import torch

    pattern = Full() if m == 1 else Causal() & ~Causal()
    q, k, v = (torch.tensor(x) for x in random_inputs(5, m))
    trained = torch.ones((2, 5, m) if given_as == "table of pairs" else 9, requires_grad=True)
    options = {
        "bias": {"score_mod": Steps(trained)},
        "mod": {"score_mod": Factors(trained)},
        "function": {"score_mod": lambda s, *where: s + Steps(trained).bias(*where, trained)},
        "table of pairs": {"bias": trained},
    }[given_as]
    out = sparse_attention(q, k, v, pattern, **options)
    assert out.requires_grad
    (gradient,) = torch.autograd.grad(out.sum(), trained)
    assert (gradient == 0).all()


@every_pattern
def test_nan_is_seen(pattern):
    """What is not a number is somebody's fault: no mask takes it for one of its own."""
    q, k, v = random_inputs(29, 29)
    bias = np.zeros((29, 29), "float32")
    bias[12] = np.nan
    assert np.isnan(to_numpy(sparse_attention(q, k, v, pattern, bias=bias))[:, 12]).all()
    q[0, 11] = np.nan
    assert np.isnan(to_numpy(sparse_attention(q, k, v, pattern))[0, 11]).all()


BAD = [
    (lambda: call(score_mod=3), TypeError, "`score_mod` must be a ScoreMod, a function"),
    (lambda: call(score_mod=[cap, "x"]), TypeError, "`score_mod` must be .* Received: score_mod="),
    (
        lambda: call(score_mod=lambda scores: scores),
        TypeError,
        r"`score_mod` must be .* a function \(scores, q_pos, k_pos, head\)",
    ),
    (lambda: call(score_mod=ALiBi), TypeError, "`score_mod` must be a ScoreMod"),
    (
        lambda: call(score_mod=ALiBi(4)),
        ValueError,
        r"`score_mod` must be made for 2 heads. Received: score_mod=ALiBi\(num_heads=4\)",
    ),
    (
        lambda: call(score_mod=lambda s, *_: s[..., :1]),
        ValueError,
        "`score_mod` must give a tensor of the shape of the scores",
    ),
    (lambda: call(score_mod=lambda s, *_: None), ValueError, "`score_mod` must .* Received: None"),
    (lambda: ALiBi(0), ValueError, "`num_heads` must be a positive int. Received: num_heads=0"),
    (lambda: ALiBi(2.0), TypeError, "`num_heads` must be a positive int. Received: num_heads=2.0"),
    (lambda: SoftCap(0), ValueError, "`cap` must be a positive number. Received: cap=0"),
    (lambda: SoftCap("1"), TypeError, "`cap` must be a positive number. Received: cap='1'"),
    (lambda: SoftCap(float("nan")), ValueError, "`cap` must be a positive number"),
    (
        lambda: sparse_attention(*random_inputs(5, 5, h=4, g=3), Local(1)),
        ValueError,
        r"`key` must have shape \(2, any, 1 or 2 or 4, 4\). Received: key.shape=\(2, 5, 3, 4\)",
    ),
]


def call(**options):
    return sparse_attention(*random_inputs(7, 7), Local(1), **options)


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("num_heads", [1, 2, 8, 12])
def test_slopes_fall_from_head_to_head(num_heads):
    slopes = ALiBi(num_heads).slopes
    lower = 2 ** int(np.log2(num_heads))
    np.testing.assert_allclose(slopes[:lower], 2.0 ** (-8 * np.arange(1, lower + 1) / lower))
    np.testing.assert_allclose(
        slopes[lower:],
        (2.0 ** (-4 * np.arange(1, 2 * lower + 1) / lower))[::2][: num_heads - lower],
    )


def test_saved_by_their_fields():
    for mod in (ALiBi(8), SoftCap(30)):
        config = keras.saving.serialize_keras_object(mod)
        assert keras.saving.deserialize_keras_object(config) == mod
