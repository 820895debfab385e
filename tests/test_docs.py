"""The API reference names all that is public, and the pictures are up to date."""

import doctest
import importlib
import re
import runpy
from html import unescape
from pathlib import Path

import numpy as np
import pytest

import sparse_attn
from sparse_attn import Pattern, layers, parse_pattern
from sparse_attn.expressions import kinds
from tests.compare import to_numpy
from tests.test_readme import blocks

DOCS = Path(__file__).parents[1] / "docs"
API = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))
OPERATORS = {"And", "Or", "Not"}
MASKS = ["sequence_mask", "masked_softmax", "zero_masked"]
RESULTS = {"Cost", "ReceptiveField", "Plan", "Part"}  # what functions return
PUBLIC = [
    *[f"sparse_attn.{name}" for name in (*sparse_attn.__all__, "plan")],
    *[f"sparse_attn.layers.{name}" for name in layers.__all__],
    *[f"sparse_attn.masking.{name}" for name in MASKS],
    "sparse_attn.reference.dense_attention",
    "sparse_attn.patterns.look_up",
    *[f"sparse_attn.plan.{name}" for name in ("Plan", "Part", "bound", "rewrite")],
    *[f"sparse_attn.costs.{name}" for name in ("Cost", "ReceptiveField")],
]
LOOKED_AT = ["mask", "text", "svg", "plot", "cost", "receptive_field"]
OVERRIDDEN = ["max_length", "grid_shapes", "check_lengths", "rows_apart"]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference_once(name):
    entry = rf"^\.\. auto(class|function):: {re.escape(name)}(\(pattern\))?$"
    assert len(re.findall(entry, API, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", LOOKED_AT + OVERRIDDEN)
def test_every_method_of_a_pattern_is_in_the_reference_once(name):
    entry = rf"^\.\. auto(method|attribute):: sparse_attn\.Pattern\.{name}$"
    assert len(re.findall(entry, API, re.MULTILINE)) == 1


def test_the_methods_of_a_pattern_are_all_that_it_has():
    names = {name for name in vars(Pattern) if not name.startswith("_")}
    assert names == {*LOOKED_AT, *OVERRIDDEN, "get_config", "from_config"}


def test_the_first_page_of_the_reference_leads_to_each_name():
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    told = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)(?:\(\))?`", index)}
    assert {name.rpartition(".")[2] for name in PUBLIC} - told <= RESULTS
    assert {*LOOKED_AT, *OVERRIDDEN} <= told


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    module, _, attribute = name.rpartition(".")
    docstring = getattr(importlib.import_module(module), attribute).__doc__ or ""
    assert docstring.strip()
    assert not docstring.startswith(f"{attribute}(")  # what a dataclass says without one


SCRIPT = runpy.run_path(str(DOCS / "make_pictures.py"))


def test_pictures_are_what_their_script_draws():
    drawn = SCRIPT["files"]()
    for path, text in drawn.items():
        assert path.read_text(encoding="utf-8") == text, "run `python docs/make_pictures.py`"
    assert {*(DOCS / "pictures").iterdir()} <= set(drawn)


def test_captions_of_the_cover_can_be_read_on_a_phone():
    cover = (DOCS / "pattern.svg").read_text(encoding="utf-8")
    width, font = (int(re.search(rf' {name}="(\d+)"', cover)[1]) for name in ("width", "font-size"))
    assert font * 343 / width > 10.5  # pixels, where the picture is as wide as a phone's text
    captions = [unescape(x) for x in re.findall(r"<text [^>]*>([^<]*)<", cover)]
    assert captions
    column = width / len(SCRIPT["COVER"][0])
    assert max(map(len, captions)) * 0.6 * font < column  # 0.6: a character of a monospace font


def test_every_pattern_has_a_picture():
    assert {code.partition("(")[0] for code in SCRIPT["EXAMPLES"]} == set(kinds()) - OPERATORS


def test_the_examples_for_those_who_come_from_keras_run():
    said = {"__name__": "docs"}
    for example in blocks((DOCS / "keras.md").read_text(encoding="utf-8"), "python"):
        exec(example, said)  # noqa: S102 - the page's own code
    x = np.random.default_rng(0).normal(size=(2, 50, 16)).astype("float32")
    found, expected = (to_numpy(said[name](x)) for name in ("sparse", "trained"))
    np.testing.assert_allclose(found, expected, atol=1e-5)  # the window holds all of it
    assert isinstance(said["sparse"].layers[-1], layers.MultiHeadAttention)


CHOOSING = (DOCS / "choosing.md").read_text(encoding="utf-8")


def test_the_examples_for_choosing_a_pattern_run():
    runner = doctest.DocTestRunner()
    example = "".join(blocks(CHOOSING, "pycon"))
    runner.run(doctest.DocTestParser().get_doctest(example, {}, "choosing.md", "choosing.md", 0))
    assert runner.tries > 10
    assert runner.failures == 0


def test_the_costs_for_choosing_a_pattern_are_those_of_the_patterns(default_costs):
    rows = re.findall(r"^\| `(.*)` \| (\d+) \| (\d+) \| (\d+|never) \|$", CHOOSING, re.MULTILINE)
    assert len(rows) == 10
    for code, *said in rows:
        pattern, n = parse_pattern(code), 4096
        cost = pattern.cost(n)
        reach = 512 if said[-1] == "never" else n  # a short one is enough
        layers_to_all = pattern.receptive_field(1, reach).layers_to_all
        found = [round(cost.pairs / n), round(cost.scored_pairs / n), layers_to_all or "never"]
        assert said == [str(x) for x in found], code


def test_every_pattern_to_choose_from_has_its_picture_there():
    pictures = re.findall(
        r"^## (\w+)\n\n!\[(\1\(.*\))\]\(pictures/\1\.svg\)$", CHOOSING, re.MULTILINE
    )
    assert len(pictures) == 8
    assert {code for _, code in pictures} <= set(SCRIPT["EXAMPLES"])


@pytest.mark.parametrize("name", [x for x in layers.__all__ if x.endswith("Attention")])
def test_the_features_of_a_layer_are_said_to_be_per_head(name):
    assert re.search(r"(key|head)_dim: features per head", getattr(layers, name).__doc__)


@pytest.mark.parametrize("page", ["../README.md", "keras.md", "api/layers.md"])
def test_key_dim_is_said_to_be_per_head(page):
    text = " ".join((DOCS / page).read_text(encoding="utf-8").split())
    assert "`key_dim` counts features per head" in text
