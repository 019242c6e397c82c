"""Execute the notebooks in place, each from a clean kernel: `make notebooks`, or `python notebooks/execute.py FILE…`.

Figures are stored as PNG, which every page can show. This needs the extra `png`, and Chrome or Chromium.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = "application/vnd.jupyter.widget-view+json"
NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
SWEEPS = sorted(Path(__file__).parent.glob("sweeps/*.ipynb"))
"""These read the tables in their folder."""


def execute(path: Path, directory: str | Path, renderer: str) -> nbformat.NotebookNode:
    """Execute the notebook `path` in `directory` and return it, with figures from plotly's `renderer`."""
    notebook = nbformat.read(path, as_version=4)
    environment = os.environ | {"PLOTLY_RENDERER": renderer, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    client = NotebookClient(
        notebook,
        timeout=1800,
        startup_timeout=600,
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(directory)}},
    )
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # drop progress bars
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            for output in cell.outputs:
                if "text" in output:
                    output["text"] = output["text"].replace(f"{directory}{os.sep}", "")
    notebook.metadata["language_info"] = {"name": "python"}  # drop the Python version
    return notebook


if __name__ == "__main__":
    for path in [Path(argument).absolute() for argument in sys.argv[1:]] or NOTEBOOKS + SWEEPS:
        print(path.name, flush=True)
        with tempfile.TemporaryDirectory() as directory:
            executed = execute(path, path.parent if path in SWEEPS else directory, "png")
        nbformat.write(executed, path)
