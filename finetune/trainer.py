"""`transformers.Trainer` with a log of every step and checkpoints that are whole, and the schedule as a callback.

An optimizer step of the removal, in order:
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
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import (
    GPT2LMHeadModel,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.activations import NewGELUActivation

from finetune import objective, schedule
from finetune.checkpoint import without_bars
from finetune.errors import NolnError
from finetune.objective import Head
from finetune.recipe import Recipe, RecipeError, Training
from finetune.schedule import Event
from finetune.sites import Sites
from finetune.text import Blocks


class DivergedError(NolnError):
    """The loss is not finite, or has exploded; the message says when, and what froze last."""


class NotSavedError(NolnError):
    """A checkpoint could not be written: a full disk, or a directory that is not to be written to."""


class RunTrainer(Trainer):
    """Trains as a recipe says, with a log of every step and checkpoints that are whole.

    A subclass returns the loss, a mean over equally long micro-batches, and hands its parts to its `record`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Training,
        text: Dataset[dict[str, Tensor]],
        directory: Path,
        record: "Record",
        **arguments: Any,
    ) -> None:
        self.recipe, self.directory = recipe, directory
        self.tokens_a_step: int = recipe.batch * model.config.n_positions
        self._partial: Path | None = None
        self._record = record
        super().__init__(
            model=model,
            args=training_arguments(recipe, directory, **arguments),
            train_dataset=in_order(text, recipe),
            callbacks=[record],
        )
        self.remove_callback(PrinterCallback)
        self._dtype = torch.bfloat16 if self.args.bf16 else None
        # Mean losses of equally long micro-batches: the Trainer divides by their number, `forward` knows nothing of it.
        self.model_accepts_loss_kwargs = False

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
        """Let the learning rate fall until the recipe's horizon, which may lie beyond the run."""
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
            with without_bars():
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


class RemovalTrainer(RunTrainer):
    """Trains a model with `Sites` in it through a schedule; with no events it is the control.

    `directory` takes the checkpoints, `log_path` one line of JSON a step: model (`name`), step, tokens seen so far,
    means over the step of loss (cross-entropy, nats/token), of kl and distance to the teacher (0 without one) and of
    aux (the auxiliary loss), lr, grad_norm, frozen (what froze at this step) and seconds; with a teacher
    teacher_seconds, of its forward but for the unembedding; every `log_every` steps std, for each site the live and the
    frozen stds by class of token.
    """

    recipe: Recipe
    _record: "_RemovalRecord"

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
        self.sites, self.removes = sites, bool(events)
        adaptive = self.removes and recipe.schedule.tolerance is not None
        self.pacing = schedule.Pacing(events, recipe.schedule, recipe.steps) if adaptive else None
        self.events = [] if adaptive else list(events)  # with a pacing, those that have begun
        sites.defer_unembedding()
        super().__init__(sites.model, recipe, text, directory, _RemovalRecord(self, log_path, name))
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False).to(device=self.args.device, dtype=self._dtype)  # type: ignore[call-arg]
        # The streams between blocks are matched: one block has none.
        self._matches = teacher is not None and recipe.match_weight > 0 and len(sites.model.transformer.h) > 1

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
        if self._matches:
            assert self.lr_scheduler is not None
            distance = distance * recipe.match_weight * self.lr_scheduler.get_last_lr()[0] / recipe.lr
        return loss.total + distance + recipe.aux_weight * auxiliary

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch forward and backward, and observe its stds once, recomputed or not."""
        loss = super().training_step(*args, **kwargs)
        self.sites.observe()
        return loss


def processes(recipe: Training) -> PartialState:
    """Return the processes; without an accelerator they know of each other only if they are told that they are CPUs."""
    return PartialState(cpu=recipe.device == "cpu" or not torch.accelerator.is_available())


def check_processes(recipe: Training) -> None:
    """Check that the device is there, and that the processes can share a batch.

    Raises:
        RecipeError: it is not, or they cannot.
    """
    state = processes(recipe)
    if recipe.device not in ("auto", state.device.type):
        raise RecipeError(f"device is {recipe.device}, but what torch finds here is {state.device.type}.")
    if recipe.batch % (recipe.micro_batch * state.num_processes):
        fitting = [n for n in range(1, recipe.micro_batch + 1) if recipe.batch % (n * state.num_processes) == 0]
        remedy = f"micro_batch {fitting[-1]} would do" if fitting else "change batch or the number of processes"
        raise RecipeError(
            f"A batch of {recipe.batch} cannot be shared by {state.num_processes} processes in micro-batches of "
            f"{recipe.micro_batch}: {remedy}."
        )


def fuse_gelu(model: nn.Module) -> None:
    """Compute GPT-2's activation function in one kernel and not in seven."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")


def checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in `directory`, oldest first."""
    complete = (path.parent for path in directory.glob("checkpoint-*/trainer_state.json"))
    return sorted(complete, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def training_arguments(recipe: Training, directory: Path, **others: Any) -> TrainingArguments:
    """Return what the Trainer is told of `recipe`; `others` are more of its arguments, or others in place of these."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // (recipe.micro_batch * PartialState().num_processes),
        train_sampling_strategy="sequential",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup,
        optim="adamw_torch_fused",
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip,
        bf16=_has_bf16(PartialState().device.type) if recipe.bf16 is None else recipe.bf16,
        torch_compile=recipe.compile,
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=PartialState().device.type == "cpu",  # the Trainer refuses bf16 on a CPU that it was not told of
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
        **{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": recipe.min_lr}} | others,
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


def _has_bf16(device: str) -> bool:
    """Whether a device is made for matrix products in bfloat16: of CPUs, those with AMX."""
    if device == "cpu":
        # Older versions of torch do not tell.
        return hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return device == "cuda" and torch.cuda.is_bf16_supported()


def in_order(text: Dataset[dict[str, Tensor]], recipe: Training) -> Dataset[dict[str, Tensor]]:
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
    """On the device: the parts of the loss, the gradient norm, and what `Record.measure` returned."""


class Record(TrainerCallback):
    """Checks the losses, writes the log and moves the progress bar."""

    parts: tuple[str, ...] = ("loss",)
    """What `keep` is given of each micro-batch; the first is the cross-entropy, nats/token."""
    advice = "A lower lr and a longer warmup make training steadier."
    """What to do where the loss has diverged."""

    def __init__(self, trainer: RunTrainer, path: Path, name: str) -> None:
        self.trainer, self.path, self.name = trainer, path, name
        self.bar = tqdm(disable=True)
        self.grad_norm: Tensor
        self._losses: list[Tensor] = []
        self._on_host: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._steps: list[_Step] = []

    def keep(self, losses: Float[Tensor, " part"]) -> None:
        """Keep the parts of a micro-batch's loss, and start to copy them to the host."""
        self._losses.append(losses)
        self._on_host.append(losses.to("cpu", non_blocking=losses.is_cuda))
        if losses.is_cuda:
            self._copied = torch.cuda.current_stream().record_event()

    def replay(self, log: list[dict[str, Any]], step: int) -> None:
        """Take in the log of a run that is taken up at `step`."""

    def measure(self, line: dict[str, Any], losses: Float[Tensor, " part"]) -> list[Tensor]:
        """Add to a step's line what is known of it; return what is to be copied to the host with its losses."""
        return []

    def status(self) -> dict[str, str]:
        """Return what the progress bar says beside the loss."""
        return {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Cut the log back to where the run stands."""
        written = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        lines = [json.loads(line) for line in written if line.endswith("\n")]
        lines = [line for line in lines if line["model"] != self.name or line["step"] < state.global_step]
        own = [line for line in lines if line["model"] == self.name]
        self._first = [line["loss"] for line in own[:10]]
        self._begin = time.monotonic() - (own[-1]["seconds"] if own else 0)
        self.replay(own, state.global_step)
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

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the loss before the weights move, and record the step."""
        if self._copied is not None:
            self._copied.synchronize()  # the forward is done; the backward still keeps the device busy
        loss = float(torch.stack(self._on_host)[:, 0].mean())
        self._check(loss, state.global_step)
        step = state.global_step
        line = {
            "model": self.name,
            "step": step,
            "tokens": (step + 1) * self.trainer.tokens_a_step,
            "lr": kwargs["lr_scheduler"].get_last_lr()[0],
            "seconds": round(time.monotonic() - self._begin, 3),
        }
        losses = self.trainer.accelerator.reduce(torch.stack(self._losses).mean(0), "mean")
        values = [losses, self.grad_norm.reshape(1), *self.measure(line, losses)]
        self._steps.append(_Step(line, torch.cat([value.to(losses) for value in values])))
        self._losses.clear()
        self._on_host.clear()
        self.bar.set_postfix({"loss": f"{loss:.3f}", **self.status()}, refresh=False)

    def _check(self, loss: float, step: int) -> None:
        usual = sum(self._first) / len(self._first) if self._first else math.inf
        if math.isfinite(loss) and loss <= usual + self.trainer.recipe.max_rise:
            if len(self._first) < 10:
                self._first.append(loss)
            return
        self.write()
        raise self.diverged(
            f"the loss is {loss:.3f} nats/token at step {step}, more than max_rise={self.trainer.recipe.max_rise:g} "
            "above that of the first steps"
        )

    def diverged(self, what: str) -> DivergedError:
        """Return the error that says what has happened, from where to go on, and what to change."""
        saved = checkpoints(self.trainer.directory)
        return DivergedError(
            f"{self.name}: {what}. "
            f"The last good checkpoint is {saved[-1] if saved else 'none, the run had just begun'}. {self.advice}"
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
                    file.write(json.dumps(step.line | self.named(numbers, step.line)) + "\n")
        spoilt = [
            step.line["step"]
            for step, numbers in zip(self._steps, split, strict=True)
            if not numbers[len(self.parts)].isfinite()
        ]
        self._steps.clear()
        if spoilt:
            raise self.diverged(f"the gradient is not finite at step {spoilt[0]}")

    def named(self, numbers: Float[Tensor, " number"], line: dict[str, Any]) -> dict[str, Any]:
        """Return the numbers of a step, brought to the host, by name."""
        return dict(zip((*self.parts, "grad_norm"), numbers.tolist(), strict=False))


class _RemovalRecord(Record):
    """Runs the schedule too, and logs what froze, the stds and the teacher's time."""

    trainer: RemovalTrainer
    parts = ("loss", "kl", "distance", "aux")
    advice = "Larger gaps in the schedule, a lower lr and a higher min_lr make the removal steadier."

    def __init__(self, trainer: RemovalTrainer, path: Path, name: str) -> None:
        super().__init__(trainer, path, name)
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

    def replay(self, log: list[dict[str, Any]], step: int) -> None:
        """Take the decisions of an adaptive schedule once more."""
        for line in log:
            self._begin_events(line["step"])
            self._observe(line["loss"], line["kl"])
        begun = [event.name for event in self.trainer.events if event.step < step]
        self._frozen = begun[-1] if begun else "none"

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

    def measure(self, line: dict[str, Any], losses: Float[Tensor, " part"]) -> list[Tensor]:
        """Update the running stds; at the interval return live and frozen ones."""
        recipe, sites = self.trainer.recipe, self.trainer.sites
        live = sites.update(recipe.std_decay)
        line["frozen"] = self._begun
        if self.trainer.teacher is not None:
            line["teacher_seconds"], self._teacher = self._teacher, []
        if self.trainer.pacing is not None:
            self._observe(*losses[:2].tolist())  # waits for the device; rounded as in the log, to be replayed from it
        return [live.flatten(), sites.constants().flatten()] if line["step"] % recipe.log_every == 0 else []

    def status(self) -> dict[str, str]:
        """Return what froze last, but of the control."""
        return {"frozen": self._frozen} if self.trainer.removes else {}

    def diverged(self, what: str) -> DivergedError:
        """Say what froze last, too."""
        return super().diverged(f"{what}; the last to freeze was {self._frozen}")

    def named(self, numbers: Float[Tensor, " number"], line: dict[str, Any]) -> dict[str, Any]:
        """Return the stds by site, and read the teacher's clocks, too."""
        named = super().named(numbers, line)
        if "teacher_seconds" in line:
            named["teacher_seconds"] = round(sum(clock() for clock in line["teacher_seconds"]), 4)
        stds = numbers[len(self.parts) + 1 :]
        if len(stds):
            sites = list(self.trainer.sites)
            live, constants = stds.view(2, len(sites), -1)
            begun = {event.name for event in self.trainer.events if event.step <= line["step"]}
            named["std"] = {
                site: {
                    "live": [None if math.isnan(std) else std for std in live[i].tolist()],
                    "frozen": constants[i].tolist() if site in begun else None,
                }
                for i, site in enumerate(sites)
            }
        return named
