"""What README and docs say can be done is done here: snippets and commands are run on little text and for few steps.

Commands that pretrain or sweep are read as far as their flags, recipes and files; tests of their own run such ones.

What they mark `# from the Hub` is checked up to the download: commands as far as their flags, recipes and files,
snippets with the bundled LN-free model in place of the published one.
"""

import importlib.util
import pydoc
import re
import runpy
import shlex
import subprocess
import tomllib
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch.distributed.run

import analysis
import analysis.__main__
import finetune.__main__
from analysis.strings import TL4
from finetune import recipe as recipes
from finetune import sweep
from finetune.bundled import MODELS
from finetune.processes import check_processes

ROOT = Path(__file__).parents[1]
PAGES = {
    page: page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README, CONTRIBUTING = PAGES[ROOT / "README.md"], PAGES[ROOT / "CONTRIBUTING.md"]
DOCS = "\n".join(PAGES.values())
HUB = "# from the Hub"


def blocks(language: str, text: str = DOCS) -> list[str]:
    """The blocks of code in a language, each once."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return list(dict.fromkeys(code for its_language, code in fenced if its_language == language))


COMMANDS = list({line.split("  #")[0].strip(): line for block in blocks("sh") for line in block.splitlines()}.values())
"""Each once, whatever the comments say."""
INLINE = sorted(set(re.findall(r"`(python -m [^`]+)`", DOCS)))

STAND_INS = {"schaeff/gpt2-small_LNFree300": str(MODELS["micro-ln-free"]), "gpt2-small_LNFree300": "micro-ln-free"}
"""For published models, in snippets."""
PLACEHOLDERS = {"runs/RUN/recipe.yaml": "micro", "RECIPE": "micro", "FILE": "notebooks/sweeps/best/sweep.yaml"}
"""For what a reader is to fill in, in commands that are parsed and not run."""
LITTLE = {
    "run": ["--batch", "2", "--micro-batch", "2", "--text.held-out-blocks", "2"],
    "report": ["--tokens", "256", "--only", "loss"],
}
"""What commands that are run are given beside their own flags."""
FEW_STEPS = "6"


class Reached(Exception):  # noqa: N818
    """A command has been understood, and would begin its work."""


def split(command: str) -> tuple[str, list[str]]:
    """The module and the arguments of a command for python or torchrun."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
    if words[0] == "torchrun":
        parsed = torch.distributed.run.parse_args(words[1:])
        assert parsed.module
        return parsed.training_script, parsed.training_script_args
    assert words[:2] == ["python", "-m"]
    return words[2], words[3:]


def call(module: str, arguments: list[str]) -> None:
    {"finetune": finetune.__main__.main, "analysis": analysis.__main__.main}[module](arguments)


@pytest.mark.parametrize("command", COMMANDS + INLINE)
def test_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch):
    def reach(recipe=None, *_, **__):
        if command.startswith("torchrun"):
            several = torch.distributed.run.parse_args(shlex.split(command, comments=True)[1:])
            state = mock.Mock(num_processes=int(several.nproc_per_node), device=torch.device("cpu"))
            monkeypatch.setattr("finetune.processes.processes", lambda _: state)
            check_processes(recipe)
        raise Reached

    def read_sweep(path: Path, *_):
        assert sweep.load(path, "runs")
        raise Reached

    for work in (
        "finetune.removal.start",
        "finetune.resuming.resume",
        "finetune.pretrain.start",
        "finetune.plan.plan",
        "analysis.report.run",
        "analysis.graph.page.run",
    ):
        monkeypatch.setattr(work, reach)
    monkeypatch.setattr("finetune.sweep.run", read_sweep)
    monkeypatch.chdir(ROOT)
    if command.startswith("make "):
        subprocess.run(["make", "--dry-run", command.split()[1]], check=True, capture_output=True)
        return
    module, arguments = split(command)
    if module == "pydoc":
        documentation = pydoc.plain(pydoc.render_doc(arguments[0]))
        public = getattr(importlib.import_module(arguments[0]), "__all__", ["measure", "plot"])
        assert not [name for name in public if not re.search(rf"^    (?:class )?{name}\b", documentation, re.MULTILINE)]
    elif module not in ("finetune", "analysis"):
        assert importlib.util.find_spec(f"{module}.__main__")
    elif "--help" in arguments:
        with pytest.raises(SystemExit) as left:
            call(module, arguments)
        assert not left.value.code
    elif arguments[:1] in (["list"], ["show"]) or (module == "analysis" and not arguments):
        call(module, arguments)
    else:
        with pytest.raises(Reached):
            call(module, arguments)
    for flag in ("--control", "--ln-free"):
        if flag in arguments:
            assert arguments[arguments.index(flag) + 1] in {*analysis.PUBLISHED, *MODELS}


@pytest.mark.slow
def test_commands_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = []
    for command in COMMANDS:
        is_ours = command.startswith(
            ("python -m finetune run micro ", "python -m finetune resume", "python -m analysis")
        )
        if not is_ours or HUB in command:
            continue
        module, arguments = split(command)
        if "--steps" in arguments:
            arguments[arguments.index("--steps") + 1] = FEW_STEPS
        elif arguments[0] == "run":
            arguments += ["--steps", FEW_STEPS]
        call(module, arguments + LITTLE.get(arguments[0], []))
        run.append(arguments[0])
    assert sorted(run) == ["graph", "report", "report", "resume", "run", "run", "run"]
    table = re.search(r"^\| file \| what \|\n\|---\|---\|\n((?:\|.*\n)+)", DOCS, re.MULTILINE)
    assert table is not None
    files = {name for row in table[1].splitlines() for name in re.findall(r"`([\w./]+)`", row.split("|")[1])}
    # Of a schedule with a tolerance, of a model in memory or a GGUF file, and with `longest_write`.
    files -= {"replay.yaml", "original/", "massive_writes.csv"}
    assert {path.name for path in Path("runs/short").iterdir()} == {name.rstrip("/") for name in files}


@pytest.mark.slow
@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda snippet: snippet.split("\n\n")[1].split("\n")[0])
def test_snippet_runs(
    snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    load = recipes.load

    def load_little(name: str) -> recipes.Recipe:
        recipe = load(name)
        if name != "micro":
            return recipe
        little = {"steps": int(FEW_STEPS), "batch": 2, "micro_batch": 2, "text.held_out_blocks": 2}
        return recipes.override(recipe, little, "recipe")

    monkeypatch.setattr("finetune.recipe.load", load_little)
    monkeypatch.chdir(tmp_path)
    if HUB in snippet:
        published, stand_in = next(pair for pair in STAND_INS.items() if f'"{pair[0]}"' in snippet)
        assert published in analysis.PUBLISHED or published in [model.id for model in analysis.PUBLISHED.values()]
        snippet = snippet.replace(published, stand_in)
    file = tmp_path / "snippet.py"  # nnsight reads the source
    file.write_text(snippet, encoding="utf-8")
    if "load_hooked(" in snippet and TL4:
        with pytest.raises(ImportError, match="pip install 'transformer-lens<4'"):
            runpy.run_path(str(file))
        return
    left = runpy.run_path(str(file))
    printed = capsys.readouterr().out
    if "logit_attrs" in snippet and "print" in snippet:
        total, logit = map(float, printed.splitlines()[-1].split(" = "))
        assert total == pytest.approx(logit, abs=1e-3)
    if "frame" in left:
        assert isinstance(left["frame"], pd.DataFrame)
        assert len(left["frame"])
    if "text" in left:
        assert isinstance(left["text"], str)


LINKS = sorted(
    {
        (page, found[1] or found[2])
        for page, text in PAGES.items()
        for found in re.finditer(r"\]\(([^):]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    }
)


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda value: value.name if isinstance(value, Path) else value)
def test_link_leads_somewhere(page: Path, link: str):
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.is_file()
    if anchor:
        titles = re.findall(r"^#+ (.*)$", PAGES[target], re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_takes_five_minutes():
    assert len(README.splitlines()) <= 250


def test_modules_are_named():
    tree = next(block for block in blocks("") if block.startswith("finetune/"))
    for package in ("finetune", "analysis"):
        part = re.search(rf"^{package}/.*\n((?:  .*\n)+)", tree, re.MULTILINE)
        assert part is not None
        named = {*re.findall(r"\b\w+\.py\b", part[1])}
        top, all_of_them = ({path.name for path in (ROOT / package).glob(files)} for files in ("*.py", "**/*.py"))
        assert top - {"__init__.py", "__main__.py"} <= named <= all_of_them
        packages = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert {*re.findall(r"\b(\w+)/(?=[, ])", part[1])} == packages
    analyses = set(re.findall(r"^\| .*\? \| `(\w+)`", DOCS, re.MULTILINE))
    assert analyses - {"loading"} == {entry.name for entry in importlib.import_module("analysis.report").ANALYSES} | {
        "benchmarks"
    }


def test_extras_and_scripts():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {*re.findall(r"extra `(\w+)`", DOCS), *re.findall(r"\.\[(\w+)\]", DOCS)}
    assert extras
    assert extras <= {*project["optional-dependencies"]}
    assert {*re.findall(r"`(noln-\w+)`", DOCS)} == {*project["scripts"]}


def test_every_shipped_recipe_is_named():
    assert {*recipes.shipped()} <= {*re.findall(r"`([\w.-]+)`", DOCS)}
