"""A run that removes LayerNorm: set up, fit, export and compare. It writes a run directory.

RUN/recipe.yaml    the recipe, replayable, with versions, git state and command
RUN/replay.yaml    for an adaptive schedule: the recipe with the steps that the schedule chose
RUN/original/      for a model in memory or a GGUF file: the model, as a directory
RUN/massive_writes.csv  with `longest_write`: the neurons that were scaled down before training
RUN/log.jsonl      one line per step of each fit
RUN/checkpoints/   checkpoints of an unfinished fit, to resume from
RUN/control/       the control: fine-tuned the same way, but with LayerNorm
RUN/ln_free/       without LayerNorm: an ordinary checkpoint of the model's own class, with a model card
RUN/documents.csv  original, control and LN-free on each document of each text: held out, random tokens, and others
RUN/results.csv    the same, averaged over each text
"""

import copy
import dataclasses
import gc
import importlib.util
import itertools
import math
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune import begun_with, checkpoint, evaluate, families, folding, massive_writes, objective, schedule, sharding
from finetune import recipe as recipes
from finetune.bundled import MODELS
from finetune.checkpoints import discard, newest_whole, read_log
from finetune.cover import Cover
from finetune.errors import CheckpointError
from finetune.in_memory import plain_copy, unwrapped
from finetune.names import is_local, public_name
from finetune.processes import check_cache, check_processes, decided, with_micro_batch
from finetune.recipe import Recipe, RecipeError, Text
from finetune.removal_trainer import RemovalTrainer
from finetune.run_directory import (
    Run,
    control_of,
    directory_lock,
    make,
    new_directory,
    push,
    render,
    write,
    write_recipe,
)
from finetune.schedule import Event
from finetune.sites import Sites
from finetune.text import LONGEST_CONTEXT, RANDOM_TOKENS, Blocks, TextSplits, load_blocks, load_text, token_ids
from finetune.text.in_memory import Documents, in_file, of_file, take_in
from finetune.text.sources import path_of
from finetune.training import attend_without_masks, fuse_gelu, in_order

_CHECKED_TOKENS = 2048
"""The number of held-out tokens on which an export is checked."""
_MOST_RANDOM_BLOCKS = 60
"""The maximum number of blocks of random tokens to measure on. Any sample of them is as good as any other."""
HELD_OUT = "held-out"
"""The name in results of the recipe's own held-out text."""
_LARGEST_FROZEN_STD = 1e4
"""At this live std or RMS, √(σ² + eps) differs by 5e-5 from √eps, the constant that a frozen norm divides by."""


def remove_norms(
    model: str | Path | nn.Module | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    text: str | Path | Text | Documents | None = None,
    recipe: str | Path | Recipe = "micro",
    out: str | Path | None = None,
) -> Run:
    """Fine-tune the norms out of a model, and fine-tune a control that keeps them. Return the run.

    Args:
        model: a bundled name, a directory, a GGUF file, a Hub name, or a model in memory, which may be compiled or
            wrapped and is not changed. None: the recipe's.
        tokenizer: a name, a directory, or a tokenizer in memory. Required with a model in memory. None: the model's.
        text: a source; a `Text`; or documents in memory, which are strings or a data set of `datasets`. They are
            written into the run directory, so that the run can be resumed and replayed. None: the recipe's.
        recipe: a shipped name, a YAML file, or a recipe.
        out: the run directory. None: runs/RECIPE-TIME.

    Raises:
        RecipeError, CheckpointError, TextError: the recipe, model or text is invalid. Nothing has been trained.
        DivergedError: the loss exploded. The last good checkpoint is in the run directory.
        FileExistsError: `out` exists.
    """
    documents, text = (None, text) if isinstance(text, str | Path | Text | None) else (text, None)
    recipe = recipes.with_text(recipe if isinstance(recipe, Recipe) else recipes.load(recipe), text)
    if isinstance(model, str | Path):
        recipe, model = dataclasses.replace(recipe, model=str(model), revision=None), None
    model = None if model is None else unwrapped(model)
    return start(recipe, out, model, checkpoint.tokenizer_of(tokenizer), documents)


remove_layernorm = remove_norms  # the former name


def start(
    recipe: Recipe,
    out: str | Path | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    documents: Documents | None = None,
) -> Run:
    """Run `recipe`. A model, tokenizer or text in memory, if given, replaces the one that the recipe names.

    Raises:
        RecipeError, CheckpointError, TextError, DivergedError, FileExistsError: as in `remove_norms`.
    """
    directory = new_directory(recipe, out)
    with in_file(documents, directory) as file:
        setup = set_up(decided(of_file(recipe, file)), model, tokenizer)
        setup = dataclasses.replace(setup, recipe=with_micro_batch(setup.recipe, partial(_attempt, setup)))
        directory = make(directory, out)
        # A run is replayed and resumed from files alone, so a model in memory or a dequantised one is saved.
        recipe = of_file(setup.recipe, take_in(file, directory))
    kept = model is not None or tokenizer is not None or checkpoint.gguf_of(recipe.model) is not None
    if kept:
        recipe = dataclasses.replace(recipe, model=str(directory / "original"), revision=None)
    setup = dataclasses.replace(setup, recipe=recipe)
    if PartialState().is_main_process:
        if kept:
            checkpoint.save(setup.model, directory / "original", setup.tokenizer)
        write_recipe(recipe, directory)
    PartialState().wait_for_everyone()
    return complete(setup, directory)


@dataclass(frozen=True)
class Setup:
    """A recipe and everything that it names, loaded and checked."""

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    events: list[Event]
    text: TextSplits
    elsewhere: dict[str, Blocks]
    """Random tokens and the texts of `recipe.also`, by name, to measure the models on."""


def set_up(
    recipe: Recipe, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Setup:
    """Load what `recipe` names. The cheapest checks come first.

    Raises:
        RecipeError, CheckpointError, TextError: something that it names is invalid, or does not fit the rest.
    """
    check_processes(recipe)
    check_cache(recipe)
    if recipe.lora_rank is not None and importlib.util.find_spec("peft") is None:
        raise RecipeError("lora_rank requires peft. Install it with `pip install 'noln[lora]'`, or omit lora_rank.")
    config = checkpoint.load_config(recipe.model, recipe.revision) if model is None else model.config
    family = families.family_of(config, recipe.model) if model is None else families.family_of(model)
    sites = family.sites_of(config.num_hidden_layers)
    events = schedule.resolve(recipe.schedule, sites, recipe.steps)
    if recipe.control_from is not None:
        checkpoint.load_config(recipe.control_from)
    if tokenizer is None:
        if model is not None:
            raise CheckpointError("A model in memory requires its tokenizer. Pass it as `tokenizer`.")
        tokenizer = checkpoint.load_tokenizer(recipe.model, recipe.revision)
    given, model = model, checkpoint.load(recipe.model, recipe.revision) if model is None else model
    if (norms := folding.norm_state(model)) != "live":
        name = model.name_or_path or "the model in memory"
        raise CheckpointError(f"The norms of {name} are already {norms}, so there is no LayerNorm to remove.")
    model = model if given is None else plain_copy(given)  # a model in memory is not changed, and stays on its device
    context = context_of(recipe, config)
    folding.check_format(model, recipe.export_format)
    if (activation := getattr(config, family.activation)) not in families.ACTIVATIONS:
        loaders = "load_bridge, load_hooked and the report" if config.model_type == "gpt2" else "load_hooked"
        warnings.warn(
            f"TransformerLens does not have the activation {activation}: analysis.{loaders} will refuse the LN-free "
            "model. The other tools take it.",
            stacklevel=2,
        )
    text = load_text(recipe.text, tokenizer, context, config.vocab_size, seed=recipe.seed)
    elsewhere = {
        name: _load_other(source, recipe, tokenizer, context, config)
        for source, name in {RANDOM_TOKENS: RANDOM_TOKENS, **names_of(recipe.also)}.items()
    }
    return Setup(recipe, model, tokenizer, events, text, elsewhere)


def names_of(sources: Sequence[str]) -> dict[str, str]:
    """Return the names of texts in results. Local files are named without directories, unless two names are equal."""
    names = [HELD_OUT, *(public_name(source) for source in sources)]
    return {
        source: name if names.count(name) == 1 else str(Path(source).absolute())
        for source, name in zip(sources, names[1:], strict=True)
    }


def _load_other(
    source: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int, config: PreTrainedConfig
) -> Blocks:
    """Return the first blocks of a text, other than the recipe's own, on which the models are measured."""
    own = recipe.text
    text = Text(source, prefix=own.prefix, token_dtype=own.token_dtype, streaming=not path_of(source).exists())
    most = min(own.held_out_blocks, _MOST_RANDOM_BLOCKS) if source == RANDOM_TOKENS else own.held_out_blocks
    return load_blocks(text, tokenizer, context, config.vocab_size, most=most)


def context_of(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Return the length, in tokens, of the sequences on which `recipe` trains a model with this config.

    Raises:
        RecipeError: it exceeds the model's number of positions, or the model has only one position.
    """
    positions: int = config.max_position_embeddings
    if recipe.context is not None and recipe.context > positions:
        raise RecipeError(f"context is {recipe.context}, but the model has only {positions} positions. Lower it.")
    if (context := recipe.context or min(positions, LONGEST_CONTEXT)) < 2:
        raise RecipeError(f"The model has {positions} position, so a sequence has no next token to predict.")
    return context


def complete(setup: Setup, directory: Path, anyway: bool = False) -> Run:
    """Complete a run: fit, export and compare, except for what is done already. For `anyway`, see `resuming.resume`."""
    with directory_lock(directory / "checkpoints", PartialState().is_main_process):
        begun_with.check(directory, setup.recipe, setup.model, setup.text, anyway)
        fits: dict[str, Sequence[Event]] = {"ln_free": setup.events}
        if setup.recipe.control and setup.recipe.control_from is None:
            fits["control"] = []
        for name, events in fits.items():
            fit(setup, directory, name, events, anyway)
            # The trainer and its record refer to each other. Without this, weights and moments stay in memory.
            gc.collect()
            if PartialState().is_main_process:
                discard(directory / "checkpoints" / name)
        return Run(directory, _conclude(setup, directory))


def _sites(setup: Setup, removes: bool, scaled_in: Path | None = None) -> Sites:
    """Return the sites of a copy of the model that is ready to be trained.

    If `scaled_in` is given, long embeddings and massive writes are scaled down as the recipe says, and a table of the
    writes is written to that directory.
    """
    recipe = setup.recipe
    model = ready(copy.deepcopy(setup.model).float(), setup.text.train.context)
    if removes and recipe.longest_embedding is not None:
        massive_writes.untie(model)
    if scaled_in is not None:
        _scale_down(model, setup, scaled_in)
    sites = Sites(model, setup.tokenizer.eos_token_id, recipe.schedule.classes, recipe.std_mean)
    if recipe.lora_rank is not None:
        from finetune import low_rank  # imports peft, which takes seconds

        low_rank.adapt(sites, recipe)
    return sites


def _trainer(setup: Setup, directory: Path, name: str, events: Sequence[Event]) -> RemovalTrainer:
    """Return a trainer of a copy of the model with these `events`."""
    recipe, context, tokenizer = setup.recipe, setup.text.train.context, setup.tokenizer
    sites = _sites(setup, bool(events), directory if events else None)
    cover = None
    if events and recipe.cover:
        first_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        cover = Cover(recipe, token_ids(tokenizer, setup.model.config.vocab_size), setup.text.train, first_token_id)
    return RemovalTrainer(
        sites,
        recipe,
        events,
        setup.text.train,
        directory / "checkpoints" / name,
        directory / "log.jsonl",
        name,
        teacher=ready(copy.deepcopy(setup.model).float(), context)
        if events and (recipe.kl_weight or recipe.match_weight)
        else None,
        cover=cover,
        decode=lambda token: str(tokenizer.decode([token])),
    )


def fit(setup: Setup, directory: Path, name: str, events: Sequence[Event], anyway: bool = False) -> None:
    """Fine-tune a copy of the model with `events` (none for the control), and export it to `directory`/`name`."""
    if (directory / name).exists():
        return
    recipe, trainer = setup.recipe, _trainer(setup, directory, name, events)
    trainer.train(newest_whole(directory / "checkpoints" / name, anyway))
    if events:
        _check_stds(trainer.sites, setup)
    sites = trainer.sites
    if trainer.shards:
        state = sharding.state_of(sites.model)
        if PartialState().is_main_process:
            sites = _sites(setup, bool(events))
            sites.model.load_state_dict(state, strict=False)  # the state contains tied weights only once
    else:
        objective.restore_unembedding(sites.model)
    if recipe.lora_rank is not None:
        from finetune import low_rank

        low_rank.merge(sites.model)
    if PartialState().is_main_process:
        if trainer.pacing is not None:
            write(directory / "replay.yaml", recipes.dump(_replay(recipe, trainer.events)))
        plain = sites.to_plain()
        if events:
            plain = folding.convert(plain, recipe.export_format)
        plain.config.use_cache = setup.model.config.use_cache  # training switches it off
        plain.set_attn_implementation(setup.model.config._attn_implementation)
        checkpoint.save(plain, directory / name, setup.tokenizer)
    PartialState().wait_for_everyone()


def _scale_down(model: PreTrainedModel, setup: Setup, directory: Path) -> None:
    """Scale down long embeddings and massive writes, measured on the first text, and write a table of the writes.

    Prompts may begin with a special token, although text does not. So each block is also measured behind one.
    """
    recipe, tokenizer = setup.recipe, setup.tokenizer
    if recipe.longest_embedding is None and recipe.longest_write is None:
        return
    count = math.ceil(_CHECKED_TOKENS / setup.text.train.context)
    first = itertools.islice(iter(in_order(setup.text.train, recipe)), count)
    input_ids = torch.stack([block["input_ids"] for block in first])
    if recipe.longest_embedding is not None:
        massive_writes.scale_down_embeddings(model, input_ids.to(model.device), recipe.longest_embedding)
    if recipe.longest_write is not None:
        behind = [input_ids]
        for token_id in sorted({tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}):
            behind.append(torch.cat([torch.full_like(input_ids[:, :1], token_id), input_ids[:, :-1]], dim=1))
        writes = massive_writes.scale_down(model, torch.cat(behind).to(model.device), recipe.longest_write)
        if PartialState().is_main_process:
            frame = pd.DataFrame(writes, columns=massive_writes.MassiveWrite._fields)
            write(directory / "massive_writes.csv", frame.to_csv(index=False))


def _attempt(setup: Setup, size: int) -> None:
    """Try a micro-batch of `size` sequences in the fit of the LN-free model."""
    setup = dataclasses.replace(setup, recipe=dataclasses.replace(setup.recipe, micro_batch=size))
    with tempfile.TemporaryDirectory() as directory:
        _trainer(setup, Path(directory), "ln_free", setup.events).try_out()


@torch.no_grad()
def _check_stds(sites: Sites, setup: Setup) -> None:
    """Check that frozen norms can represent the constants: every live std on held-out text must be far below √eps.

    Raises:
        CheckpointError: a live std is too large. The message names its site.
    """
    held_out = setup.text.held_out
    count = min(len(held_out), max(1, _CHECKED_TOKENS // held_out.context))
    model = sites.model.eval()
    for i in range(count):
        model(input_ids=held_out[i]["input_ids"][None].to(PartialState().device), use_cache=False)
        for name, std in sites.largest_stds().items():
            if std > _LARGEST_FROZEN_STD:
                raise CheckpointError(
                    f"At {name} a live std or RMS is {std:.3g}. This is too close to "
                    f"{math.sqrt(folding.FROZEN_EPS):g}, the square root of a frozen norm's eps, for an ordinary "
                    "checkpoint to represent its constant. Train with a lower lr, or with aux_weight or "
                    "spread_weight, which keep the stds small."
                )


def _replay(recipe: Recipe, events: Sequence[Event]) -> Recipe:
    """Return `recipe` with the steps that an adaptive schedule chose as explicit steps."""
    order = tuple(event.name.removeprefix("merge ") for event in events)
    schedule = dataclasses.replace(
        recipe.schedule, order=order, at=tuple(event.step for event in events), tolerance=None, max_gap=math.inf
    )
    return dataclasses.replace(recipe, schedule=schedule)


def ready(model: PreTrainedModel, context: int) -> PreTrainedModel:
    """Prepare `model`, in place, for training on `context` tokens: no dropout, otherwise the same function."""
    model.config.use_cache = False
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    fuse_gelu(model)
    attend_without_masks(model, context)
    return model


def _conclude(setup: Setup, directory: Path) -> pd.DataFrame:
    """Compare the models on every text, and write the tables and the model cards."""
    state, recipe = PartialState(), setup.recipe
    shards = recipe.shard and state.num_processes > 1
    if shards or state.is_main_process:
        models: dict[str, PreTrainedModel] = {"original": setup.model}
        if control := control_of(recipe, directory):
            models["control"] = checkpoint.load(control)
        models["ln_free"] = checkpoint.load(directory / "ln_free")
        for model in models.values():
            if shards:
                sharding.shard(model)  # all processes measure the same blocks
            else:
                model.to(state.device)
        documents = {
            text: evaluate.measure_documents(models, blocks)
            for text, blocks in ({HELD_OUT: setup.text.held_out} | setup.elsewhere).items()
        }
    if state.is_main_process:
        results = evaluate.by_name({text: evaluate.compare(frame) for text, frame in documents.items()}, "text")
        log = read_log(directory / "log.jsonl")
        spent = {line["model"]: line for line in log}
        for column in ("tokens", "seconds"):
            results[f"trained_{column}"] = [spent.get(name, {}).get(column, 0) for name in results["model"]]
        write(directory / "documents.csv", evaluate.by_name(documents, "text").to_csv(index=False))
        write(directory / "results.csv", results.to_csv(index=False))
        for name in ("control", "ln_free"):
            if (directory / name).is_dir():
                write(directory / name / "README.md", model_card(setup, directory, name, results, log))
    state.wait_for_everyone()
    if state.is_main_process:  # the other processes do not wait for this
        push(setup.recipe, directory / "ln_free")
    return pd.read_csv(directory / "results.csv")


def model_card(setup: Setup, directory: Path, name: str, results: pd.DataFrame, log: list[dict[str, Any]]) -> str:
    """Return the model card of a run's model `name` (control or ln_free), from the run's results and log."""
    model = setup.recipe.model
    base = "a local model" if Path(model) == directory / "original" else Path(model).name
    centred = families.family_of(setup.model).style.centred
    return render(
        "model_card.md.jinja",
        name=name,
        norm="LayerNorm" if centred else "RMSNorm",
        divisor="standard deviation" if centred else "root mean square",
        base=base,
        base_model=None if is_local(model) or model in MODELS else model,
        recipe=setup.recipe,
        config=setup.model.config,
        context=setup.text.train.context,
        sites=sum(len(norm.sites) for norm in folding.norms_of(setup.model)),
        events=[(line["step"], line["frozen"]) for line in log if line["model"] == name and line["frozen"]],
        tokens=setup.recipe.steps * setup.recipe.batch * setup.text.train.context,
        texts={text: frame.to_dict("records") for text, frame in results.groupby("text", sort=False)},
    )
