"""A run's directory, for either kind of run: creating it, writing into it, and finding its contents.

`removal` and `pretrain` list the contents.
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
    """The result of a run."""

    directory: Path
    """The run directory."""
    results: pd.DataFrame
    """One row per text (held-out, random-tokens, those of `also`) and model (original, control, ln_free), with the
    columns of `evaluate.compare`, and trained_tokens and trained_seconds of the model's fit. For pretraining, one row
    (model): see `pretrain.conclude`."""

    def load(self, name: str) -> PreTrainedModel:
        """Load a model of the run: ln_free, control or original; for pretraining, model."""
        named = recipe_of(self.directory)
        if name == "original" and isinstance(named, Recipe):
            return checkpoint.load(named.model, named.revision)
        if name == "control" and isinstance(named, Recipe) and (control := control_of(named, self.directory)):
            return checkpoint.load(control)
        return checkpoint.load(self.directory / name)


def recipe_of(directory: Path) -> Recipe | PretrainRecipe:
    """Return the recipe of a run, whose directory may have been moved.

    Raises:
        RecipeError: `directory` is not a run directory, or its recipe cannot be read.
    """
    recipe = recipes.load_run(directory)
    # A model or text in memory, or a GGUF file, was copied into the run directory, which may have been moved.
    original, text = directory / "original", directory / TEXT
    if isinstance(recipe, Recipe) and original.is_dir():
        recipe = dataclasses.replace(recipe, model=str(original))
    if text.is_file():
        recipe = dataclasses.replace(recipe, text=dataclasses.replace(recipe.text, source=str(text)))
    return recipe


def control_of(recipe: Recipe, directory: Path) -> str | Path | None:
    """Return the path of a run's control, if it has one: in its directory, or `control_from` of the recipe."""
    return (recipe.control_from or directory / "control") if recipe.control else None


def new_directory(recipe: Training, out: str | Path | None) -> Path:
    """Return the run directory to create, the same in all processes.

    Raises:
        FileExistsError: `out` exists.
    """
    processes(recipe)  # must be the first to create the PartialState, which all share
    name = re.sub(r"[^\w.-]+", "-", recipe.name)  # never a path, whatever the recipe's name
    directory = expanded(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}" if out is None else out)
    directory = Path(broadcast_object_list([str(directory.absolute())])[0])
    if out is not None and directory.exists():
        raise FileExistsError(
            f"{directory} exists, and a run does not overwrite anything. `resume` it, or choose another with --out."
        )
    return directory


def make(directory: Path, out: str | Path | None) -> Path:
    """Create a run directory, and return it, the same in all processes.

    If another run has just created a directory with the same name, a number is appended, unless `out` gave the name.

    Raises:
        FileExistsError: `out` exists.
        NolnError: the directory cannot be created.
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
                    f"The run directory {made} cannot be created: {error}. Choose another with --out."
                ) from error
    return Path(broadcast_object_list([str(made)])[0])


def check_links(directory: Path) -> None:
    """Check that no symbolic link leads out of a run directory, which may come from somebody else.

    Raises:
        NolnError: a link does, so that a run would write or remove files elsewhere.
    """
    inside = directory.resolve()
    for path in directory.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise NolnError(
                f"{path} is a symbolic link out of the run directory. Replace it with a copy of its target."
            )


def render(template: str, **fields: Any) -> str:
    """Render a template of the package.

    Templates can use the filters `public`, which is `public_name`, and `plain` and `code`, which escape text for
    Markdown.
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
    """Push a model's directory to the Hub if the recipe sets `push_to_hub`."""
    if recipe.push_to_hub is not None:
        HfApi().create_repo(recipe.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=recipe.push_to_hub, folder_path=model)


class InUseError(NolnError):
    """Another process is writing into a directory."""


@contextmanager
def directory_lock(directory: Path, is_main_process: bool = True) -> Iterator[None]:
    """Create a directory, and lock it against other runs. Only the main process of a run takes the lock.

    Raises:
        InUseError: another run has locked it.
    """
    if not is_main_process:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(directory / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise InUseError(f"Another process is writing into {directory}. Wait until it is done, or stop it.") from error
    with held:
        yield


def write_recipe(recipe: Training, directory: Path) -> None:
    """Write the recipe that will be run, with its provenance, and print where the run is."""
    tqdm.write(f"The run is in {directory}")
    write(directory / "recipe.yaml", recipes.dump(_absolute(recipe), _provenance()))


def write(path: Path, content: str) -> None:
    """Write a file completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def _absolute(recipe: Trains) -> Trains:
    """Return `recipe` with absolute local paths, so that it can be replayed from any directory."""

    def absolute(part: Any, *fields: str) -> dict[str, Any]:
        return {field: _absolute_paths(getattr(part, field)) for field in fields if hasattr(part, field)}

    text = dataclasses.replace(recipe.text, **absolute(recipe.text, "source", "held_out"))
    return dataclasses.replace(recipe, **absolute(recipe, "model", "control_from", "tokenizer", "also"), text=text)


def _absolute_paths(names: Any) -> Any:
    """Return a name, several names, or None, with local paths made absolute."""
    if isinstance(names, tuple):
        return tuple(map(_absolute_paths, names))
    return str(expanded(names).absolute()) if names and is_local(names) else names


def _provenance() -> dict[str, Any]:
    """Return the provenance of a run: its time, command, versions, git state and processes."""
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
    """Return the installed version of a package, or None. This package can run without being installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this package if it runs from its own git repository, else None."""
    if shutil.which("git") is None:
        return None
    here = Path(__file__)
    for command in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=12"]):
        git = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, check=False)
        if git.returncode:
            return None
    return git.stdout.strip()
