"""The direction of imports, which is the architecture, read from the sources."""

import ast
from pathlib import Path

import keras
import pytest

import sparse_attn

ROOT = Path(sparse_attn.__file__).parent
# What each module of the package may import, of the package and of elsewhere.
ALLOWED = {
    "_startup": {"os", "pathlib", "re", "signal", "sys"},
    "checks": {"difflib", "inspect", "math", "numbers", "operator"},
    "tensors": {"keras", "numpy", "checks", "tracing"},
    "reshaping": {"collections", "dataclasses", "functools", "operator", "einops", "keras"}
    | {"tracing"},
    "pictures": {"itertools", "re", "numpy"},
    "patterns": {
        "abc",
        "dataclasses",
        "functools",
        "inspect",
        "math",
        "operator",
        "numpy",
        "checks",
    }
    | {"pictures"},
    "recipes": {"abc", "checks", "patterns"},
    "expressions": {"ast", "inspect", "operator", "checks", "patterns", "recipes"},
    "layouts": {"functools", "itertools", "math", "dataclasses", "typing", "numpy", "reshaping"}
    | {"checks", "keras", "tracing"},
    "masking": {"functools", "keras", "reshaping", "checks", "tensors"},
    "reference": {"numpy"},
    "bounds": {"functools", "itertools", "math", "numpy", "layouts", "patterns"},
    "blocks": {"dataclasses", "itertools", "numpy"},
    "terms": {"functools", "itertools", "math", "dataclasses", "bounds", "patterns", "recipes"},
    "plan": {"functools", "itertools", "math", "dataclasses", "numpy", "blocks", "bounds"}
    | {"checks", "layouts", "patterns", "terms", "tracing"},
    "costs": {"functools", "itertools", "math", "operator", "dataclasses", "numpy", "reshaping"}
    | {"keras", "bounds", "checks", "layouts", "patterns", "plan", "stream", "terms", "tracing"},
    "chosen": {"itertools", "reshaping", "keras", "layouts", "masking", "tracing"},
    "attend": {"checks", "functools", "keras", "masking", "tensors", "tracing"},
    "tracing": {"contextlib", "functools", "itertools", "math", "operator", "einops", "keras"},
    "stream": {"collections", "dataclasses", "functools", "operator", "typing", "keras"}
    | {"reshaping", "attend", "layouts", "masking", "scores", "tracing"},
    "plots": {"textwrap", "numpy", "checks", "costs", "patterns", "pictures", "plan"},
    "show": {"argparse", "parse_pattern", "patterns", "plan", "terminal"},
    "terminal": {"argparse", "contextlib", "os", "pathlib", "re", "shutil", "signal", "sys"}
    | {"textwrap", "checks", "pictures"},
    "training": {"os", "pathlib", "signal", "sys", "sysconfig", "tempfile", "time", "keras"}
    | {"numpy", "terminal"},
    "scores": {"abc", "dataclasses", "functools", "keras", "numpy", "checks", "masking"}
    | {"tracing"},
    "tiles": {"functools", "math", "dataclasses", "reshaping", "keras", "numpy", "bounds"}
    | {"checks", "masking", "patterns", "plan", "scores", "stream", "terms", "tracing"},
    "functional": {"itertools", "dataclasses", "keras", "numpy", "attend", "bounds"}
    | {"checks", "chosen", "masking", "patterns", "plan", "reshaping", "scores", "stream"}
    | {"tensors", "tiles", "tracing"},
}


def imports(path, functions=False):
    """Names of the modules that a file imports, at its top or within functions."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = set()
    for node in ast.walk(tree):
        if (id(node) in top) == functions:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            is_package = node.module == "sparse_attn"
            names = [f"{node.module}.{a.name}" if is_package else node.module for a in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found.add(parts[1] if parts[0] == "sparse_attn" else parts[0])
    return found


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_module_imports_only_what_lies_below_it(name):
    assert imports(ROOT / f"{name}.py") <= ALLOWED[name]


def test_every_module_is_listed():
    known = {*ALLOWED, "__init__", "__main__", "_version"}
    assert {path.stem for path in ROOT.glob("*.py")} == known


def test_nothing_below_the_package_itself_imports_layers():
    users = {path.stem for path in ROOT.glob("*.py") if "layers" in imports(path)}
    assert users == {"__init__", "__main__"}  # the former so that saved models load


def test_imports_within_functions():
    # Patterns meet Keras only to be saved, and what stands on plans only to be drawn or counted;
    # a backend is named only where tracing needs it, and matplotlib may be missing.
    expected = {"patterns": {"costs", "keras", "plots", "tracing"}}
    expected |= {"tracing": {"jax", "tensorflow", "torch"}, "plots": {"keras", "matplotlib"}}
    for path in ROOT.rglob("*.py"):
        assert imports(path, functions=True) == expected.get(path.stem, set())


def test_import_star_overwrites_no_usual_name():
    names = {}
    exec("from keras import layers\nplan = 'mine'\nfrom sparse_attn import *", names)  # noqa: S102
    assert names["layers"] is keras.layers
    assert names["plan"] == "mine"
    assert not {"masking", "reference", "__version__"} & names.keys()
    assert names["sparse_attention"] is sparse_attn.sparse_attention
    assert not [name for name in sparse_attn.__all__ if name.islower() and "_" not in name]


def test_names_that_import_star_leaves_out_are_public_all_the_same():
    from sparse_attn import __version__, layers, masking, plan, reference

    assert callable(plan)
    assert plan is sparse_attn.plan
    assert issubclass(layers.SelfAttention, keras.layers.Layer)
    assert callable(masking.sequence_mask)
    assert callable(reference.dense_attention)
    assert __version__ == sparse_attn.__version__


def test_main_job_uses_the_public_api_only():
    tree = ast.parse((ROOT / "__main__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sparse_attn"):
            module = __import__(node.module, fromlist=["__all__"])
            assert {alias.name for alias in node.names} <= {*module.__all__, "plan", "__version__"}
    assert len((ROOT / "__main__.py").read_text().splitlines()) < 150
