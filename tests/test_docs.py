"""The API reference names all that is public, and the pictures are up to date."""

import doctest
import importlib
import pkgutil
import re
import runpy
import warnings
from html import unescape
from pathlib import Path

import keras
import numpy as np
import pytest

import sparse_attn
from sparse_attn import Pattern, layers, parse_pattern
from sparse_attn.expressions import kinds
from sparse_attn.layers.dropped_masks import mask_of
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


# ---- Padding in the examples ---------------------------------------------------


def page(path):
    """Its examples, which go on from one another."""
    text = path.read_text(encoding="utf-8")
    parser = doctest.DocTestParser()
    dialogues = ["".join(x.source for x in parser.get_examples(x)) for x in blocks(text, "pycon")]
    return [*blocks(text, "python"), *dialogues]


def docstrings():
    """The examples of each docstring that makes a model, by its name."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for module in pkgutil.walk_packages(sparse_attn.__path__, "sparse_attn."):
        if module.name == "sparse_attn.__main__":
            continue
        for each in finder.find(importlib.import_module(module.name), module.name):
            example = "".join(x.source for x in each.examples)
            if "keras.Model(" in example:
                found[each.name] = [example]
    return found


PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("**/*.md"))]
EXAMPLES = {path.name: page(path) for path in PAGES if "_build" not in path.parts}
EXAMPLES = {name: each for name, each in EXAMPLES.items() if "keras.Model(" in "".join(each)}
EXAMPLES |= docstrings()


def models_of(examples):
    """The models of tokens with padding that some examples make."""
    said, found = {"__name__": "docs"}, []
    for example in examples:
        exec(example, said)  # noqa: S102 - the page's own code
        for value in said.values():
            is_new = isinstance(value, keras.Model) and all(value is not x for x in found)
            if is_new and any(getattr(layer, "mask_zero", False) for layer in value.layers):
                found.append(value)
    return found


def check_padding(model):
    """Padding does not matter to what a model says of valid positions."""
    length = model.input.shape[1] or 24
    tokens = np.random.default_rng(0).integers(1, 9, (4, length)).astype("int32")
    lengths = [length, length // 2, 3, 1]
    for row, size in zip(tokens, lengths, strict=True):
        row[size:] = 0
    together = to_numpy(model(tokens))
    for found, row, size in zip(together, tokens, lengths, strict=True):
        alone = to_numpy(model(row[None] if model.input.shape[1] else row[None, :size]))
        np.testing.assert_allclose(found[:size], alone[0, :size], atol=1e-5)
    tokens[0, : length // 2 : 2] = 0  # before others, where causal attention sees it
    valid, together = tokens > 0, to_numpy(model(tokens))
    embedding = next(layer for layer in model.layers if getattr(layer, "mask_zero", False))
    (table,) = embedding.get_weights()
    table[0] = 50.0
    embedding.set_weights([table])
    np.testing.assert_allclose(to_numpy(model(tokens))[valid], together[valid], atol=1e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_padding_does_not_matter_in_an_example(name):
    for model in models_of(EXAMPLES[name]):
        check_padding(model)
        assert mask_of(model.output) is not None  # so that a loss leaves padding out


def test_the_examples_with_padding_are_those_of_readme_of_this_page_and_of_the_block():
    found = {name for name, each in EXAMPLES.items() if models_of(each)}
    assert {"README.md", "keras.md"} <= found
    assert any(name.endswith(".TransformerBlock") for name in found)


@pytest.mark.parametrize("name", ["README.md", "keras.md"])
def test_an_example_that_drops_the_mask_would_be_found(name):
    add = r"keras\.layers\.add\(\[x, (.*)\]\)$"
    examples = [re.sub(add, r"x + \1", each, flags=re.MULTILINE) for each in EXAMPLES[name]]
    assert examples != EXAMPLES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = models_of(examples)
    assert mask_of(models[0].output) is None
    if name == "README.md":  # where a layer comes behind the sum
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            check_padding(models[0])


# ---- The page for those who come from Keras ------------------------------------


@pytest.fixture
def from_keras():
    """What the examples of the page define."""
    said = {"__name__": "docs"}
    for example in EXAMPLES["keras.md"]:
        exec(example, said)  # noqa: S102 - the page's own code
    return said


def test_a_trained_model_is_made_sparse(from_keras):
    said = from_keras
    x = np.random.default_rng(0).normal(size=(2, 50, 16)).astype("float32")
    found, expected = (to_numpy(said[name](x)) for name in ("sparse", "trained"))
    np.testing.assert_allclose(found, expected, atol=1e-5)  # the window holds all of it
    assert isinstance(said["sparse"].layers[-1], layers.MultiHeadAttention)
    pattern = sparse_attn.Local(3)
    found = to_numpy(said["make_sparse"](said["trained"], pattern)(x))
    layer = said["trained"].layers[-1]
    dense = to_numpy(said["trained"].layers[-2](x))
    by_mask = to_numpy(layer(dense, dense, attention_mask=pattern.mask(50)[None]))
    np.testing.assert_allclose(found, by_mask, atol=1e-5)


class OwnBlock(keras.layers.Layer):
    """A layer of one's own with Keras' attention inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.attention = keras.layers.MultiHeadAttention(2, 8)

    def build(self, shape):
        self.attention.build(shape, shape)

    def call(self, x):
        return x + self.attention(x, x)


def test_a_model_in_which_nothing_would_be_replaced_is_an_error(from_keras):
    x = keras.Input((None, 16))
    inner = keras.Model(x, keras.layers.MultiHeadAttention(2, 8)(x, x))
    for layer in (OwnBlock(), inner, keras.layers.Dense(4)):
        model = keras.Model(x, layer(x))
        with pytest.raises(ValueError, match=r"None of `model\.layers`"):
            from_keras["make_sparse"](model, sparse_attn.Local(64))


class InTurn(keras.Model):
    """Keras' layer, and then one of this package on the same tensor, called as `call` says."""

    def __init__(self, first, call):
        super().__init__()
        self.embed = keras.layers.Embedding(9, 8, mask_zero=True)
        self.first = first(2, 4)
        self.second = layers.MultiHeadAttention(2, 4, pattern=sparse_attn.Local(3))
        self.code = call

    def call(self, tokens):
        x, mask = self.embed(tokens), self.embed.compute_mask(tokens)
        first = self.first(x, x)
        return first + eval(self.code, {"layer": self.second, "x": x, "mask": mask})  # noqa: S307


def leak(model):
    padded, alone = np.array([[1, 2, 3, 0, 0, 0]]), np.array([[1, 2, 3]])
    return np.abs(to_numpy(model(padded))[:, :3] - to_numpy(model(alone))).max()


def test_where_keras_removes_a_mask_the_advice_of_the_page_keeps_padding_out():
    page = (DOCS / "keras.md").read_text(encoding="utf-8")
    (advice,) = re.findall(r"removes the mask .*?`(layer\([^`]*)`", page, re.DOTALL)
    keras_layer, own = keras.layers.MultiHeadAttention, layers.MultiHeadAttention
    assert leak(InTurn(keras_layer, "layer(x, x)")) > 1e-3
    assert leak(InTurn(own, "layer(x, x)")) < 1e-6
    assert leak(InTurn(keras_layer, advice)) < 1e-6


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
