"""A run that trains a model from random weights: set up, fit, export and measure. It writes a run directory.

RUN/recipe.yaml    the recipe, replayable, with versions, git state and command
RUN/log.jsonl      one line per step
RUN/checkpoints/   checkpoints of an unfinished fit, to resume from
RUN/model/         the model, with a model card: of the recipe's family or, for a `block`, a GPT2LMHeadModel if the
                   blocks are GPT-2's, else a `blocks.BlocksForCausalLM`
RUN/documents.csv  its loss on each document of held-out text
RUN/results.csv    its loss on the whole held-out text
"""

import copy
import math
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune import begun_with, blocks, checkpoint, evaluate, families, objective
from finetune import recipe as recipes
from finetune.blocks import BlocksConfig, BlocksForCausalLM
from finetune.checkpoints import discard, newest_whole, read_log
from finetune.processes import check_cache, check_processes, decided, with_micro_batch
from finetune.recipe import PretrainRecipe, RecipeError, Text
from finetune.run_directory import Run, directory_lock, make, new_directory, push, render, write, write_recipe
from finetune.text import TextSplits, load_text
from finetune.text.in_memory import Documents, in_file, of_file, take_in
from finetune.training import Record, RunTrainer, attend_without_masks, fuse_gelu

_WATCHED_TOKENS = 2048


def pretrain(
    recipe: str | Path | PretrainRecipe,
    text: str | Path | Text | Documents | None = None,
    out: str | Path | None = None,
) -> Run:
    """Train a model from random weights, and return the run.

    Args:
        recipe: a shipped name, a YAML file, or a recipe.
        text: a source, a `Text`, or documents in memory, as for `remove_norms`. None: the recipe's.
        out: the run directory. None: runs/RECIPE-TIME.

    Raises:
        RecipeError, BlockError, CheckpointError, TextError: the recipe, block, tokenizer or text is invalid. Nothing
            has been trained.
        DivergedError: the loss exploded. The last good checkpoint is in the run directory.
        FileExistsError: `out` exists.
    """
    documents, text = (None, text) if isinstance(text, str | Path | Text | None) else (text, None)
    recipe = recipe if isinstance(recipe, PretrainRecipe) else recipes.load_pretraining(recipe)
    return start(recipes.with_text(recipe, text), out, documents)


def start(recipe: PretrainRecipe, out: str | Path | None = None, documents: Documents | None = None) -> Run:
    """Run `recipe`. If `documents` are given, they replace its text."""
    directory = new_directory(recipe, out)
    with in_file(documents, directory) as file:
        setup = set_up(decided(of_file(recipe, file)))
        setup = replace(setup, recipe=with_micro_batch(setup.recipe, partial(_attempt, setup)))
        directory = make(directory, out)
        setup = replace(setup, recipe=of_file(setup.recipe, take_in(file, directory)))
    if PartialState().is_main_process:
        write_recipe(setup.recipe, directory)
    PartialState().wait_for_everyone()
    return complete(setup, directory)


@dataclass(frozen=True)
class Setup:
    """A recipe and everything that it names, loaded and checked."""

    recipe: PretrainRecipe
    model: PreTrainedModel
    """The model with random weights, which depend only on the seed."""
    tokenizer: PreTrainedTokenizerBase
    text: TextSplits


def set_up(recipe: PretrainRecipe) -> Setup:
    """Load what `recipe` names. The cheapest checks come first.

    Raises:
        RecipeError, BlockError, CheckpointError, TextError: something that it names is invalid, or does not fit the
            rest.
    """
    check_processes(recipe)
    check_cache(recipe)
    tokenizer = checkpoint.load_tokenizer(recipe.tokenizer)
    vocabulary = {
        "vocab_size": len(tokenizer) if recipe.vocab_size is None else recipe.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = _config(recipe, vocabulary) if recipe.family is None else _config_of_family(recipe, vocabulary)
    make = BlocksForCausalLM if recipe.family is None else families.FAMILIES[recipe.family].model_class
    text = load_text(recipe.text, tokenizer, recipe.n_positions, config.vocab_size, seed=recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model = make(config)
    return Setup(recipe, model, tokenizer, text)


def _config(recipe: PretrainRecipe, vocabulary: dict[str, Any]) -> BlocksConfig:
    shape = {name: getattr(recipe, name) for name in ("n_layer", "n_embd", "n_head", "n_positions")}
    return blocks.block_config(recipe.block, **shape | vocabulary | recipe.knobs)


def _config_of_family(recipe: PretrainRecipe, vocabulary: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a model of the recipe's family, without dropout."""
    if recipe.family not in families.FAMILIES:
        raise RecipeError(f"family is {recipe.family}; it must be one of {', '.join(families.FAMILIES)}.")
    config_class: Any = families.FAMILIES[recipe.family].model_class.config_class
    shape = {
        "num_hidden_layers": recipe.n_layer,
        "hidden_size": recipe.n_embd,
        "num_attention_heads": recipe.n_head,
        "max_position_embeddings": recipe.n_positions,
    }
    has = vars(config_class()).keys() | config_class.attribute_map.keys()
    if unknown := sorted(recipe.knobs.keys() - has):
        raise RecipeError(f"knobs contains {', '.join(unknown)}, which {config_class.__name__} does not have.")
    if said := sorted(recipe.knobs.keys() & (shape.keys() | {config_class.attribute_map.get(name) for name in shape})):
        raise RecipeError(f"knobs contains {', '.join(said)}. Set n_layer, n_embd, n_head or n_positions instead.")
    # Use the config's own names: some configs do not accept the common ones.
    own: dict[str, Any] = {config_class.attribute_map.get(name, name): value for name, value in shape.items()}
    if "attention_types" in has:  # GPT-Neo: every other layer is local
        pairs, rest = divmod(recipe.n_layer, 2)
        own["attention_types"] = [[["global", "local"], pairs], [["global"], rest]]
    try:
        config = config_class(**own | vocabulary | recipe.knobs)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise RecipeError(f"A {config_class.__name__} cannot be created from this recipe: {error}") from error
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def complete(setup: Setup, directory: Path, anyway: bool = False) -> Run:
    """Complete a run: fit, export and measure, except for what is done already. For `anyway`, see `resuming.resume`."""
    with directory_lock(directory / "checkpoints", PartialState().is_main_process):
        begun_with.check(directory, setup.recipe, None, setup.text, anyway)
        if not (directory / "model").exists():
            fit(setup, directory, anyway)
            if PartialState().is_main_process:
                export(setup, directory)
            PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            discard(directory / "checkpoints/model")
        return Run(directory, conclude(setup, directory))


def fit(setup: Setup, directory: Path, anyway: bool = False) -> None:
    """Train the model, starting from the newest complete checkpoint in `directory` if there is one."""
    model, implementation = setup.model, setup.model.config._attn_implementation
    trainer = _trainer(setup, directory)
    trainer.train(newest_whole(directory / "checkpoints/model", anyway))
    objective.restore_unembedding(model)
    model.set_attn_implementation(implementation)


def _trainer(setup: Setup, directory: Path) -> "PretrainTrainer":
    """Return a trainer of the model. It changes the model in place."""
    model = setup.model.train()
    fuse_gelu(model)
    attend_without_masks(model, setup.recipe.n_positions)
    objective.defer_unembedding(model)
    return PretrainTrainer(
        model, setup.recipe, setup.text, directory / "checkpoints/model", directory / "log.jsonl", "model"
    )


def _attempt(setup: Setup, size: int) -> None:
    """Try a micro-batch of `size` sequences on a copy of the model."""
    setup = replace(setup, model=copy.deepcopy(setup.model), recipe=replace(setup.recipe, micro_batch=size))
    with tempfile.TemporaryDirectory() as directory:
        _trainer(setup, Path(directory)).try_out()


def export(setup: Setup, directory: Path) -> None:
    """Write the trained model. If its blocks are GPT-2's, write a GPT-2, which can be loaded without this package."""
    model = setup.model
    if isinstance(model, BlocksForCausalLM) and not blocks.other_than_gpt2(model.config):
        model = blocks.to_gpt2(model)
    model.config.use_cache = True  # the Trainer switches it off
    checkpoint.save(model, directory / "model", setup.tokenizer)


def conclude(setup: Setup, directory: Path) -> pd.DataFrame:
    """Measure the model on held-out text, and write the tables and the model card.

    The results have one row: model; loss, in nats/token, and loss_error, its standard error over documents; tokens and
    documents of held-out text; parameters, the number of trained ones; trained_tokens, trained_seconds and
    steps_per_second of the fit.
    """
    state = PartialState()
    if state.is_main_process:
        model = checkpoint.load(directory / "model").to(state.device)
        documents = evaluate.measure_documents({"model": model}, setup.text.held_out, reference="model")
        documents = documents.drop(columns=["kl", "jsd"])
        results = evaluate.compare(documents)[["model", "loss", "loss_error", "tokens", "documents"]]
        last = read_log(directory / "log.jsonl")[-1]
        results["parameters"] = sum(parameter.numel() for parameter in setup.model.parameters())
        results["trained_tokens"] = last["tokens"]
        results["trained_seconds"] = last["seconds"]
        results["steps_per_second"] = setup.recipe.steps / last["seconds"]
        write(directory / "documents.csv", documents.to_csv(index=False))
        write(directory / "results.csv", results.to_csv(index=False))
        card = render(
            "pretrain_card.md.jinja",
            recipe=setup.recipe,
            config=model.config,
            is_plain=not isinstance(model, BlocksForCausalLM),
            results=results.to_dict("records")[0],
        )
        write(directory / "model/README.md", card)
    state.wait_for_everyone()
    if state.is_main_process:  # the other processes do not wait for this
        push(setup.recipe, directory / "model")
    return pd.read_csv(directory / "results.csv")


class PretrainTrainer(RunTrainer):
    """Trains a model with a deferred unembedding (`objective.defer_unembedding`) on next-token cross-entropy.

    Checkpoints are written to `directory`, and one line of JSON per step to `log_path`: model (`name`), step, tokens
    seen so far, the mean loss of the step (nats/token), lr, grad_norm and seconds. For a model of `finetune.blocks`,
    the line also contains signals (`blocks.signals`) every `log_every` steps. They are those of the weights at the
    beginning of the step. They are always measured on the same held-out sequences, so that they depend only on the
    weights, and not on how a batch is divided.
    """

    recipe: PretrainRecipe
    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: PretrainRecipe,
        text: TextSplits,
        directory: Path,
        log_path: Path,
        name: str,
    ) -> None:
        linear: dict[str, Any] = {
            "lr_scheduler_type": "polynomial",
            "lr_scheduler_kwargs": {"lr_end": recipe.min_lr, "power": 1.0},
        }
        super().__init__(
            model,
            recipe,
            text.train,
            directory,
            _PretrainRecord(self, log_path, name),
            **linear if recipe.lr_decay == "linear" else {},
        )
        count = min(len(text.held_out), max(1, _WATCHED_TOKENS // recipe.n_positions))
        self._watched = torch.stack([text.held_out[i]["input_ids"] for i in range(count)])

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return the cross-entropy of the next token."""
        own = model(input_ids=inputs["input_ids"], use_cache=False)
        head = objective.head_of(self.model, own.logits)
        softcap = objective.softcap_of(self.model)
        loss = objective.next_token_loss(
            head, inputs["input_ids"], dtype=self._dtype, softcap=softcap, of_logits=self._of_logits
        )
        self._record.keep(loss.cross_entropy.reshape(1))
        return loss.total

    @torch.no_grad()
    def signals(self) -> dict[str, float | None]:
        """Measure the unwrapped, uncompiled model in float32. A signal that is not finite is None."""
        model: Any = self.model.eval()
        with blocks.signals(model) as values:  # the class's forward: accelerate wraps the model's own in autocast
            type(model).forward(model, self._watched.to(model.device), use_cache=False)
        model.train()
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


class _PretrainRecord(Record):
    trainer: PretrainTrainer

    def measure(self, line: dict[str, Any], losses: Float[Tensor, " part"]) -> list[Tensor]:
        """Log the signals every `log_every` steps. The other processes do not wait for them before the next step."""
        if not isinstance(self.trainer.model, BlocksForCausalLM):
            return []
        if line["step"] % self.trainer.recipe.log_every == 0 and self.trainer.is_world_process_zero():
            line["signals"] = self.trainer.signals()
        return []
