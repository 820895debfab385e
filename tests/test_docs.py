"""The API reference names all that is public, and the pictures are up to date."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import sparse_attn
from sparse_attn import layers
from sparse_attn.expressions import kinds
from tests.compare import to_numpy
from tests.test_readme import blocks

DOCS = Path(__file__).parents[1] / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")
OPERATORS = {"And", "Or", "Not"}
PUBLIC = [
    *[f"sparse_attn.{name}" for name in (*sparse_attn.__all__, "plan")],
    *[f"sparse_attn.layers.{name}" for name in layers.__all__],
]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference(name):
    assert re.search(rf"^\.\. auto(class|function):: {re.escape(name)}$", API, re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name):
    module, _, attribute = name.rpartition(".")
    owner = layers if module == "sparse_attn.layers" else sparse_attn
    docstring = getattr(owner, attribute).__doc__ or ""
    assert docstring.strip()
    assert not docstring.startswith(f"{attribute}(")  # what a dataclass says without one


SCRIPT = runpy.run_path(str(DOCS / "make_pictures.py"))


def test_pictures_are_what_their_script_draws():
    drawn = SCRIPT["files"]()
    for path, text in drawn.items():
        assert path.read_text(encoding="utf-8") == text, "run `python docs/make_pictures.py`"
    assert {*(DOCS / "pictures").iterdir()} <= set(drawn)


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
