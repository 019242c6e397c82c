"""A wheel holds what the packages need and nothing heavy else, and works outside the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.bundled import MODELS

ROOT = Path(__file__).parents[1]
PACKAGES = "finetune", "analysis"
LARGEST_BUNDLED = 40_000_000
"""Bytes of all that is bundled: models, tokenizers and text."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves folders behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    stray = source / "finetune" / "bundled" / "__pycache__" / "stray.pyc"  # as imports leave them
    stray.parent.mkdir()
    stray.touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", built, source], check=True)
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a program of an environment that has the wheel, over the packages of this one, in an empty directory."""
    environment, elsewhere = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # Before what an editable install of the repository adds there: the wheel comes first.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(program: str, *arguments: str) -> str:
        variables = os.environ | {"HF_HUB_OFFLINE": "1"}
        variables.pop("PYTHONPATH", None)
        command = [str(environment / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_wheel_holds_every_file_of_the_packages(wheel: Path):
    there = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there == expected


def test_bundled_files_are_small_enough():
    files = [path for path in (ROOT / "finetune" / "bundled").rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) < LARGEST_BUNDLED
    heavy = {path.relative_to(ROOT / "finetune" / "bundled").parts[0] for path in files if path.stat().st_size > 2**20}
    assert heavy == {*MODELS, "text"}


def test_models_load(run: Callable[..., str]):
    code = """
import json
from pathlib import Path
import analysis, finetune
from finetune import recipe
model = analysis.load_bridge("micro-ln-free")
print(json.dumps({
    "files": [analysis.__file__, finetune.__file__],
    "norm": model.cfg.normalization_type,
    "text": model.tokenizer.decode(model.tokenizer.encode("a truth")),
    "recipes": recipe.shipped(),
}))
"""
    found = json.loads(run("python", "-c", code).splitlines()[-1])
    assert not [file for file in found["files"] if Path(file).is_relative_to(ROOT)]
    assert found["norm"] is None
    assert found["text"] == "a truth"
    assert "micro" in found["recipes"]


def test_the_first_snippet_of_the_readme(run: Callable[..., str]):
    """It runs with the TransformerLens that pip installs without constraints: the tests have the newest allowed."""
    newest = re.search(r'"transformer-lens>=.*,<(\d+)"', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"^transformer-lens==(\d+)\.", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert newest is not None
    assert pinned is not None
    assert int(pinned[1]) == int(newest[1]) - 1
    snippet = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert snippet is not None
    assert "gpt2-small_LNFree300" in snippet[1]
    printed = run("python", "-c", snippet[1].replace("gpt2-small_LNFree300", "micro-ln-free"))
    total, logit = map(float, printed.splitlines()[-1].split(" = "))
    assert total == pytest.approx(logit, abs=1e-3)


def test_console_scripts(run: Callable[..., str]):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {*scripts} == {"noln-finetune", "noln-analysis"}
    assert "micro" in run("noln-finetune", "list").split()
    assert run("noln-finetune", "show", "micro").startswith("name: micro")
    assert "report" in run("noln-analysis", "--help")


def test_report(run: Callable[..., str]):
    models = "--original", "micro", "--ln-free", "micro-ln-free"
    assert "page" in run("noln-analysis", "report", *models, "--tokens", "256", "--only", "loss", "--out", "page")
