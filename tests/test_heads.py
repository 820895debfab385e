"""A pattern for each head: the same as each pattern alone, for its heads."""

import json

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import (
    Atrous,
    Causal,
    Full,
    Global,
    Local,
    PerHead,
    parse_pattern,
    plan,
    sparse_attention,
)
from sparse_attn.functional import attention_weights
from sparse_attn.layers import MultiHeadAttention, SelfAttention
from sparse_attn.reference import dense_attention
from tests.cases import examples, expressions, lengths
from tests.compare import FLOAT, close, outputs_and_gradients, random_inputs, random_masks, to_numpy

PATTERNS = [
    PerHead([Local(3), Atrous(4)]),
    PerHead([Local(2), Causal(), Local(2), Full()]),
    PerHead([Causal() & Global(2)]),
    Causal() & PerHead([Local(3), Atrous(2)]),
]


@pytest.mark.parametrize("max_score_bytes", [0, 2**30])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_every_head_has_its_pattern(pattern, max_score_bytes):
    check(pattern, 29, max_score_bytes)


@examples(40)
@given(expressions, expressions, lengths, st.sampled_from([0, 2**30]))
def test_random_expressions_by_head_within_segments(first, second, n, max_score_bytes):
    check(PerHead([first, second]), n, max_score_bytes)


def check(pattern, n, max_score_bytes, h=4):
    """Each head's output, lse and gradients are those of its pattern alone."""
    q, k, v = random_inputs(n, n, h=h)
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(2, h, n, n)).astype(FLOAT)
    mask = rng.random((2, h, n, n)) < 0.8
    options = {**random_masks(n, n), "segment_ids": rng.integers(0, 2, (2, n))}
    out_grad = rng.normal(size=(2, n, h, 3)).astype(FLOAT)

    def function(q, k, v, bias):
        return sparse_attention(
            q, k, v, pattern, bias=bias, attention_mask=mask, return_lse=True,
            max_score_bytes=max_score_bytes, **options,
        )  # fmt: skip

    (out, lse), gradients = outputs_and_gradients(
        function, (q, k, v, bias), (out_grad, np.zeros(lse_shape := (2, n, h), FLOAT))
    )
    assert lse.shape == lse_shape
    share = h // len(pattern.patterns)
    for number, each in enumerate(pattern.patterns):
        heads = slice(number * share, (number + 1) * share)
        expected, expected_lse, wanted = dense_attention(
            q[:, :, heads], k[:, :, heads], v[:, :, heads], each, bias=bias[:, heads],
            attention_mask=mask[:, heads], out_grad=out_grad[:, :, heads], **options,
        )  # fmt: skip
        close(out[:, :, heads], expected, "out")
        close(lse[:, :, heads], expected_lse, "lse")
        for name, gradient in zip(("query", "key", "value"), gradients, strict=False):
            close(gradient[:, :, heads], wanted[name], name)
        close(gradients[3][:, heads], wanted["bias"], "bias")


def test_a_distinct_pattern_is_planned_once(monkeypatch):
    from sparse_attn import functional

    planned, make = [], functional.plan_lengths
    monkeypatch.setattr(
        functional, "plan_lengths", lambda *args: planned.append(args[0]) or make(*args)
    )
    q, k, v = random_inputs(13, 13, h=4)
    sparse_attention(q, k, v, PerHead([Local(2), Causal(), Local(2), Causal()]))
    assert planned == [Local(2), Causal()]


def test_a_layer_has_it_and_saves_it(tmp_path):
    pattern = PerHead([Local(2), Causal(), Local(2), Atrous(3)])
    x = keras.Input((29, 8))
    y, weights = MultiHeadAttention(4, 5, pattern=pattern)(x, x, return_attention_scores=True)
    model = keras.Model(x, [y, weights])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    data = np.random.default_rng(0).normal(size=(2, 29, 8)).astype("float32")
    for a, b in zip(model(data), again(data), strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
    scores = to_numpy(model(data)[1])
    for head, each in enumerate(pattern.patterns):
        assert ((scores[:, head] > 0) == each.mask(29)).all()


def test_weights_of_each_head():
    q, k, _ = random_inputs(9, 9, h=2)
    weights = to_numpy(attention_weights(q, k, PerHead([Local(1), Causal()])))
    assert ((weights[:, 0] > 0) == Local(1).mask(9)).all()
    assert ((weights[:, 1] > 0) == Causal().mask(9)).all()


def test_no_two_groups_of_heads_drop_alike():
    x = np.ones((1, 64, 2, 4), "float32")
    out = to_numpy(
        sparse_attention(x, x, x, PerHead([Local(7), Local(8) & Local(7)]), dropout=0.5, seed=3)
    )
    assert (out[:, :, 0] != out[:, :, 1]).any()


def test_config_text_and_algebra():
    pattern = PerHead([Local(2), Causal()])
    assert PerHead.from_config(json.loads(json.dumps(pattern.get_config()))) == pattern
    assert parse_pattern("PerHead([Local(2)] * 1 + [Causal()])") == pattern
    assert parse_pattern(repr(pattern)) == pattern
    text = "Causal() & (PerHead([Local(2), Causal()]) | Local(1))"
    assert parse_pattern(text) == Causal() & (PerHead([Local(2), Causal()]) | Local(1))
    assert pattern | Global(1) == PerHead([Local(2) | Global(1), Causal() | Global(1)])
    assert ~pattern == PerHead([~Local(2), ~Causal()])
    assert pattern & pattern == PerHead([Local(2) & Local(2), Causal() & Causal()])
    assert pattern.mask(5).shape == (2, 5, 5)
    assert "Local(2)\n" in pattern.text(8, width=8)


X = np.ones((1, 6, 3, 4), "float32")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PerHead(Local(2)), TypeError, r"`patterns` must be a sequence .*Local\(2\)"),
        (lambda: PerHead([]), ValueError, r"`patterns` must be .* Received: patterns=\[\]"),
        (lambda: PerHead([Local(1), 3]), TypeError, "`patterns` must be a sequence"),
        (lambda: PerHead([PerHead([Full()])]), TypeError, "none of them a PerHead"),
        (
            lambda: sparse_attention(X, X, X, PerHead([Full(), Full()])),
            ValueError,
            "The number of heads must be a multiple of 2, .* Received: 3 heads",
        ),
        (
            lambda: PerHead([Full()] * 2) & PerHead([Full()] * 3),
            ValueError,
            "Two PerHead must have equally many patterns. Received: {2, 3}",
        ),
        (
            lambda: plan(PerHead([Full()]), 5),
            TypeError,
            r"of one head: \[plan\(p, n\) for p in pattern.patterns\] .* Received: pattern=PerHead",
        ),
        (lambda: PerHead([Full()])(1, 2), TypeError, "call one of its `patterns`"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("causal", [False, True])
def test_a_self_attention_of_heads_is_saved_causal_or_not(causal):
    layer = SelfAttention(4, 4, PerHead([Local(1), Full()]), causal=causal)
    again = SelfAttention.from_config(layer.get_config())
    assert (again.pattern, again.causal) == (layer.pattern, causal)
