"""A run that removes LayerNorm: set up, fit, export, compare, and leave a run directory; and what all runs share.

RUN/recipe.yaml    what was run, replayable; with versions, git state and command
RUN/replay.yaml    of an adaptive schedule: the recipe with the steps that it came to
RUN/log.jsonl      one line a step of each fit
RUN/checkpoints/   to resume from
RUN/control/       fine-tuned the same way with LayerNorm kept
RUN/ln_free/       without LayerNorm: an ordinary GPT2LMHeadModel directory, with a model card
RUN/documents.csv  original, control and LN-free on each document of held-out text
RUN/results.csv    the same on all of it
"""

import copy
import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

from finetune import checkpoint, evaluate, schedule
from finetune import recipe as recipes
from finetune.bundled import MODELS, TEXTS
from finetune.checkpoint import CausalLM
from finetune.recipe import PretrainRecipe, Recipe, RecipeError, Text, Training
from finetune.schedule import Event
from finetune.sites import Sites
from finetune.text import TextSplits, load_text
from finetune.trainer import RemovalTrainer, checkpoints

Trains = TypeVar("Trains", bound=Training)


@dataclass(frozen=True)
class Run:
    """What a run leaves."""

    directory: Path
    """The run directory."""
    results: pd.DataFrame
    """A row a model (original, control, ln_free): see `evaluate.compare`; and trained_tokens and seconds of its fit.
    Of pretraining one row (model): see `pretrain.conclude`."""

    def load(self, name: str) -> CausalLM:
        """Return the model called `name`: ln_free, control or original; of pretraining model."""
        named = _recipe_of(self.directory)
        if name == "original" and isinstance(named, Recipe):
            return checkpoint.load(named.model, named.revision)
        if name == "control" and isinstance(named, Recipe) and named.control_from is not None:
            return checkpoint.load(named.control_from)
        return checkpoint.load(self.directory / name)


def remove_layernorm(
    model: str | Path | GPT2LMHeadModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | Path | Text | None = None,
    recipe: str | Path | Recipe = "micro",
    out: str | Path | None = None,
) -> Run:
    """Fine-tune the LayerNorm out of a model, beside a control that keeps it, and return what the command writes.

    Args:
        model: a bundled name, a directory, a Hub name, or a model in memory, which stays as it is. None: the recipe's.
        tokenizer: needed with a model in memory; otherwise the one beside the model is taken.
        text: a source, or a whole `Text`. None: the recipe's.
        recipe: a shipped name, a YAML file, or a recipe.
        out: the run directory. None: runs/RECIPE-TIME.

    Raises:
        RecipeError, CheckpointError, TextError: recipe, model or text do not do; nothing has been trained.
        DivergedError: the loss exploded; the last good checkpoint is in the run directory.
        FileExistsError: `out` exists.
    """
    recipe = with_text(recipe if isinstance(recipe, Recipe) else recipes.load(recipe), text)
    if isinstance(model, str | Path):
        recipe = dataclasses.replace(recipe, model=str(model), revision=None)
    return start(recipe, out, model if isinstance(model, GPT2LMHeadModel) else None, tokenizer)


def with_text(recipe: Trains, text: str | Path | Text | None) -> Trains:
    """Return `recipe` with another text: a source, of which a part is held out, or a whole `Text`. None: its own."""
    if isinstance(text, str | Path) and str(text) == recipe.text.source:
        text = None
    if isinstance(text, str | Path):
        text = dataclasses.replace(recipe.text, source=str(text), held_out=None)
    return recipe if text is None else dataclasses.replace(recipe, text=text)


def start(
    recipe: Recipe,
    out: str | Path | None = None,
    model: GPT2LMHeadModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Run:
    """Run `recipe`, with the model and tokenizer in memory in place of those that it names, if they are given.

    Raises:
        RecipeError, CheckpointError, TextError, DivergedError, FileExistsError: as `remove_layernorm`.
    """
    directory = new_directory(recipe, out)
    setup = set_up(recipe, model, tokenizer)
    if PartialState().is_main_process:
        directory.mkdir(parents=True)
        if model is not None or tokenizer is not None:
            # A run is replayed and resumed from files alone.
            checkpoint.save(setup.model, directory / "original", setup.tokenizer)
            recipe = dataclasses.replace(setup.recipe, model=str(directory / "original"), revision=None)
        write_recipe(recipe, directory)
    PartialState().wait_for_everyone()
    return _complete(setup, directory)


def new_directory(recipe: Training, out: str | Path | None) -> Path:
    """Return the run directory that is to be made, the same in all processes.

    Raises:
        FileExistsError: it exists.
    """
    _processes(recipe)  # whoever asks first decides for all
    directory = Path(out) if out is not None else Path("runs") / f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = Path(broadcast_object_list([str(directory.absolute())])[0])
    if directory.exists():
        raise FileExistsError(f"{directory} exists, and a run writes over nothing: name another with --out.")
    return directory


def resume(directory: str | Path) -> Run:
    """Take up a run of either kind where its newest complete checkpoint is; a complete one is only measured again.

    Raises:
        RecipeError, CheckpointError, TextError, DivergedError: as `remove_layernorm`.
    """
    directory = Path(directory).absolute()
    recipe = _recipe_of(directory)
    if isinstance(recipe, Recipe):
        return _complete(set_up(recipe), directory)
    from finetune import pretrain  # which is built on this module

    return pretrain.complete(pretrain.set_up(recipe), directory)


def _recipe_of(directory: Path) -> Recipe | PretrainRecipe:
    recipe = recipes.load_run(directory)
    # What was a model in memory moves with the run directory.
    original = directory / "original"
    if isinstance(recipe, Recipe) and original.is_dir():
        return dataclasses.replace(recipe, model=str(original))
    return recipe


@dataclass(frozen=True)
class Setup:
    """A recipe with all that it names: loaded, checked against each other, and ready to be trained."""

    recipe: Recipe
    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerBase
    events: list[Event]
    text: TextSplits


def set_up(
    recipe: Recipe, model: GPT2LMHeadModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Setup:
    """Load what `recipe` names, the cheapest checks first.

    Raises:
        RecipeError, CheckpointError, TextError: they do not do, or not together.
    """
    check_processes(recipe)
    config = checkpoint.load_config(recipe.model, recipe.revision) if model is None else model.config
    events = schedule.resolve(recipe.schedule, config.n_layer, recipe.steps)
    if recipe.control_from is not None:
        checkpoint.load_config(recipe.control_from)
    if tokenizer is None:
        if model is not None:
            raise checkpoint.CheckpointError("A model in memory needs its tokenizer: pass it as `tokenizer`.")
        tokenizer = checkpoint.load_tokenizer(recipe.model, recipe.revision)
    # A model in memory stays as it is, on its device and in its mode.
    if model is None:
        model = checkpoint.require_gpt2(checkpoint.load(recipe.model, recipe.revision))
    else:
        model = copy.deepcopy(model).float()
    if (norms := checkpoint.norm_state(model)) != "live":
        raise checkpoint.CheckpointError(
            f"The norms of {recipe.model} are {norms}: there is no LayerNorm left to remove."
        )
    text = load_text(recipe.text, tokenizer, config.n_positions, config.vocab_size, seed=recipe.seed)
    return Setup(recipe, model, tokenizer, events, text)


def _processes(recipe: Training) -> PartialState:
    """Return the processes; without an accelerator they know of each other only if they are told that they are CPUs."""
    return PartialState(cpu=recipe.device == "cpu" or not torch.accelerator.is_available())


def check_processes(recipe: Training) -> None:
    """Check that the device is there, and that the processes can share a batch.

    Raises:
        RecipeError: it is not, or they cannot.
    """
    state = _processes(recipe)
    if recipe.device not in ("auto", state.device.type):
        raise RecipeError(f"device is {recipe.device}, but what torch finds here is {state.device.type}.")
    if recipe.batch % (recipe.micro_batch * state.num_processes):
        raise RecipeError(
            f"A batch of {recipe.batch} cannot be shared by {state.num_processes} processes in micro-batches of "
            f"{recipe.micro_batch}: change micro_batch, batch or the number of processes."
        )


def _complete(setup: Setup, directory: Path) -> Run:
    """Do what is still to be done of a run: fit, export and compare."""
    fit(setup, directory, "ln_free", setup.events)
    if setup.recipe.control and setup.recipe.control_from is None:
        fit(setup, directory, "control", [])
    return Run(directory, _conclude(setup, directory))


def fit(setup: Setup, directory: Path, name: str, events: Sequence[Event]) -> None:
    """Fine-tune a copy of the model through `events` (none: the control), and export it to `directory`/`name`."""
    if (directory / name).exists():
        return
    model = _ready(setup.model)
    recipe = setup.recipe
    sites = Sites(model, setup.tokenizer.eos_token_id, recipe.schedule.classes, recipe.std_mean)
    trainer = RemovalTrainer(
        sites,
        recipe,
        events,
        setup.text.train,
        directory / "checkpoints" / name,
        directory / "log.jsonl",
        name,
        teacher=_ready(setup.model) if events and (recipe.kl_weight or recipe.match_weight) else None,
    )
    saved = checkpoints(directory / "checkpoints" / name)
    trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    if PartialState().is_main_process:
        if trainer.pacing is not None:
            write(directory / "replay.yaml", recipes.dump(_replay(recipe, trainer.events)))
        plain = sites.to_plain()
        if events:
            plain = checkpoint.convert(plain, recipe.export_format)
        checkpoint.save(plain, directory / name, setup.tokenizer)
    PartialState().wait_for_everyone()


def _replay(recipe: Recipe, events: Sequence[Event]) -> Recipe:
    """Return `recipe` with what an adaptive schedule came to as explicit steps."""
    order = tuple(event.name.removeprefix("merge ") for event in events)
    schedule = dataclasses.replace(
        recipe.schedule, order=order, at=tuple(event.step for event in events), tolerance=None, max_gap=math.inf
    )
    return dataclasses.replace(recipe, schedule=schedule)


def _ready(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """Return a copy of `model` as it is run in training: without dropout, the same function otherwise."""
    model = copy.deepcopy(model).float()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fuse_gelu(model)
    return model


def fuse_gelu(model: nn.Module) -> None:
    """Compute GPT-2's activation function in one kernel and not in seven."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")


def _conclude(setup: Setup, directory: Path) -> pd.DataFrame:
    """Compare the models on held-out text, and write the table and the model cards."""
    state = PartialState()
    if state.is_main_process:
        recipe = setup.recipe
        models: dict[str, CausalLM] = {"original": setup.model}
        if recipe.control:
            models["control"] = checkpoint.load(recipe.control_from or directory / "control")
        models["ln_free"] = checkpoint.load(directory / "ln_free")
        documents = evaluate.measure_documents(
            {name: model.to(state.device) for name, model in models.items()}, setup.text.held_out
        )
        results = evaluate.compare(documents)
        log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
        spent = {line["model"]: line for line in log}
        for column in ("tokens", "seconds"):
            results[f"trained_{column}"] = [spent.get(name, {}).get(column, 0) for name in results["model"]]
        write(directory / "documents.csv", documents.to_csv(index=False))
        write(directory / "results.csv", results.to_csv(index=False))
        for name in ("control", "ln_free"):
            if (directory / name).is_dir():
                write(directory / name / "README.md", _card(setup, name, results, log))
        push(recipe, directory / "ln_free")
    state.wait_for_everyone()
    return pd.read_csv(directory / "results.csv")


def _card(setup: Setup, name: str, results: pd.DataFrame, log: list[dict[str, Any]]) -> str:
    return render(
        "model_card.md.jinja",
        name=name,
        base=Path(setup.recipe.model).name,
        recipe=setup.recipe,
        config=setup.model.config,
        events=[(line["step"], line["frozen"]) for line in log if line["model"] == name and line["frozen"]],
        tokens=setup.recipe.steps * setup.recipe.batch * setup.model.config.n_positions,
        results=results.to_dict("records"),
    )


def render(template: str, **fields: Any) -> str:
    """Return a template of the package, filled in."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("finetune", ""), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(**fields)


def push(recipe: Training, model: Path) -> None:
    """Push a model's directory to the Hub, if the recipe says so."""
    if recipe.push_to_hub is not None:
        HfApi().create_repo(recipe.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=recipe.push_to_hub, folder_path=model)


def write_recipe(recipe: Training, directory: Path) -> None:
    """Write what is going to be run, with what there is to know of it."""
    write(directory / "recipe.yaml", recipes.dump(_absolute(recipe), _provenance()))


def write(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def _absolute(recipe: Trains) -> Trains:
    """Return `recipe` with local paths made absolute, so that it can be replayed from anywhere."""

    def absolute(part: Any, *fields: str) -> dict[str, Any]:
        names = {field: getattr(part, field) for field in fields if hasattr(part, field)}
        return {
            field: str(Path(name).absolute()) if name and name not in MODELS | TEXTS and Path(name).exists() else name
            for field, name in names.items()
        }

    text = dataclasses.replace(recipe.text, **absolute(recipe.text, "source", "held_out"))
    return dataclasses.replace(recipe, **absolute(recipe, "model", "control_from", "tokenizer"), text=text)


def _provenance() -> dict[str, Any]:
    """Return what else there is to know of a run: its time, command, versions, git state and processes."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    packages = ("noln", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "git": git.stdout.strip() or None,
        "processes": PartialState().num_processes,
        "device": str(PartialState().device),
    }
