"""`transformers.Trainer` with the schedule as a callback, a log of every step, and checkpoints that are whole.

An optimizer step, in order:
1. Sites are brought to where the schedule has them (`Sites.advance`).
2. For each micro-batch: forward, loss, backward; the live stds of the forward are kept (`Sites.observe`).
3. The losses, copied to the host since the forward, are checked before the weights move.
4. The stds of all micro-batches and processes go into the running means (`Sites.update`); the optimizer steps.
5. The step's record waits on the device until the next report, so that no step waits for the device.
"""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune import NolnError, objective
from finetune.recipe import Recipe
from finetune.schedule import Event
from finetune.sites import Sites
from finetune.text import Blocks


class DivergedError(NolnError):
    """The loss is not finite, or has exploded; the message says when, and what froze last."""


class NotSavedError(NolnError):
    """A checkpoint could not be written: a full disk, or a directory that is not to be written to."""


class RemovalTrainer(Trainer):
    """Trains a model with `Sites` in it through a schedule; with no events it is the control.

    `directory` takes the checkpoints, `log_path` one line of JSON a step: model (`name`), step, tokens seen so far,
    loss (cross-entropy, nats/token) and aux (the auxiliary loss), means over the step, lr, grad_norm, frozen (what
    froze at this step) and seconds; every `log_every` steps also std, for each site the live and the frozen stds by
    class of token.
    """

    def __init__(
        self,
        sites: Sites,
        recipe: Recipe,
        events: Sequence[Event],
        text: Dataset[dict[str, Tensor]],
        directory: Path,
        log_path: Path,
        name: str,
    ) -> None:
        self.sites, self.recipe, self.events = sites, recipe, list(events)
        self.directory = directory
        self._partial: Path | None = None
        self._record = _Record(self, log_path, name)
        super().__init__(
            model=sites.model,
            args=_arguments(recipe, directory),
            train_dataset=_in_order(text, recipe),
            callbacks=[self._record],
        )
        self.remove_callback(PrinterCallback)
        # Mean losses of equally long micro-batches: the Trainer divides by their number, `forward` knows nothing of it.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return cross-entropy, plus the auxiliary loss where a schedule is run."""
        input_ids = inputs["input_ids"]
        cross_entropy = objective.cross_entropy(model(input_ids=input_ids, use_cache=False).logits, input_ids)
        auxiliary = cross_entropy.new_zeros(())
        if self.events and self.recipe.aux_weight:
            auxiliary = objective.auxiliary_loss(self.sites.norms[-1].live_std, self.sites.classes.index)
        self._record.keep(torch.stack([cross_entropy.detach(), auxiliary.detach()]))
        return cross_entropy + self.recipe.aux_weight * auxiliary

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch forward and backward, and observe its stds once, recomputed or not."""
        loss = super().training_step(*args, **kwargs)
        self.sites.observe()
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the line of the progress bar, however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._record.bar.close()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Go through the text, unless the last step is done: a stream, which has no end, would begin anew."""
        self.control.should_training_stop = self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, *args: Any, **kwargs: Any
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Let the cosine end at the recipe's horizon, which may lie beyond the run."""
        return super().create_scheduler(self.recipe.horizon, *args, **kwargs)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Decay matrices, and no vectors: the Trainer's own rule would decay the gains of a norm of ours."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        self._record.grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self._record.grad_norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial or self.directory)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint under another name and rename it: one that has its name is whole."""
        self._record.write()
        self._partial = self.directory / "partial"
        if self.args.should_save:
            shutil.rmtree(self._partial, ignore_errors=True)
        PartialState().wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise NotSavedError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {self.directory}: {error}. "
                "Make room, then go on from the last one with `python -m finetune resume`."
            ) from error
        PartialState().wait_for_everyone()
        if self.args.should_save:
            for checkpoint in self._partial.iterdir():
                whole = self.directory / checkpoint.name
                shutil.rmtree(whole, ignore_errors=True)  # one that is there is not whole, or would not be written anew
                checkpoint.rename(whole)
            for checkpoint in checkpoints(self.directory)[:-2]:
                shutil.rmtree(checkpoint)
        self._partial = None


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, oldest first."""
    complete = (path.parent for path in directory.glob("checkpoint-*/trainer_state.json"))
    return sorted(complete, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _arguments(recipe: Recipe, directory: Path) -> TrainingArguments:
    bf16 = recipe.bf16
    if bf16 is None:
        bf16 = recipe.device in ("auto", "cuda") and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // (recipe.micro_batch * PartialState().num_processes),
        train_sampling_strategy="sequential",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": recipe.min_lr},
        warmup_steps=recipe.warmup,
        optim="adamw_torch_fused",
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip,
        bf16=bf16,
        torch_compile=recipe.compile,
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=recipe.device == "cpu",
        # Statistics are summed over processes; rank 0's buffers are not to be copied over the others'.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        seed=recipe.seed,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_every,
        report_to=list(recipe.report_to),
        disable_tqdm=True,
    )
    if recipe.compile and recipe.gradient_checkpointing:
        # No need to keep live stds again when a forward is recomputed. (Without it, or before torch has it: as many
        # graphs as blocks.)
        with contextlib.suppress(AttributeError):
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    if arguments.n_gpu > 1:
        # Several GPUs are used by several processes (torchrun), never by one process's threads.
        arguments._n_gpu = 1
    return arguments


def _in_order(text: Dataset[dict[str, Tensor]], recipe: Recipe) -> Dataset[dict[str, Tensor]]:
    """Return the sequences of the whole run, pass after shuffled pass: their order depends on the seed alone."""
    if isinstance(text, IterableDataset):
        return text
    assert isinstance(text, Blocks)
    rng = np.random.default_rng(recipe.seed)
    needed = recipe.steps * recipe.batch
    passes = [rng.permutation(len(text)) for _ in range(math.ceil(needed / len(text)))]
    return Subset(text, np.concatenate(passes)[:needed].tolist())


class _Record(TrainerCallback):
    """Runs the schedule, checks the losses, writes the log and moves the progress bar."""

    def __init__(self, trainer: RemovalTrainer, path: Path, name: str) -> None:
        self.trainer, self.path, self.name = trainer, path, name
        self.bar = tqdm(disable=True)
        self.grad_norm: Tensor
        self._losses: list[Tensor] = []
        self._on_host: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._lines: list[tuple[dict[str, Any], Tensor]] = []

    def keep(self, losses: Float[Tensor, "2"]) -> None:
        """Keep cross-entropy and auxiliary loss of a micro-batch, and start to copy them to the host."""
        self._losses.append(losses)
        self._on_host.append(losses.to("cpu", non_blocking=losses.is_cuda))
        if losses.is_cuda:
            self._copied = torch.cuda.current_stream().record_event()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Cut the log back to where the run stands."""
        written = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        lines = [json.loads(line) for line in written if line.endswith("\n")]
        lines = [line for line in lines if line["model"] != self.name or line["step"] < state.global_step]
        own = [line for line in lines if line["model"] == self.name]
        self._first = [line["loss"] for line in own[:10]]
        self._begin = time.monotonic() - (own[-1]["seconds"] if own else 0)
        begun = [event.name for event in self.trainer.events if event.step < state.global_step]
        self._frozen = begun[-1] if begun else "none"
        if args.should_save:
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            partial.replace(self.path)
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit="step",
            disable=not state.is_local_process_zero,
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Bring the sites to where the schedule has them."""
        self._begun = [event.name for event in self.trainer.sites.advance(self.trainer.events, state.global_step)]
        if self._begun:
            self._frozen = self._begun[-1]
        if self.trainer.events and state.global_step == self.trainer.events[-1].end:
            compiling = ", the compiled model is compiled once more" if args.torch_compile else ""
            self.bar.write(f"Step {state.global_step}: every norm is a constant from here on{compiling}.")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the loss before the weights move, and record the step."""
        if self._copied is not None:
            self._copied.synchronize()  # the forward is done; the backward still keeps the device busy
        loss = float(torch.stack(self._on_host)[:, 0].mean())
        self._check(loss, state.global_step)
        live = self.trainer.sites.update(self.trainer.recipe.std_decay)
        recipe, step = self.trainer.recipe, state.global_step
        line = {
            "model": self.name,
            "step": step,
            "tokens": (step + 1) * recipe.batch * self.trainer.sites.model.config.n_positions,
            "lr": kwargs["lr_scheduler"].get_last_lr()[0],
            "frozen": self._begun,
            "seconds": round(time.monotonic() - self._begin, 3),
        }
        losses = self.trainer.accelerator.reduce(torch.stack(self._losses).mean(0), "mean")
        values = [losses, self.grad_norm.reshape(1)]
        if step % recipe.log_every == 0:
            values += [live.flatten(), self.trainer.sites.constants().flatten()]
        self._lines.append((line, torch.cat([value.to(losses) for value in values])))
        self._losses.clear()
        self._on_host.clear()
        self.bar.set_postfix(loss=f"{loss:.3f}", frozen=self._frozen, refresh=False)

    def _check(self, loss: float, step: int) -> None:
        usual = sum(self._first) / len(self._first) if self._first else math.inf
        if math.isfinite(loss) and loss <= usual + self.trainer.recipe.max_rise:
            if len(self._first) < 10:
                self._first.append(loss)
            return
        self.write()
        raise self._diverged(
            f"the loss is {loss:.3f} nats/token at step {step}, more than max_rise={self.trainer.recipe.max_rise:g} "
            "above that of the first steps"
        )

    def _diverged(self, what: str) -> DivergedError:
        saved = checkpoints(self.trainer.directory)
        return DivergedError(
            f"{self.name}: {what}; the last to freeze was {self._frozen}. "
            f"The last good checkpoint is {saved[-1] if saved else 'none, the run had just begun'}. Larger gaps in "
            "the schedule, a lower lr and a higher min_lr make the removal steadier."
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the log at every report."""
        self.bar.update()
        if state.global_step % args.logging_steps == 0:
            self.write()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the rest of the log."""
        self.write()

    def write(self) -> None:
        """Bring the records of the last steps to the host in one copy, append them to the log, and check gradients.

        A gradient that is not finite has spoilt the weights, although its loss was good: no checkpoint follows it.
        """
        if not self._lines:
            return
        on_host = torch.cat([values for _, values in self._lines]).cpu()
        split = on_host.split([len(values) for _, values in self._lines])
        if self.trainer.args.should_save:
            with self.path.open("a") as file:
                for (line, _), numbers in zip(self._lines, split, strict=True):
                    file.write(json.dumps(line | self._named(numbers, line["step"])) + "\n")
        spoilt = [
            line["step"] for (line, _), numbers in zip(self._lines, split, strict=True) if not numbers[2].isfinite()
        ]
        self._lines.clear()
        if spoilt:
            raise self._diverged(f"the gradient is not finite at step {spoilt[0]}")

    def _named(self, numbers: Float[Tensor, " number"], step: int) -> dict[str, Any]:
        loss, aux, grad_norm, *stds = numbers.tolist()
        named: dict[str, Any] = {"loss": loss, "aux": aux, "grad_norm": grad_norm}
        if stds:
            sites = list(self.trainer.sites)
            live, constants = torch.tensor(stds).view(2, len(sites), -1)
            begun = {event.name for event in self.trainer.events if event.step <= step}
            named["std"] = {
                site: {
                    "live": [None if math.isnan(std) else std for std in live[i].tolist()],
                    "frozen": constants[i].tolist() if site in begun else None,
                }
                for i, site in enumerate(sites)
            }
        return named
