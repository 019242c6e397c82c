"""A run's directory, whatever the run trains: making it, writing into it, and finding what it holds.

What is in it, `removal` and `pretrain` say, which are built on this.
"""

import dataclasses
import importlib.metadata
import itertools
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import pandas as pd
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from finetune import checkpoint
from finetune import recipe as recipes
from finetune.errors import NolnError
from finetune.names import expanded, is_local, public_name
from finetune.processes import processes
from finetune.recipe import PretrainRecipe, Recipe, Training
from finetune.text.in_memory import FILE as TEXT

Trains = TypeVar("Trains", bound=Training)


@dataclass(frozen=True)
class Run:
    """What a run leaves."""

    directory: Path
    """The run directory."""
    results: pd.DataFrame
    """One row per text (held-out, random-tokens, those of `also`) and model (original, control, ln_free), as
    `evaluate.compare` has it; trained_tokens, seconds are of the model's fit. Of pretraining one row (model): see
    `pretrain.conclude`."""

    def load(self, name: str) -> PreTrainedModel:
        """Return the model called `name`: ln_free, control or original; of pretraining model."""
        named = recipe_of(self.directory)
        if name == "original" and isinstance(named, Recipe):
            return checkpoint.load(named.model, named.revision)
        if name == "control" and isinstance(named, Recipe) and (control := control_of(named, self.directory)):
            return checkpoint.load(control)
        return checkpoint.load(self.directory / name)


def recipe_of(directory: Path) -> Recipe | PretrainRecipe:
    """Return the recipe of a run, which may have moved.

    Raises:
        RecipeError: `directory` is no run directory, or its recipe cannot be read.
    """
    recipe = recipes.load_run(directory)
    # What was a model or text in memory, or a GGUF file, moves with the run directory.
    original, text = directory / "original", directory / TEXT
    if isinstance(recipe, Recipe) and original.is_dir():
        recipe = dataclasses.replace(recipe, model=str(original))
    if text.is_file():
        recipe = dataclasses.replace(recipe, text=dataclasses.replace(recipe.text, source=str(text)))
    return recipe


def control_of(recipe: Recipe, directory: Path) -> str | Path | None:
    """Return where the control of a run lies, if it has one: in its directory, or where the recipe takes it from."""
    return (recipe.control_from or directory / "control") if recipe.control else None


def new_directory(recipe: Training, out: str | Path | None) -> Path:
    """Return the run directory that is to be made, the same in all processes.

    Raises:
        FileExistsError: it exists.
    """
    processes(recipe)  # whoever asks first decides for all
    name = re.sub(r"[^\w.-]+", "-", recipe.name)  # no path, whatever a recipe is called
    directory = expanded(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}" if out is None else out)
    directory = Path(broadcast_object_list([str(directory.absolute())])[0])
    if out is not None and directory.exists():
        raise FileExistsError(
            f"{directory} exists, and a run writes over nothing: `resume` it, or name another with --out."
        )
    return directory


def make(directory: Path, out: str | Path | None) -> Path:
    """Make a run directory, the same in all processes: another if that of a run of the same second has its name.

    Raises:
        FileExistsError: it exists, and `out` named it.
        NolnError: it cannot be made there.
    """
    made = directory
    if PartialState().is_main_process:
        for again in itertools.count(2):
            try:
                made.mkdir(parents=True)
                break
            except FileExistsError:
                if out is not None:
                    raise
                made = directory.with_name(f"{directory.name}-{again}")
            except OSError as error:
                raise NolnError(
                    f"The run directory {made} cannot be made: {error}. Name another with --out."
                ) from error
    return Path(broadcast_object_list([str(made)])[0])


def check_links(directory: Path) -> None:
    """Check that nothing in a run directory, which may be somebody else's, leads out of it.

    Raises:
        NolnError: a symbolic link does, and what a run writes or removes would be elsewhere.
    """
    inside = directory.resolve()
    for path in directory.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise NolnError(f"{path} is a symbolic link out of the run directory: put what it leads to in its place.")


def render(template: str, **fields: Any) -> str:
    """Return a template of the package, filled in.

    Its filter `public` is `public_name`; `plain` and `code` make of any text such Markdown as shows it.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("finetune", ""), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"public": public_name, "plain": _plain, "code": _code}
    return environment.get_template(template).render(**fields)


def _plain(text: str) -> str:
    return re.sub(r"[\\`*<>&\[\]|~]", r"\\\g<0>", " ".join(text.split()))


def _code(text: str) -> str:
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def push(recipe: Training, model: Path) -> None:
    """Push a model's directory to the Hub, if the recipe says so."""
    if recipe.push_to_hub is not None:
        HfApi().create_repo(recipe.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=recipe.push_to_hub, folder_path=model)


class InUseError(NolnError):
    """A directory that another process writes into."""


@contextmanager
def directory_lock(directory: Path, is_main_process: bool = True) -> Iterator[None]:
    """Keep other runs out of a directory, which is made; of the processes of one run only the main one holds it.

    Raises:
        InUseError: another run is in it.
    """
    if not is_main_process:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(directory / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise InUseError(f"Another process writes into {directory}: wait until it is done, or stop it.") from error
    with held:
        yield


def write_recipe(recipe: Training, directory: Path) -> None:
    """Write what is going to be run, with what there is to know of it, and say where the run is."""
    tqdm.write(f"The run is in {directory}")
    write(directory / "recipe.yaml", recipes.dump(_absolute(recipe), _provenance()))


def write(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def _absolute(recipe: Trains) -> Trains:
    """Return `recipe` with local paths absolute, so that it can be replayed from anywhere."""

    def absolute(part: Any, *fields: str) -> dict[str, Any]:
        return {field: _absolute_paths(getattr(part, field)) for field in fields if hasattr(part, field)}

    text = dataclasses.replace(recipe.text, **absolute(recipe.text, "source", "held_out"))
    return dataclasses.replace(recipe, **absolute(recipe, "model", "control_from", "tokenizer", "also"), text=text)


def _absolute_paths(names: Any) -> Any:
    """Return a name, several, or none, the local ones as absolute paths."""
    if isinstance(names, tuple):
        return tuple(map(_absolute_paths, names))
    return str(expanded(names).absolute()) if names and is_local(names) else names


def _provenance() -> dict[str, Any]:
    """Return what else there is to know of a run: its time, command, versions, git state and processes."""
    packages = ("noln", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in packages},
        "git": _commit(),
        "processes": PartialState().num_processes,
        "device": str(PartialState().device),
    }


def version_of(package: str) -> str | None:
    """Return which version is installed; this package may be run where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this package, if it is run from a repository of its own and not from within another's."""
    if shutil.which("git") is None:
        return None
    here = Path(__file__)
    for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=12"]):
        git = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=False)
        if git.returncode:
            return None
    return git.stdout.strip()
