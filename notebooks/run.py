"""Execute the notebooks and store their outputs in them: `python notebooks/run.py`.

The documentation shows the stored outputs, and a test compares them with a new run. A cell whose
numbers differ a little between machines and backends has the tag "varies".
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def executed(path, folder):
    """A notebook with the outputs of a new run, and nothing that tells where or when it was.

    Args:
        path: of the notebook, which stays as it is.
        folder: where its kernel runs.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # On stderr TensorFlow says what it finds on a machine.
            cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


if __name__ == "__main__":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["IPYTHONDIR"] = folder  # no one's profile or history
        for path in NOTEBOOKS:
            nbformat.write(executed(path, folder), path)
            print(path)
