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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import (
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finetune import NolnError, objective, schedule
from finetune.objective import Head
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
    means over the step of loss (cross-entropy, nats/token), of kl and distance to the teacher (0 without one) and of
    aux (the auxiliary loss), lr, grad_norm, frozen (what froze at this step) and seconds; with a teacher
    teacher_seconds, of its forward but for the unembedding; every `log_every` steps std, for each site the live and the
    frozen stds by class of token.
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
        teacher: GPT2LMHeadModel | None = None,
    ) -> None:
        self.sites, self.recipe, self.removes = sites, recipe, bool(events)
        adaptive = self.removes and recipe.schedule.tolerance is not None
        self.pacing = schedule.Pacing(events, recipe.schedule, recipe.steps) if adaptive else None
        self.events = [] if adaptive else list(events)  # with a pacing, those that have begun
        sites.defer_unembedding()
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
        self._dtype = torch.bfloat16 if self.args.bf16 else None
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).to(device=self.args.device, dtype=self._dtype)  # type: ignore[call-arg]
        self._matches = teacher is not None and recipe.match_weight > 0
        # Mean losses of equally long micro-batches: the Trainer divides by their number, `forward` knows nothing of it.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return the loss of the next token, plus the auxiliary loss where a schedule is run."""
        input_ids, recipe = inputs["input_ids"], self.recipe
        own = model(input_ids=input_ids, use_cache=False, output_hidden_states=self._matches)
        head, teacher = Head(own.logits, self.sites.model.lm_head.weight), None
        auxiliary = distance = own.logits.new_zeros(())
        if self.teacher is not None:
            with self._record.teacher_clock(input_ids.device), torch.no_grad():
                original = self.teacher.transformer(
                    input_ids=input_ids, use_cache=False, output_hidden_states=self._matches
                )
            teacher = Head(original.last_hidden_state, self.teacher.lm_head.weight)
            if self._matches:
                # The first is the embeddings, the last is behind `ln_f`: what it unembeds to is matched by KL.
                distance = objective.residual_distance(own.hidden_states[1:-1], original.hidden_states[1:-1])
        kl_weight = recipe.kl_weight if teacher else 0.0
        loss = objective.next_token_loss(head, input_ids, teacher, kl_weight, self._dtype)
        if self.removes and recipe.aux_weight:
            auxiliary = objective.auxiliary_loss(self.sites.norms[-1].live_std, self.sites.classes.index)
        self._record.keep(torch.stack([loss.cross_entropy, loss.kl, distance.detach(), auxiliary.detach()]))
        match_weight = recipe.match_weight * self.lr_scheduler.get_last_lr()[0] / recipe.lr
        return loss.total + match_weight * distance + recipe.aux_weight * auxiliary

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


class _Step(NamedTuple):
    """A step that is still to be written to the log."""

    line: dict[str, Any]
    numbers: Float[Tensor, " number"]
    """On the device: cross-entropy, KL, distance, auxiliary loss, gradient norm; at the interval the stds too."""
    teacher: list[Callable[[], float]]
    """Clocks of the teacher's forwards, seconds."""


class _Record(TrainerCallback):
    """Runs the schedule, checks the losses, writes the log and moves the progress bar."""

    def __init__(self, trainer: RemovalTrainer, path: Path, name: str) -> None:
        self.trainer, self.path, self.name = trainer, path, name
        self.bar = tqdm(disable=True)
        self.grad_norm: Tensor
        self._losses: list[Tensor] = []
        self._on_host: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._steps: list[_Step] = []
        self._teacher: list[Callable[[], float]] = []

    @contextlib.contextmanager
    def teacher_clock(self, device: torch.device) -> Iterator[None]:
        """Time what the teacher does; on CUDA on the device's own clock, which is read when the log is written."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._teacher.append(lambda: begin.elapsed_time(end) / 1000)
        else:
            before = time.perf_counter()
            yield
            seconds = time.perf_counter() - before
            self._teacher.append(lambda: seconds)

    def keep(self, losses: Float[Tensor, "4"]) -> None:
        """Keep the parts of a micro-batch's loss, and start to copy them to the host."""
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
        for line in own:
            self._begin_events(line["step"])
            self._observe(line["loss"], line["kl"])
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
        self._begin_events(state.global_step)
        sites = self.trainer.sites
        constant = sites.constant
        self._begun = [event.name for event in sites.advance(self.trainer.events, state.global_step)]
        if self._begun:
            self._frozen = self._begun[-1]
        if sites.constant and not constant:
            compiling = ", the compiled model is compiled once more" if args.torch_compile else ""
            self.bar.write(f"Step {state.global_step}: every norm is a constant from here on{compiling}.")

    def _begin_events(self, step: int) -> None:
        if self.trainer.pacing is not None:
            self.trainer.events += self.trainer.pacing.begin(step)

    def _observe(self, cross_entropy: float, kl: float) -> None:
        if self.trainer.pacing is not None:
            kl_weight = self.trainer.recipe.kl_weight
            self.trainer.pacing.observe((1 - kl_weight) * cross_entropy + kl_weight * kl)

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
        if self.trainer.pacing is not None:
            self._observe(*losses[:2].tolist())  # waits for the device; rounded as in the log, to be replayed from it
        values = [losses, self.grad_norm.reshape(1)]
        if step % recipe.log_every == 0:
            values += [live.flatten(), self.trainer.sites.constants().flatten()]
        self._steps.append(_Step(line, torch.cat([value.to(losses) for value in values]), self._teacher))
        self._teacher = []
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
        if not self._steps:
            return
        on_host = torch.cat([step.numbers for step in self._steps]).cpu()
        split = on_host.split([len(step.numbers) for step in self._steps])
        if self.trainer.args.should_save:
            with self.path.open("a") as file:
                for step, numbers in zip(self._steps, split, strict=True):
                    line = step.line | self._named(numbers, step.line["step"])
                    if self.trainer.teacher is not None:
                        line["teacher_seconds"] = round(sum(clock() for clock in step.teacher), 4)
                    file.write(json.dumps(line) + "\n")
        spoilt = [
            step.line["step"]
            for step, (_, _, _, _, grad_norm, *_) in zip(self._steps, split, strict=True)
            if not grad_norm.isfinite()
        ]
        self._steps.clear()
        if spoilt:
            raise self._diverged(f"the gradient is not finite at step {spoilt[0]}")

    def _named(self, numbers: Float[Tensor, " number"], step: int) -> dict[str, Any]:
        loss, kl, distance, aux, grad_norm, *stds = numbers.tolist()
        named: dict[str, Any] = {"loss": loss, "kl": kl, "distance": distance, "aux": aux, "grad_norm": grad_norm}
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
