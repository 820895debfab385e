"""Sphinx settings: `python -m sphinx -W -b html docs docs/_build/html`."""

import inspect
import itertools
import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import desc, desc_signature

from sparse_attn import __version__

project = "sparse_attn"
author = "the authors of sparse_attn"
version = release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton"]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "pydata_sphinx_theme"
html_title = "sparse_attn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars = {"api/*": ["sidebar-nav-bs"], "generated/*": ["sidebar-nav-bs"], "*": []}
html_theme_options = {
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "header_links_before_dropdown": 7,
    "navbar_persistent": ["search-button"],
}

# The notebooks live outside of this folder: a build works on copies.
_HERE = Path(__file__).parent
shutil.rmtree(_HERE / "generated", ignore_errors=True)
(_HERE / "generated").mkdir()
for notebook in (_HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, _HERE / "generated")
nb_execution_mode = "off"  # the outputs are stored; tests compare them with a run

# Copied code has no prompts, and an example no results.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = "div:not(.output) > div.highlight > pre"

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
    app.connect("doctree-resolved", _link_code)


def _with_picture(app, what, name, obj, options, lines):
    """A pattern has its picture under its first paragraph."""
    kind = name.rpartition(".")[2]
    if what == "class" and (_HERE / "pictures" / f"{kind}.svg").exists():
        end = lines.index("") if "" in lines else len(lines)
        code = re.search(rf"`({kind}\([^`]*)`", (_HERE / "gallery.md").read_text())[1]
        picture = [f".. figure:: /pictures/{kind}.svg", f"   :alt: {code}", "", f"   `{code}`"]
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


def _link_code(app, doctree, docname):
    """A documented name in code font, or a call of it, links to its entry."""
    entries = _entries(app.env)
    for literal in [*doctree.findall(nodes.literal)]:
        name, within = _called(literal.astext()), [*_ancestors(literal)]
        if name not in entries or any(isinstance(x, _NO_LINKS) for x in within):
            continue
        target, anchor = entries[name]
        if not any(isinstance(x, desc) and anchor in x[0].get("ids", ()) for x in within):
            uri = f"{app.builder.get_relative_uri(docname, target)}#{anchor}"
            link = nodes.reference("", "", internal=True, refuri=uri, reftitle=anchor)
            literal.replace_self(link)
            link += literal


_NO_LINKS = (nodes.reference, nodes.title, desc_signature)


def _entries(env):
    """The page and the anchor of each documented name, by each ending of it: `layers.X` and `X`.

    A method goes by the name of its class too, `pattern.cost` being one of `Pattern`.
    """
    found = {}
    for full, entry in env.domaindata["py"]["objects"].items():
        parts = full.split(".")
        shortest = 1 if entry.objtype in ("class", "function") else 2
        names = {".".join(parts[start:]) for start in range(len(parts) - shortest + 1)}
        names |= {re.sub(r"^Pattern\.", "pattern.", name) for name in names}
        found |= dict.fromkeys(names, (entry.docname, entry.node_id))
    return found


def _called(code):
    """The name that some code is, or that it calls; `None` if it is more than that.

    A bare word in lower case, such as `bound`, may as well be an argument's name.
    """
    match = re.fullmatch(r"([A-Za-z_][\w.]*)(\(.*\))?", code)
    if match is None:
        return None
    name, arguments = match.groups()
    if arguments is None:
        return name if re.search("[A-Z_.]", name) else None
    depth = list(itertools.accumulate({"(": 1, ")": -1}.get(x, 0) for x in arguments))
    return name if depth.index(0) == len(depth) - 1 else None


def _ancestors(node):
    while node := node.parent:
        yield node
