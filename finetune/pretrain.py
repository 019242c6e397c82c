"""A run that trains from random weights: set up, fit, export, measure, and leave a run directory.

RUN/recipe.yaml    what was run, replayable; with versions, git state and command
RUN/log.jsonl      one line a step
RUN/checkpoints/   to resume from
RUN/model/         a GPT2LMHeadModel where the blocks are GPT-2's, else a `blocks.BlocksForCausalLM`; with a model card
RUN/documents.csv  its loss on each document of held-out text
RUN/results.csv    the same on all of it
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from jaxtyping import Float
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from finetune import begun_with, blocks, checkpoint, evaluate, objective
from finetune import recipe as recipes
from finetune.blocks import BlocksConfig, BlocksForCausalLM
from finetune.checkpoints import newest_whole, read_log
from finetune.objective import DeferredUnembedding, Head
from finetune.processes import check_cache, check_processes
from finetune.recipe import PretrainRecipe, Text
from finetune.run_directory import Run, directory_lock, make, new_directory, push, render, write, write_recipe
from finetune.text import TextSplits, load_text
from finetune.training import Record, RunTrainer, fuse_gelu

_WATCHED_TOKENS = 2048


def pretrain(
    recipe: str | Path | PretrainRecipe, text: str | Path | Text | None = None, out: str | Path | None = None
) -> Run:
    """Train a GPT-2-shaped model from random weights, and return what the command writes.

    Args:
        recipe: a shipped name, a YAML file, or a recipe.
        text: a source, or a whole `Text`. None: the recipe's.
        out: the run directory. None: runs/RECIPE-TIME.

    Raises:
        RecipeError, BlockError, CheckpointError, TextError: recipe, block, tokenizer or text do not do; nothing has
            been trained.
        DivergedError: the loss exploded; the last good checkpoint is in the run directory.
        FileExistsError: `out` exists.
    """
    return start(
        recipes.with_text(recipe if isinstance(recipe, PretrainRecipe) else recipes.load_pretraining(recipe), text), out
    )


def start(recipe: PretrainRecipe, out: str | Path | None = None) -> Run:
    """Run `recipe`."""
    directory = new_directory(recipe, out)
    setup = set_up(recipe)
    directory = make(directory, out)
    if PartialState().is_main_process:
        write_recipe(recipe, directory)
    PartialState().wait_for_everyone()
    return complete(setup, directory)


@dataclass(frozen=True)
class Setup:
    """A recipe with all that it names: loaded, checked against each other, and ready to be trained."""

    recipe: PretrainRecipe
    model: BlocksForCausalLM
    """With random weights, which the seed alone decides."""
    tokenizer: PreTrainedTokenizerBase
    text: TextSplits


def set_up(recipe: PretrainRecipe) -> Setup:
    """Load what `recipe` names, the cheapest checks first.

    Raises:
        RecipeError, BlockError, CheckpointError, TextError: they do not do, or not together.
    """
    check_processes(recipe)
    check_cache(recipe)
    tokenizer = checkpoint.load_tokenizer(recipe.tokenizer)
    config = _config(recipe, tokenizer)
    text = load_text(recipe.text, tokenizer, config.n_positions, config.vocab_size, seed=recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        model = BlocksForCausalLM(config)
    return Setup(recipe, model, tokenizer, text)


def _config(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase) -> BlocksConfig:
    return blocks.block_config(
        recipe.block,
        **{
            "n_layer": recipe.n_layer,
            "n_embd": recipe.n_embd,
            "n_head": recipe.n_head,
            "n_positions": recipe.n_positions,
            "vocab_size": len(tokenizer) if recipe.vocab_size is None else recipe.vocab_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **recipe.knobs,
        },
    )


def complete(setup: Setup, directory: Path, anyway: bool = False) -> Run:
    """Do what is still to be done of a run: fit, export and measure; `anyway` is that of `resuming.resume`."""
    with directory_lock(directory / "checkpoints", PartialState().is_main_process):
        begun_with.check(directory, setup.recipe, None, setup.text, anyway)
        if not (directory / "model").exists():
            fit(setup, directory, anyway)
            if PartialState().is_main_process:
                export(setup, directory)
            PartialState().wait_for_everyone()
        return Run(directory, conclude(setup, directory))


def fit(setup: Setup, directory: Path, anyway: bool = False) -> None:
    """Train the model, from the newest whole checkpoint in `directory` on."""
    model = setup.model.train()
    fuse_gelu(model)
    unembedding, model.unembed = model.unembed, DeferredUnembedding(model.unembed, softcap=None)
    trainer = PretrainTrainer(
        model, setup.recipe, setup.text, directory / "checkpoints/model", directory / "log.jsonl", "model"
    )
    trainer.train(newest_whole(directory / "checkpoints/model", anyway))
    model.unembed = unembedding


def export(setup: Setup, directory: Path) -> None:
    """Write the trained model: as a GPT-2 where it is one, which anyone loads without this package."""
    is_gpt2 = not blocks.other_than_gpt2(setup.model.config)
    model = blocks.to_gpt2(setup.model) if is_gpt2 else setup.model
    checkpoint.save(model, directory / "model", setup.tokenizer)


def conclude(setup: Setup, directory: Path) -> pd.DataFrame:
    """Measure the model on held-out text, and write tables and model card.

    The row of results: model; loss, nats/token, and loss_error, its standard error over documents; tokens and documents
    of held-out text; parameters that train; trained_tokens, trained_seconds and steps_per_second of the fit.
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
            config=setup.model.config,
            is_gpt2=isinstance(model, GPT2LMHeadModel),
            results=results.to_dict("records")[0],
        )
        write(directory / "model/README.md", card)
        push(setup.recipe, directory / "model")
    state.wait_for_everyone()
    return pd.read_csv(directory / "results.csv")


class PretrainTrainer(RunTrainer):
    """Trains a model whose unembedding is deferred on the next token.

    `directory` takes the checkpoints, `log_path` one line of JSON a step: model (`name`), step, tokens seen so far, the
    mean of the step's loss (nats/token), lr, grad_norm and seconds; every `log_every` steps signals, of the weights
    that the step begins with: see `blocks.signals`. They are measured on the same held-out sequences each time, so that
    they move with the weights alone, however a batch is shared out.
    """

    recipe: PretrainRecipe
    model: BlocksForCausalLM

    def __init__(
        self,
        model: BlocksForCausalLM,
        recipe: PretrainRecipe,
        text: TextSplits,
        directory: Path,
        log_path: Path,
        name: str,
    ) -> None:
        linear = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": recipe.min_lr, "power": 1.0}}
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
        head = Head(own.logits, self.model.unembed.weight)
        loss = objective.next_token_loss(head, inputs["input_ids"], dtype=self._dtype)
        self._record.keep(loss.cross_entropy.reshape(1))
        return loss.total

    @torch.no_grad()
    def signals(self) -> dict[str, float | None]:
        """Measure the model itself, neither wrapped nor compiled, in float32; None where there is no finite number."""
        model = self.model.eval()
        with blocks.signals(model) as values:  # the class's forward: accelerate wraps the model's own in autocast
            type(model).forward(model, self._watched.to(model.device), use_cache=False)
        model.train()
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


class _PretrainRecord(Record):
    trainer: PretrainTrainer

    def measure(self, line: dict[str, Any], losses: Float[Tensor, " part"]) -> list[Tensor]:
        """Log the signals at the interval; the other processes do not wait for them before the next step."""
        if line["step"] % self.trainer.recipe.log_every == 0 and self.trainer.is_world_process_zero():
            line["signals"] = self.trainer.signals()
        return []
