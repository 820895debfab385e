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
    BigBird,
    Blocks,
    Causal,
    Global,
    Local,
    Neighborhood,
    PerHead,
    PositionBias,
    Prefix,
    ScoreMod,
    SoftCap,
    Strided,
    sparse_attention,
)
from sparse_attn.reference import dense_attention
from tests.cases import Diagonals, examples, expressions, lengths
from tests.compare import (
    FLOAT,
    assert_equals_oracle,
    close,
    outputs_and_gradients,
    random_inputs,
    random_masks,
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
