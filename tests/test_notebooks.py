"""Every notebook runs from a clean kernel on what ships with the package, and what is stored of it is small."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

import analysis
from finetune import sweep
from finetune.bundled import MODELS

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SWEEPS = sorted(FOLDER.glob("sweeps/*.ipynb"))
LARGEST = 1_000_000
"""Bytes of a notebook with its outputs."""

each = pytest.mark.parametrize("path", NOTEBOOKS + SWEEPS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_nine_and_those_of_the_sweeps():
    assert len(NOTEBOOKS) == 9
    assert {path.stem for path in SWEEPS} == {
        "best",
        "cover",
        "data",
        "llama",
        "low_rank",
        "objective",
        "order",
        "pace",
        "removed_vs_never",
        "smollm2",
        "squeeze",
    }


@pytest.mark.slow
@each
def test_runs_from_a_clean_kernel(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    execute = runpy.run_path(str(FOLDER / "execute.py"))["execute"]
    directory = path.parent if path in SWEEPS else tmp_path
    executed = execute(path, directory, "plotly_mimetype")  # no browser is needed for these
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    for cell in cells:
        assert not [output for output in cell.outputs if output.get("name") == "stderr"]


@each
def test_stored_outputs(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) <= LARGEST
    assert not re.search(r"/(?:home|root|tmp|opt|usr|Users|private)/", text)
    assert str(FOLDER.parent) not in text
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    shown = [output for cell in cells for output in cell.outputs]
    assert shown
    assert not [output for output in shown if output.output_type == "error" or output.get("name") == "stderr"]
    for output in shown:
        # What pages show without running anything.
        assert {"text/plain", "image/png"} & {*output.get("data", {"text/plain": output.get("text")})}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_opens_with_how_to_run_it_elsewhere(path: Path):
    first = code_cells(path)[0].source.splitlines()
    assert first[0].startswith("# %pip install")
    instead = re.fullmatch(r"# (MODELS?) = (.*?)  # (?:.*)from the Hub instead", first[1])
    assert instead is not None
    assert first[2].startswith(f"{instead[1]} = ")
    here, there = ({*re.findall(r'"([^"]+)"', line)} for line in (first[2], instead[2]))
    assert here <= {*MODELS}
    bases = {published.base for published in analysis.PUBLISHED.values()}
    assert there <= {*analysis.PUBLISHED} | bases


@each
def test_uses_the_public_api_only(path: Path):
    source = "\n".join(cell.source for cell in code_cells(path))
    assert not re.search(r"(?:from|import) (?:analysis|finetune)\S* import .*\b_\w|\b\w+\._[a-z]", source)


@each
def test_every_plot_is_explained(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    for cell, following in zip(cells, [*cells[1:], None], strict=True):
        shows = cell.cell_type == "code" and "update_layout(" in cell.source
        assert not shows or (following is not None and re.search(r"\bplots?\b.* (?:shows?|say)", following.source))


def test_the_figure_of_the_readme():
    script = runpy.run_path(str(FOLDER / "readme_figure.py"))
    norms, effects = script["measure"](tokens=512)
    colours = script["THEMES"].values()
    light, dark = (script["draw"](norms, effects, **theme) for theme in colours)
    assert len(light.data) == len(dark.data)
    assert light.layout.font.color != dark.layout.font.color
    dots = [trace for trace in light.data if trace.mode == "markers"]
    assert [len(trace.x) for trace in dots] == [len(dots[0].x)] * 2
    assert list(dots[1].x) == pytest.approx(list(dots[1].y), abs=1e-4)  # LN-free: DLA is the direct effect
    for theme in script["THEMES"]:
        assert (FOLDER / "figures" / f"overview-{theme}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("sweeps/*/sweep.yaml")), ids=lambda path: path.parent.name)
def test_a_table_is_that_of_its_sweep(path: Path):
    """No run is missing, none is left of a sweep that was another, and notebooks may name settings in their order."""
    jobs = sweep.load(path, path.parent)
    table = pd.read_csv(path.with_name("results.csv"))
    assert table["run"].tolist() == [job.name for job in jobs]
    finished = table[table["error"].isna()] if "error" in table else table
    documents = pd.read_csv(path.with_name("documents.csv"))
    assert {*documents["run"]} == {*finished["run"]}


def test_the_mixture_for_smollm2_is_the_same_again_and_holds_out_each_kind(tmp_path: Path):
    script = runpy.run_path(str(FOLDER / "sweeps/smollm2/text.py"))
    characters = {"train": 30_000, "held-out": 20_000}
    made = []
    for name in ("first", "second"):
        script["write"](tmp_path / name, characters)
        made.append(
            {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.json*")}
        )
    assert made[0] == made[1]
    kinds = {kind: set() for kind in ("books", "docs", "code", "peps")}
    assert not (tmp_path / "first/train/chat.jsonl").exists()
    assert "<|im_start|>user" in (tmp_path / "first/held-out/chat.jsonl").read_text()
    for part, most in characters.items():
        for kind, seen in kinds.items():
            lines = (tmp_path / f"first/{part}/{kind}.jsonl").read_text().splitlines()
            documents = {json.loads(line)["text"] for line in lines}
            assert len(documents) == len(lines) > 1
            assert most / 2 < sum(map(len, documents)) <= most
            assert not documents & seen
            seen |= documents
    assert all("def " in document or "import" in document for document in kinds["code"])
    assert script["docstrings"]('"""A."""\nx = "no"\nclass C:\n    def f(self):\n        """B."""\n') == "A.\n\nB."
    assert script["docstrings"]("no (") == ""
