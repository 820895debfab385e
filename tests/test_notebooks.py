"""Every notebook is stored with its outputs, and they are what a run gives."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPT = runpy.run_path(str(FOLDER / "run.py"))
NOTEBOOKS = SCRIPT["NOTEBOOKS"]
TEXTS = ("text/plain", "image/svg+xml")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def varies(cell):
    return "varies" in cell.metadata.get("tags", ())


def texts(cell):
    """What a cell's outputs say: a list of dicts of str. Numbers that vary are left out."""
    found = []
    for output in cell.outputs:
        assert output.output_type != "error"
        said = {"text": output.text} if output.output_type == "stream" else output.data
        said = {kind: text for kind, text in said.items() if kind in ("text", *TEXTS)}
        if varies(cell):
            said = {kind: re.sub(r"\d[\d.e+-]*", "#", text) for kind, text in said.items()}
        found.append(said)
    return found


def test_there_is_a_notebook():
    assert NOTEBOOKS


@each_notebook
def test_it_is_valid_and_stored_as_it_was_run(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert sum(map(bool, (cell.outputs for cell in cells))) > len(cells) / 2
    assert path.stat().st_size < 500_000


@each_notebook
def test_it_says_nothing_of_where_and_when_it_was_run(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
    for cell in code_cells(notebook):
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        for said in texts(cell):
            folders = r"""(?:^|[\s'"(=])/[\w.-]+/|[A-Z]:\\"""
            assert not any(re.search(folders, text) for text in said.values())


@each_notebook
def test_its_outputs_are_what_a_run_gives(path, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # no one's profile or history
    stored = nbformat.read(path, as_version=4)
    found = SCRIPT["executed"](path, tmp_path)
    for cell, now in zip(code_cells(stored), code_cells(found), strict=True):
        assert texts(cell) == texts(now), "run `python notebooks/run.py`"
