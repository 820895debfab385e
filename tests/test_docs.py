"""The API reference names all that is public, and the picture is up to date."""

import re
import runpy
from pathlib import Path

import pytest

import sparse_attn
from sparse_attn import layers

DOCS = Path(__file__).parents[1] / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")
MODULES = {"__version__", "layers", "masking", "reference"}
PUBLIC = [
    *[f"sparse_attn.{name}" for name in sparse_attn.__all__ if name not in MODULES],
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


def test_the_picture_is_what_its_script_draws():
    script = runpy.run_path(str(DOCS / "make_picture.py"))
    drawn = script["PICTURE"].read_text(encoding="utf-8")
    assert drawn == script["picture"](), "run `python docs/make_picture.py`"
