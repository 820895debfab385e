"""Patterns: their meaning, their algebra, and how they are named, compared and saved."""

import dataclasses
import inspect
import json
import subprocess
import sys
import zlib

import keras
import numpy as np
import pytest
from hypothesis import given

import sparse_attn
import sparse_attn.expressions as expressions_module
from sparse_attn import (
    Atrous,
    Axial,
    Band,
    BigBird,
    Blocks,
    Causal,
    Dilated,
    Fixed,
    Full,
    Global,
    Grid,
    Local,
    Longformer,
    Neighborhood,
    Pattern,
    PerHead,
    Prefix,
    PrefixLM,
    Random,
    SparseTransformer,
    StreamingLLM,
    Strided,
    parse_pattern,
    pictures,
)
from sparse_attn.patterns import And, Not, Or, look_up
from tests.cases import EACH_CLASS, EXPRESSIONS, LEAVES, Diagonals, Near, examples, expressions

DRAWN_BLOCKS = [[3, 5], [1, 4], [2, 4], [1, 4], [1, 3], [1, 2]]

DRAWN = {
    Full(): """
        1 1 1 1 1 1
        1 1 1 1 1 1
        1 1 1 1 1 1
        1 1 1 1 1 1
        1 1 1 1 1 1
        1 1 1 1 1 1""",
    Causal(): """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 1 1 1 0
        1 1 1 1 1 1""",
    Local(1): """
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 1 1 1 0 0
        0 0 1 1 1 0
        0 0 0 1 1 1
        0 0 0 0 1 1""",
    Local((2, 0)): """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 1 1 1 0 0
        0 0 1 1 1 0
        0 0 0 1 1 1""",
    Local((None, 1)): """
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 1 1 1 0
        1 1 1 1 1 1
        1 1 1 1 1 1""",
    Atrous(3): """
        1 0 0 1 0 0
        0 1 0 0 1 0
        0 0 1 0 0 1
        1 0 0 1 0 0
        0 1 0 0 1 0
        0 0 1 0 0 1""",
    Strided(3): """
        1 1 1 1 0 0
        1 1 1 1 1 0
        1 1 1 1 1 1
        1 1 1 1 1 1
        0 1 1 1 1 1
        0 0 1 1 1 1""",
    Strided(2): """
        1 1 1 0 1 0
        1 1 1 1 0 1
        1 1 1 1 1 0
        0 1 1 1 1 1
        1 0 1 1 1 1
        0 1 0 1 1 1""",
    Dilated(1, 2): """
        1 0 1 0 0 0
        0 1 0 1 0 0
        1 0 1 0 1 0
        0 1 0 1 0 1
        0 0 1 0 1 0
        0 0 0 1 0 1""",
    Blocks(4): """
        1 1 1 1 0 0
        1 1 1 1 0 0
        1 1 1 1 0 0
        1 1 1 1 0 0
        0 0 0 0 1 1
        0 0 0 0 1 1""",
    Prefix(2): """
        1 1 0 0 0 0
        1 1 0 0 0 0
        1 1 0 0 0 0
        1 1 0 0 0 0
        1 1 0 0 0 0
        1 1 0 0 0 0""",
    Band(-1, 2): """
        0 1 1 0 0 0
        0 0 1 1 0 0
        0 0 0 1 1 0
        0 0 0 0 1 1
        0 0 0 0 0 1
        0 0 0 0 0 0""",
    Blocks(2, reach=1): """
        1 1 1 1 0 0
        1 1 1 1 0 0
        1 1 1 1 1 1
        1 1 1 1 1 1
        0 0 1 1 1 1
        0 0 1 1 1 1""",
    Fixed(3): """
        1 1 1 0 0 1
        1 1 1 0 0 1
        1 1 1 0 0 1
        0 0 1 1 1 1
        0 0 1 1 1 1
        0 0 1 1 1 1""",
    Fixed(3, 2): """
        1 1 1 0 1 1
        1 1 1 0 1 1
        1 1 1 0 1 1
        0 1 1 1 1 1
        0 1 1 1 1 1
        0 1 1 1 1 1""",
    SparseTransformer(3, "fixed"): """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 0 1 1 0 0
        0 0 1 1 1 0
        0 0 1 1 1 1""",
    SparseTransformer(3): """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        0 1 1 1 1 0
        0 0 1 1 1 1""",
    Global(1): """
        1 1 1 1 1 1
        1 0 0 0 0 0
        1 0 0 0 0 0
        1 0 0 0 0 0
        1 0 0 0 0 0
        1 0 0 0 0 0""",
    Longformer(1, (4,)): """
        1 1 0 0 1 0
        1 1 1 0 1 0
        0 1 1 1 1 0
        0 0 1 1 1 0
        1 1 1 1 1 1
        0 0 0 0 1 1""",
    StreamingLLM(1, sinks=2): """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 0 1 1 0
        1 1 0 0 1 1""",
    PrefixLM(3): """
        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 1 1 1 0
        1 1 1 1 1 1""",
    # Rows of the grid: 0 1 2 and 3 4 5.
    Neighborhood((2, 3), 1): """
        1 1 0 1 1 0
        1 1 1 1 1 1
        0 1 1 0 1 1
        1 1 0 1 1 0
        1 1 1 1 1 1
        0 1 1 0 1 1""",
    Neighborhood((2, 3), (0, 1), (1, 2)): """
        1 0 1 0 0 0
        0 1 0 0 0 0
        1 0 1 0 0 0
        0 0 0 1 0 1
        0 0 0 0 1 0
        0 0 0 1 0 1""",
    Axial((2, 3)): """
        1 1 1 1 0 0
        1 1 1 0 1 0
        1 1 1 0 0 1
        1 0 0 1 1 1
        0 1 0 1 1 1
        0 0 1 1 1 1""",
    # A grid of 1 x 2 x 3: along the second axis 0 3, 1 4, 2 5, along the third 0 1 2, 3 4 5.
    Axial((1, 2, 3)): """
        1 1 1 1 0 0
        1 1 1 0 1 0
        1 1 1 0 0 1
        1 0 0 1 1 1
        0 1 0 1 1 1
        0 0 1 1 1 1""",
    Grid((3,), (Band(0, 0), Band(None, 0))): """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        0 0 0 1 0 0
        0 0 0 1 1 0
        0 0 0 1 1 1""",
    Causal() & (Local(1) | Prefix(1)): """
        1 0 0 0 0 0
        1 1 0 0 0 0
        1 1 1 0 0 0
        1 0 1 1 0 0
        1 0 0 1 1 0
        1 0 0 0 1 1""",
    ~Local((None, 0)): """
        0 1 1 1 1 1
        0 0 1 1 1 1
        0 0 0 1 1 1
        0 0 0 0 1 1
        0 0 0 0 0 1
        0 0 0 0 0 0""",
}


def drawn(picture):
    return np.array([line.split() for line in picture.split("\n")[1:]]).astype(int).astype(bool)


@pytest.mark.parametrize("pattern", DRAWN, ids=repr)
def test_pattern_looks_as_drawn(pattern):
    mask = pattern.mask(6)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, drawn(DRAWN[pattern]))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 2), (2, 2, 2, 3)])
def test_neighborhood_by_definition(shape):
    points = np.array(list(np.ndindex(*shape)))
    for window, dilation in [(0, 1), (1, 1), (2, 1), (1, 2)]:
        distance = np.abs(points[:, None] - points[None, :])
        near = (distance <= window * dilation) & (distance % dilation == 0)
        pattern = Neighborhood(shape, window, dilation)
        np.testing.assert_array_equal(pattern.mask(len(points)), near.all(axis=-1))
    same = points[:, None] == points[None, :]
    expected = same.sum(axis=-1) >= len(shape) - 1
    np.testing.assert_array_equal(Axial(shape).mask(len(points)), expected)


def test_a_wide_neighborhood_is_full_and_a_flat_one_is_local():
    assert Neighborhood((4, 6), 6).mask(24).all()
    assert Neighborhood((3, 2, 4), (3, 2, 4)).mask(24).all()
    np.testing.assert_array_equal(Neighborhood((30,), 4).mask(30), Local(4).mask(30))
    np.testing.assert_array_equal(Neighborhood((30,), 2, 3).mask(30), Dilated(2, 3).mask(30))


@pytest.mark.parametrize("seed", range(3))
def test_bigbird_has_the_stated_number_of_random_blocks_in_each_row(seed):
    n, size, drawn = 24 * 5, 5, 3
    pattern = BigBird(n, size, drawn, seed)
    blocks = pattern.mask(n).reshape(24, size, 24, size)
    np.testing.assert_array_equal(blocks.any(axis=(1, 3)), blocks.all(axis=(1, 3)))
    blocks = blocks.any(axis=(1, 3))
    ends = [0, 23]
    assert blocks[ends].all()
    assert blocks[:, ends].all()
    near = Local(1).mask(24)
    assert blocks[near].all()
    random = blocks & ~near
    random[:, ends] = False
    np.testing.assert_array_equal(random[1:-1].sum(axis=1), np.full(22, drawn))
    assert not np.array_equal(pattern.mask(n), BigBird(n, size, drawn, seed + 1).mask(n))


def test_random_draws_as_many_as_there_are():
    pattern = Random(20, 4, num_blocks=3, skip=Local(1))
    counts = pattern.mask(20)[::4, ::4].sum(axis=1)
    assert counts.tolist() == [3, 2, 2, 2, 3]
    assert Random(20, 4, num_blocks=9).mask(20).all()
    assert not Random(20, 4, num_blocks=0).mask(20).any()


def test_random_blocks_are_the_same_in_another_process():
    pattern = BigBird(400, 8, 3, seed=5)
    code = f"""if True:
        import zlib
        from sparse_attn import BigBird
        print(zlib.crc32({pattern!r}.mask(400).tobytes()))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert int(done.stdout) == zlib.crc32(pattern.mask(400).tobytes())
    # And in every version: these were drawn when the pattern was written.
    drawn = [row[row >= 0].tolist() for row in Random(60, 10, 2, seed=1).lists]
    assert drawn == DRAWN_BLOCKS


def test_look_up_is_a_table_at_arrays_and_tensors():
    table = np.array([[1, 2], [3, 4], [5, 6]])
    index = np.array([[0, 2], [1, 9]])
    expected = [[[1, 2], [5, 6]], [[3, 4], [5, 6]]]
    assert look_up(table, index).tolist() == expected
    found = look_up(table, keras.ops.convert_to_tensor(index))
    assert keras.ops.convert_to_numpy(found).tolist() == expected


@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_mask_of_unequal_lengths_is_a_corner_of_a_larger_one(pattern):
    large = pattern.mask(12)
    np.testing.assert_array_equal(pattern.mask(5, 12), large[:5])
    np.testing.assert_array_equal(pattern.mask(12, 7), large[:, :7])


@given(expressions, expressions)
@examples(100)
def test_algebra_is_that_of_sets(a, b):
    n = 9
    np.testing.assert_array_equal((a & b).mask(n), a.mask(n) & b.mask(n))
    np.testing.assert_array_equal((a | b).mask(n), a.mask(n) | b.mask(n))
    np.testing.assert_array_equal((~a).mask(n), ~a.mask(n))
    assert ~~a == a


@pytest.mark.parametrize("pattern", LEAVES + EXPRESSIONS, ids=repr)
def test_predicate_agrees_on_tensors(pattern):
    positions = keras.ops.arange(11, dtype="int32")
    answer = keras.ops.convert_to_numpy(pattern(positions[:, None], positions[None, :]))
    np.testing.assert_array_equal(np.broadcast_to(answer, (11, 11)), pattern.mask(11))


@given(expressions)
@examples(100)
def test_repr_is_the_code_that_makes_it(pattern):
    names = {**expressions_module.kinds(), "Near": Near, "Diagonals": Diagonals}
    assert eval(repr(pattern), names) == pattern  # noqa: S307


@given(expressions)
@examples(100)
def test_equal_by_value_and_hashable(pattern):
    names = {**expressions_module.kinds(), "Near": Near, "Diagonals": Diagonals}
    again = eval(repr(pattern), names)  # noqa: S307
    assert again is not pattern
    assert hash(again) == hash(pattern)
    assert pattern != Local(12345)
    assert len({pattern, again}) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Local(2), Local(3)),
        (Local(2), Atrous(2)),
        (Causal() & Local(2), Causal() | Local(2)),
        (Near(2), Near(3)),
        (Full(), Diagonals()),
        (Band(1, None), Band(None, 1)),
    ],
)
def test_unequal(a, b):
    assert a != b


def test_same_window_is_equal_however_written():
    assert Local(2) == Local((2, 2)) == Local([2, 2]) == Local(np.int64(2))


def test_plain_subclass_with_its_own_init_is_compared_by_its_attributes():
    class Step(Pattern):
        def __init__(self, size):
            self.size = size

        def __call__(self, q_pos, k_pos):
            return q_pos - k_pos == self.size

    assert Step(1) == Step(1)
    assert Step(1) != Step(2)
    assert repr(Step(3)) == "Step(size=3)"
    np.testing.assert_array_equal(Step(1).mask(3), np.eye(3, k=-1, dtype=bool))


def test_a_subclass_with_slots_is_compared_by_them():
    class Step(Pattern):
        __slots__ = ("size",)

        def __init__(self, size):
            self.size = size

        def __call__(self, q_pos, k_pos):
            return q_pos - k_pos == self.size

    assert Step(1) == Step(1)
    assert Step(1) != Step(2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Step(1).size = 2


@pytest.mark.parametrize("pattern", LEAVES, ids=repr)
@pytest.mark.parametrize("name", ["window", "anything"])
def test_patterns_are_frozen(pattern, name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(pattern, name, 1)
    assert not hasattr(pattern, "anything")


@given(expressions)
@examples(100)
def test_config_round_trip_is_json(pattern):
    config = json.loads(json.dumps(pattern.get_config()))
    again = type(pattern).from_config(config)
    assert again == pattern
    assert again.get_config() == pattern.get_config()
    saved = json.loads(json.dumps(keras.saving.serialize_keras_object(pattern)))
    assert keras.saving.deserialize_keras_object(saved) == pattern


def test_tuples_survive_json():
    pattern = Near(2, (3, 0))
    assert Near.from_config(json.loads(json.dumps(pattern.get_config()))) == pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Causal() & (Local(64) | Atrous(64))", Causal() & (Local(64) | Atrous(64))),
        (" ~Local(window=(None, 3)) ", ~Local((None, 3))),
        ("Band(-2, rate=3)", Band(-2, None, 3)),
    ],
)
def test_parse(text, pattern):
    assert parse_pattern(text) == pattern


@given(expressions)
@examples(50)
def test_parse_reads_every_repr_of_our_own_patterns(pattern):
    if "Near" in repr(pattern) or "Diagonals" in repr(pattern):
        with pytest.raises(ValueError, match=r"There is no pattern (Near|Diagonals)"):
            parse_pattern(repr(pattern))
    else:
        assert parse_pattern(repr(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Local", r"made by a call, Local\(...\). Received: Local"),
        ("Local(-1)", r"`window` must be a non-negative int.* Received: window=-1"),
        ("local(4)", r"There is no pattern local\. Did you mean Local\? Received: local\(4\)"),
        ("Causal() & Lokal", r"no pattern Lokal\. Did you mean Local\? Received: Lokal"),
        ("PerHead([bigbird(64)])", r"Did you mean BigBird\? Received: bigbird\(64\)"),
        ("xyz(1)", r"no pattern xyz\. There are And, Atrous, .* Received: xyz\(1\)"),
        ("Causal() and Local(1)", r"not by `and`, .* Received: Causal\(\) and Local\(1\)"),
        ("not Causal()", r"not by `and`, `or` and `not`. Received: not Causal\(\)"),
        ("Causal() + Local(1)", r"calls such as Local\(64\), .*Received: Causal\(\) \+ Local"),
        ("__import__('os').system('true')", r"A pattern must be made of .*Received: __import__"),
        ("Local(open('x'))", r"There is no pattern open\. .*Received: open\('x'\)"),
        ("Local(1", "`text` must be a pattern. Received: text='Local\\(1'"),
        ("", "`text` must be a pattern. Received: text=''"),
        ("Local(1 + 2)", r"must be a literal or a pattern\. Received: 1 \+ 2"),
        ("PerHead([Full()] * 10**9)", r"A pattern must be made of .*Received: \[Full\(\)\] \*"),
        ("~" * 5000 + "Full()", "`text` must be a pattern"),
        ("Full()" + " | Full()" * 5000, "`text` must be a pattern"),
    ],
)
def test_parse_refuses_anything_else(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


def test_help_shows_the_arguments_of_a_pattern():
    class Plain(Pattern):
        def __call__(self, q_pos, k_pos):
            return q_pos == k_pos

    assert list(inspect.signature(Local).parameters) == ["window"]
    assert list(inspect.signature(Band).parameters) == ["left", "right", "rate"]
    assert list(inspect.signature(PerHead).parameters) == ["patterns"]
    assert "(self" not in str(inspect.signature(Plain))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Local()", r"Local\(window\): missing a required argument: 'window'. Received: Local\(\)"),
        ("Local(size=3)", r"Local\(window\): it has no argument 'size'. Received: Local\(size=3\)"),
        ("Causal(3)", r"Causal\(\): too many positional arguments. Received: Causal\(3\)"),
        (
            "Local(1, window=2)",
            r"multiple values for argument 'window'. Received: Local\(1, window",
        ),
        ("Local(window=1, window=2)", r"Local\(window\): a keyword is repeated, .*Received: Local"),
        ("Local(**{})", r"Local\(window\): a keyword is repeated, or has no name. Received: Local"),
        ("Fixed()", r"Fixed must be called as Fixed\(stride, summary=1\): missing a required"),
    ],
)
def test_parse_tells_how_a_pattern_is_called(text, message):
    with pytest.raises(TypeError, match=message):
        parse_pattern(text)


def test_parse_refuses_what_is_no_text():
    with pytest.raises(TypeError, match=r"`text` must be a str\. Received: text=3"):
        parse_pattern(3)


def test_text_shows_shares():
    assert Blocks(4).text(8, width=4) == "██\n  ██"
    assert Causal().text(4, width=4) == "█▒\n███▒"
    assert Atrous(4).text(64, width=8).splitlines()[0] == "░" * 8
    assert (Causal() & ~Causal()).text(5, width=10) == "\n" * 4


def test_text_is_drawn_in_other_shades():
    for pattern in (Causal(), Atrous(4) | Prefix(3), PerHead([Causal(), Local(2)])):
        drawn = pattern.text(64, width=16)
        translated = drawn.translate(str.maketrans(pictures.SHADES, pictures.ASCII_SHADES))
        assert pattern.text(64, width=16, shades=" .:+#") == translated
        assert translated.isascii()
    assert Blocks(4).text(8, width=4, shades=".#") == "##..\n..##"


def test_text_of_a_long_sequence_makes_no_square():
    # 10^12 pairs would need 1 TB as a mask.
    lines = Local(100_000).text(1_000_000, width=20).splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("█")


def test_svg_draws_the_mask():
    import xml.etree.ElementTree as ElementTree

    pattern = Causal() & Strided(3)
    n = 8
    root = ElementTree.fromstring(pattern.svg(n))  # noqa: S314 - our own text
    size = float(root.get("viewBox").split()[2]) / n
    painted = np.zeros((n, n), bool)
    for rect in root.findall(".//{*}g/{*}rect"):
        x, y, width = (round(float(rect.get(name)) / size) for name in ("x", "y", "width"))
        painted[y, x : x + width] = True
    np.testing.assert_array_equal(painted, pattern.mask(n))
    assert pattern._repr_svg_() == pattern.svg(64)


BAD = [
    (lambda: Local(-1), ValueError, "`window` must be a non-negative int or a pair .*window=-1"),
    (lambda: Local(1.5), TypeError, "`window` must be .* Received: window=1.5"),
    (lambda: Local(True), TypeError, "`window` must be .* Received: window=True"),
    (lambda: Local(None), TypeError, "`window` must be .* Received: window=None"),
    (lambda: Local((1, 2, 3)), ValueError, r"Received: window=\(1, 2, 3\)"),
    (lambda: Local((1, -2)), ValueError, r"Received: window=\(1, -2\)"),
    (lambda: Local((1, 0.5)), TypeError, r"Received: window=\(1, 0.5\)"),
    (lambda: Atrous(0), ValueError, "`rate` must be a positive int. Received: rate=0"),
    (lambda: Atrous(2.0), TypeError, "`rate` must be a positive int. Received: rate=2.0"),
    (lambda: Atrous(False), TypeError, "`rate` must be a positive int. Received: rate=False"),
    (lambda: Strided(0), ValueError, "`stride` must be a positive int. Received: stride=0"),
    (lambda: Dilated(-1, 2), ValueError, "`window` must be a non-negative int. .*window=-1"),
    (lambda: Dilated(1, 0), ValueError, "`rate` must be a positive int. Received: rate=0"),
    (lambda: Blocks(0), ValueError, "`size` must be a positive int. Received: size=0"),
    (lambda: Blocks(3, -1), ValueError, "`reach` must be a non-negative int. .*reach=-1"),
    (lambda: Fixed(0), ValueError, "`stride` must be a positive int. Received: stride=0"),
    (lambda: Fixed(3, 4), ValueError, "`summary` must be at most the stride, 3. .*summary=4"),
    (lambda: Fixed(3, 0), ValueError, "`summary` must be a positive int. .*summary=0"),
    (lambda: Global(-1), ValueError, "`positions` must be a non-negative int, how many, or a seq"),
    (lambda: Global((1, -2)), ValueError, r"Received: positions=\(1, -2\)"),
    (lambda: Global((1, 2**33)), ValueError, r"positions in \[0, 2\*\*31\)"),
    (lambda: Global(1.5), TypeError, "`positions` must be .* Received: positions=1.5"),
    (lambda: Global("ab"), TypeError, "`positions` must be .* Received: positions='ab'"),
    (lambda: Random(0), ValueError, "`length` must be a positive int. Received: length=0"),
    (lambda: Random(9, 0), ValueError, "`block_size` must be a positive int. .*block_size=0"),
    (lambda: Random(9, 2, -1), ValueError, "`num_blocks` must be a non-negative int"),
    (lambda: Random(9, seed=2**32), ValueError, r"`seed` must be an int in \[0, 2\*\*32\)"),
    (lambda: Random(9, skip=3), TypeError, "`skip` must be a Pattern of block numbers or None"),
    (lambda: Random(9, 2).mask(10), ValueError, r"is made for lengths up to 9. .*n=10, m=10"),
    (lambda: BigBird(9, num_random_blocks=-1), ValueError, "`num_random_blocks` must be a non-neg"),
    (lambda: BigBird(9).mask(10), ValueError, r"is made for lengths up to 9. .*n=10, m=10"),
    (lambda: Neighborhood(5, 1), TypeError, "`shape` must be a tuple of positive ints. .*shape=5"),
    (lambda: Neighborhood((), 1), ValueError, r"`shape` must be .* Received: shape=\(\)"),
    (lambda: Neighborhood((3, 0), 1), ValueError, r"`shape` must be .*shape=\(3, 0\)"),
    (lambda: Neighborhood((3, 3), -1), ValueError, "`window` must be a non-negative int. .*=-1"),
    (
        lambda: Neighborhood((3, 3), (1, 2, 3)),
        ValueError,
        r"`window` must be a non-negative int or a tuple of 2 of them. .*=\(1, 2, 3\)",
    ),
    (lambda: Neighborhood((3, 3), 1, 0), ValueError, "`dilation` must be a positive int. .*=0"),
    (
        lambda: Neighborhood((3, 3), 1).mask(10),
        ValueError,
        "made for lengths up to 9. .*n=10, m=10",
    ),
    (lambda: Axial((3,)), ValueError, r"`shape` must be a tuple of at least 2 .*shape=\(3,\)"),
    (lambda: Axial((3, 2)).mask(7), ValueError, "is made for lengths up to 6. Received: n=7, m=7"),
    (lambda: Grid((3,), (Band(),)), ValueError, "`bands` must be 2 of Band. Received: bands="),
    (lambda: Grid((3,), 1), TypeError, "`bands` must be a tuple of Band. Received: bands=1"),
    (lambda: Longformer(-1), ValueError, "`window` must be a non-negative int or a pair"),
    (lambda: StreamingLLM(3, -1), ValueError, "`sinks` must be a non-negative int. .*sinks=-1"),
    (lambda: PrefixLM(-1), ValueError, "`prefix` must be a non-negative int. .*prefix=-1"),
    (lambda: SparseTransformer(3, "local"), ValueError, '`kind` must be "strided" or "fixed"'),
    (lambda: SparseTransformer(3, summary=2), ValueError, "`summary` must be left out unless kind"),
    (lambda: Prefix(-1), ValueError, "`length` must be a non-negative int. .*length=-1"),
    (lambda: Prefix("4"), TypeError, "`length` must be a non-negative int. .*length='4'"),
    (lambda: Band(0.5), TypeError, "`left` must be an int. Received: left=0.5"),
    (lambda: Causal() and Local(1), TypeError, "no truth value: join patterns by `&`"),
    (lambda: not Causal(), TypeError, "no truth value"),
    (lambda: Causal() & True, TypeError, r"`&` joins patterns, such as Local\(64\). .*True"),
    (lambda: 3 | Causal(), TypeError, r"`\|` joins patterns, such as Local\(64\). Received: 3"),
    (lambda: Causal() & Local, TypeError, "Received: <class '.*Local'>"),
    (lambda: Causal().mask(0), ValueError, "`n` must be a positive int. Received: n=0"),
    (lambda: Causal().mask(3, 2.5), TypeError, "`m` must be a positive int. Received: m=2.5"),
    (lambda: Causal().text(5, shades=3), TypeError, "`shades` must be a str of at least 2"),
    (lambda: Causal().text(5, shades="#"), ValueError, "`shades` must be a str of at least 2"),
    (lambda: Causal().text(5, shades=" \n"), ValueError, "at least 2 printable characters"),
    (lambda: Causal().text(5, width=1), ValueError, "`width` must be an int of at least 2"),
    (lambda: Causal().svg(5, cells=0), ValueError, "`cells` must be a positive int"),
    (Pattern, TypeError, "abstract"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_predicate_that_answers_badly_is_named():
    class Number(Pattern):
        def __call__(self, q_pos, k_pos):
            return q_pos - k_pos

    class Table(Pattern):
        def __call__(self, q_pos, k_pos):
            return np.ones((3, 3), bool)

    with pytest.raises(TypeError, match=r"Number\(\) must answer with bools. Received: dtype=int"):
        Number().mask(4)
    with pytest.raises(ValueError, match=r"Table\(\) must answer with a shape .*\(4, 4\)"):
        Table().mask(4)
    for draw in (Number().text, Number().svg):
        with pytest.raises(TypeError, match=r"Number\(\) must answer with bools"):
            draw(4)
    assert Table()._repr_svg_() is None  # a notebook then shows its name


def test_a_predicate_may_answer_with_one_bool():
    class Always(Pattern):
        def __call__(self, q_pos, k_pos):
            return True

    assert Always().mask(3).all()
    assert not (~Always()).mask(3).any()
    np.testing.assert_array_equal((Always() & Causal()).mask(3), Causal().mask(3))


@pytest.mark.parametrize("n", [64, 4096, 40960])
def test_rows_of_global_positions_are_in_every_picture(n):
    places = (1, n // 3, n - 2)
    for pattern in (Global(places), Local(2) | Global(places), Longformer(2, places)):
        lines = pattern.text(n, width=32).splitlines()
        for place in places:
            assert set(lines[place * len(lines) // n]) <= set("░▒▓█")
            assert len(lines[place * len(lines) // n]) == 32
        assert " " in lines[8]


def test_a_cell_is_as_full_as_its_pairs_where_they_are_asked_about():
    pattern, n = Local(40) | Global((5, 1003)), 2048
    found = pictures.shares(pattern._answer, n, n, 16, 16, pattern.rows_apart(n))
    expected = pattern.mask(n).reshape(16, 128, 16, 128).mean(axis=(1, 3))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_notebook_shows_a_pattern_at_a_length_that_tells_something():
    for pattern in (
        BigBird(4096),
        Longformer(256, 2),
        Local(64),
        PrefixLM(128),
        Axial((64, 64)),
        Random(4096),
        Neighborhood((7, 7), 1),
    ):
        n = pattern._telling_length()
        assert 0 < pattern.mask(n).mean() < 0.6
        assert f"{n} queries" in pattern._repr_svg_()
    heads = PerHead([Local(64), BigBird(100, 8)])
    for pattern in (Full(), Causal(), Prefix(0), BigBird(48, 4, 2), heads):
        assert "<svg" in pattern._repr_svg_()


@pytest.mark.parametrize("skip", [None, Local(1), ~Local(3)])
def test_random_blocks_are_as_many_as_there_are_and_none_twice(skip):
    for length, count in ((400, 3), (400, 30), (40, 5), (10, 1)):
        pattern = Random(length, 10, count, seed=2, skip=skip)
        blocks = length // 10
        for block, row in enumerate(pattern.lists):
            drawn = row[row >= 0]
            free = [k for k in range(blocks) if skip is None or not skip(block, k)]
            assert len(drawn) == len(set(drawn.tolist())) == min(count, len(free))
            assert set(drawn.tolist()) <= set(free)


def test_drawing_takes_time_of_the_blocks_alone():
    lists = Random(2**24, 64, 3, seed=1, skip=Local(1)).lists  # 2**18 blocks
    assert lists.shape == (2**18, 3)
    assert (lists >= 0).all()
    # Each block is drawn as often as any other, about.
    counts = np.bincount(lists.reshape(-1) // 2**14, minlength=16)
    assert np.abs(counts / counts.mean() - 1).max() < 0.03


def test_lengths_of_a_combination_are_those_of_its_parts():
    pattern = Causal() & (BigBird(40, 4) | Local(3))
    assert pattern.max_length == 40
    assert (~pattern).max_length == PerHead([Full(), pattern]).max_length == 40
    assert (Causal() | Local(3)).max_length is None
    with pytest.raises(ValueError, match=r"BigBird\(40, 4\) is made for lengths up to 40"):
        pattern.mask(41)


def kinds_of_patterns(kind=Pattern):
    for each in kind.__subclasses__():
        yield from [each, *kinds_of_patterns(each)]


def test_every_pattern_class_is_among_the_cases_for_frameworks():
    public = {kind for kind in kinds_of_patterns() if kind.__name__ in sparse_attn.__all__}
    tested = {type(pattern) for patterns in EACH_CLASS.values() for pattern in patterns}
    assert tested | {And, Or, Not, PerHead} >= public
