"""Sphinx settings: `python -m sphinx -W -b html docs docs/_build/html`."""

import inspect
import re
import shutil
from pathlib import Path

from sphinx.addnodes import desc_signature

from sparse_attn import __version__

project = "sparse_attn"
author = "the authors of sparse_attn"
version = release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "pydata_sphinx_theme"
html_title = "sparse_attn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars = {"**": []}
html_theme_options = {"show_prev_next": False, "secondary_sidebar_items": ["page-toc"]}

# The notebooks live outside of this folder: a build works on copies.
_HERE = Path(__file__).parent
shutil.rmtree(_HERE / "generated", ignore_errors=True)
(_HERE / "generated").mkdir()
for notebook in (_HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, _HERE / "generated")
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True
nb_output_stderr = "remove"  # what TensorFlow says as it starts

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more
default_role = "code"
napoleon_use_param = False
napoleon_custom_sections = [("Call arguments", "params_style"), ("Attributes", "params_style")]


def setup(app):
    app.connect("autodoc-process-docstring", _with_picture, priority=0)
    app.connect("autodoc-process-docstring", _from_markdown, priority=0)  # before napoleon
    app.connect("autodoc-process-signature", _signature_of_init)
    app.connect("object-description-transform", _one_signature)


def _with_picture(app, what, name, obj, options, lines):
    """A pattern has its picture under its first paragraph."""
    kind = name.rpartition(".")[2]
    if what == "class" and (_HERE / "pictures" / f"{kind}.svg").exists():
        end = lines.index("") if "" in lines else len(lines)
        code = re.search(rf"`({kind}\([^`]*)`", (_HERE / "gallery.md").read_text())[1]
        picture = [f".. figure:: pictures/{kind}.svg", f"   :alt: {code}", "", f"   `{code}`"]
        lines[end:end] = ["", *picture]


def _from_markdown(app, what, name, obj, options, lines):
    """Make RST of what napoleon does not read as meant.

    Those are links, an `Example` that is not indented, and a colon in the text of `Returns`.
    """
    text = "\n".join(lines)
    text = re.sub(r"\[([^\[\]]+)\]\((https?://[^)\s]+)\)", r"`\1 <\2>`__", text)
    text = re.sub(r"^Returns:\n +", ":returns: ", text, flags=re.MULTILINE)
    text = re.sub(r"^Example:$", ".. rubric:: Example", text, flags=re.MULTILINE)
    lines[:] = text.split("\n")


def _signature_of_init(app, what, name, obj, options, signature, return_annotation):
    """A class is made as its `__init__` says: Keras layers hide it behind `__new__`."""
    if what != "class":
        return None
    if obj.__init__ is object.__init__:
        return "", None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    plain = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain)), None


def _one_signature(app, domain, objtype, content):
    """A single-dispatch function is listed once, and not for every registered type."""
    signatures = [node for node in content.parent if isinstance(node, desc_signature)]
    for signature in signatures[1:]:
        content.parent.remove(signature)
