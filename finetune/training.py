"""The training loop of both kinds of run: `transformers.Trainer` with a log of every step and atomic checkpoints.

An optimizer step, in order:
1. Each micro-batch is run forward and backward; the parts of its loss are recorded (`Record.keep`).
2. The losses, which have been copied to the host since the forward, are checked before the weights are updated.
3. The optimizer updates the weights. The step's record stays on the device until the next report, so that no step has
   to wait for it.
"""

import contextlib
import functools
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import (
    AttentionInterface,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from finetune import objective, sharding
from finetune.checkpoint import no_progress_bars
from finetune.checkpoints import checkpoints, read_log, seal, step_of, to_disk
from finetune.errors import NolnError
from finetune.families import FAMILIES
from finetune.processes import has_bf16
from finetune.progress import progress
from finetune.recipe import Training
from finetune.text import Blocks, ReadAhead, StreamedBlocks

_RISEN_STEPS = 3
"""The number of consecutive steps with too high a loss after which a run stops."""


class DivergedError(NolnError):
    """The loss is not finite, or has exploded; the message says at which step, and what froze last."""


class NotSavedError(NolnError):
    """A checkpoint could not be written, because the disk is full or the directory is not writable."""


class RunTrainer(Trainer):
    """Trains as a recipe specifies, with a log of every step and atomic checkpoints.

    A subclass returns the loss of a micro-batch, a mean, and passes its parts to its `record`. All micro-batches have
    the same number of tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Training,
        text: Blocks | StreamedBlocks,
        directory: Path,
        record: "Record",
        shards: bool = False,
        **arguments: Any,
    ) -> None:
        self.recipe, self.directory = recipe, directory
        self.shards = shards and PartialState().num_processes > 1
        self.tokens_a_step: int = recipe.batch * text.context
        self.resumed_from: Path | None = None
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
        if self.shards:
            # Compile the blocks rather than the model: FSDP gathers weights between blocks.
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            sharding.shard(model, self.args.torch_compile_backend if recipe.compile else None)
            # This makes the Trainer leave the model as it is, rather than wrap it in DDP.
            self.is_distributed_loading_by_transformers = True
        self._of_logits = objective.loss_of_logits
        if recipe.compile:
            self._of_logits = torch.compile(self._of_logits, backend=self.args.torch_compile_backend or "inductor")
        # The Trainer divides the sum of the micro-batches' mean losses by their number; `forward` must not do so too.
        self.model_accepts_loss_kwargs = False

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Have DDP keep gradients only once, rather than also in its buckets. This saves 4 bytes per parameter."""
        arguments = super()._build_accelerator_args(**kwargs)
        for handler in arguments["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = True
        return arguments

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Do not move a model that will be sharded: it may be larger than the device."""
        if not self.shards:
            super()._move_model_to_device(model, device)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, starting from a checkpoint if one is given. Close the progress bar even if training fails."""
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(str(self.resumed_from) if self.resumed_from else None, *args, **kwargs)
        finally:
            self._record.bar.close()

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Read a stream ahead: the blocks of a step are read during the step before. Other blocks take no time."""
        if isinstance(self.train_dataset, IterableDataset) and not isinstance(self.train_dataset, ReadAhead):
            size = self.args.per_device_train_batch_size
            self.train_dataset = ReadAhead(self.train_dataset, size, 2 * self.recipe.batch // size)
        return super().get_train_dataloader()

    def try_out(self) -> None:
        """Take two steps with one micro-batch, without the other processes. The trainer must not be used afterwards.

        The second step needs as much memory as training ever does: gradients, moments and activations.
        """
        self.create_optimizer_and_scheduler(self.recipe.steps)
        assert isinstance(self.model, PreTrainedModel)
        assert self.optimizer is not None
        if self.args.activation_checkpointing:
            self.model.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # casts and compiles, without DDP
        block: dict[str, Tensor] = next(iter(self.train_dataset))  # type: ignore[arg-type]
        size = self.args.per_device_train_batch_size
        inputs = {name: torch.stack([tensor] * size).to(self.args.device) for name, tensor in block.items()}
        for _ in range(2):
            loss: Any = self.compute_loss(model, inputs)
            loss.backward()
            self.optimizer.step()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the last step is done: an endless stream would start again from the beginning."""
        self.control.should_training_stop = self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, *args: Any, **kwargs: Any
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Decay the learning rate until the recipe's horizon, which may lie beyond the run."""
        return super().create_scheduler(self.recipe.horizon, *args, **kwargs)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Decay matrices and not vectors. The Trainer's own rule would decay the gains of our norms."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() >= 2]

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        norm = super()._get_grad_norm(*args, **kwargs)
        self._record.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._record.grad_norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial or self.directory)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save weights under the names of their modules, which resuming expects.

        transformers saves GPT-NeoX's unembedding under its name in old checkpoints. Its Trainer loads only weights
        whose names match, so it would resume with the unembedding of the untrained model.
        """
        assert isinstance(self.model, PreTrainedModel)
        if self.shards:
            state_dict = sharding.state_of(self.model)
            if not self.args.should_save:
                return
        by_module = functools.partial(type(self.model).save_pretrained, self.model, save_original_format=False)
        self.model.save_pretrained = by_module  # type: ignore[method-assign]
        super()._save(output_dir, state_dict)
        del self.model.save_pretrained

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = sharding.whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.shards or checkpoint is None or not (Path(checkpoint) / "optimizer.pt").exists():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
        sharding.load_optimizer(self.optimizer, load(Path(checkpoint) / "optimizer.pt", mmap=True))
        self.lr_scheduler.load_state_dict(load(Path(checkpoint) / "scheduler.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.shards:
            assert isinstance(self.model, PreTrainedModel)
            sharding.load(self.model, load_file(Path(resume_from_checkpoint) / "model.safetensors"))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name, then rename it, so that one with its final name is complete."""
        self._record.write()
        self._partial = self.directory / "partial"
        if self.args.should_save:
            shutil.rmtree(self._partial, ignore_errors=True)
        PartialState().wait_for_everyone()
        try:
            with no_progress_bars():
                super()._save_checkpoint(model, trial)
            PartialState().wait_for_everyone()
            if self.args.should_save:
                for checkpoint in self._partial.iterdir():
                    seal(checkpoint, self._record.path)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise NotSavedError(
                f"The checkpoint of step {self.state.global_step} cannot be written to {self.directory}: {error}. "
                "Free some space, then continue from the last one with `python -m finetune resume`."
            ) from error
        if self.args.should_save:
            for checkpoint in self._partial.iterdir():
                whole = self.directory / checkpoint.name
                shutil.rmtree(whole, ignore_errors=True)  # an existing one is damaged, or it would not be rewritten
                checkpoint.rename(whole)
                to_disk(self.directory)
            # A checkpoint of a later step was damaged, and the run resumed from an earlier one: do not count it.
            behind = [path for path in checkpoints(self.directory) if step_of(path) <= self.state.global_step]
            for checkpoint in behind[:-2]:
                shutil.rmtree(checkpoint)
        self._partial = None


def fuse_gelu(model: nn.Module) -> None:
    """Compute GPT-2's activation function with one kernel instead of seven."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")


def cast_matrices(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights of a model's products, except the unembedding, to the dtype to which autocast would cast them.

    Embeddings, norms and the residual stream stay in float32.
    """
    for module in model.base_model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight.data = module.weight.data.to(dtype)


def share_frozen(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """Let `teacher`, the original, share the weights of `model` that are not trained, to save memory."""
    frozen = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    for name, parameter in teacher.named_parameters():
        own = frozen.get(name)
        if own is not None and own.dtype == parameter.dtype and (isinstance(own, FakeTensor) or own.equal(parameter)):
            parameter.data = own.data


CAUSAL = "noln_causal"
"""transformers' SDPA under a name for which no mask is built. Without a mask it is causal and can use flash kernels."""
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def attend_without_masks(model: PreTrainedModel, context: int) -> None:
    """Let `model` attend causally, without building masks, to sequences of `context` tokens without padding.

    The model computes the same function. transformers omits the mask too, but not in a compiled model, and otherwise
    it queries the device each time to find out whether it may. Models with shorter attention windows, or without SDPA,
    are not changed.
    """
    window = getattr(model.config, "sliding_window", None)
    is_whole = window is None or window > context
    if model.config.model_type in FAMILIES and model.config._attn_implementation == "sdpa" and is_whole:
        model.set_attn_implementation(CAUSAL)


def training_arguments(recipe: Training, directory: Path, **others: Any) -> TrainingArguments:
    """Return the Trainer's arguments for `recipe`; `others` are added to these, or replace them."""
    assert recipe.micro_batch != "auto"
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch // (recipe.micro_batch * PartialState().num_processes),
        train_sampling_strategy="sequential",
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={
            "non_blocking": torch.cuda.is_available(),  # from pinned memory, while the device works
            # Otherwise each process of a sharded model would keep whole gradients until the last micro-batch.
            "gradient_accumulation_kwargs": {"sync_each_batch": getattr(recipe, "shard", False)},
        },
        remove_unused_columns=False,
        learning_rate=recipe.lr,
        warmup_steps=recipe.warmup,
        optim="adamw_torch_fused",
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip,
        # None: the run was started by an earlier version, which used bf16 only on CPUs with AMX.
        bf16=has_bf16(PartialState().device.type, ("amx_bf16",)) if recipe.bf16 is None else recipe.bf16,
        torch_compile=recipe.compile,
        activation_checkpointing=recipe.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=PartialState().device.type == "cpu",  # otherwise the Trainer refuses bf16 on a CPU
        # Statistics are summed over processes, so rank 0's buffers must not overwrite the others'.
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
        # Live stds need not be recorded again when a forward is recomputed. Without this setting, which older versions
        # of torch lack, there are as many graphs as blocks.
        with contextlib.suppress(AttributeError):
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    if arguments.n_gpu > 1:
        # Several GPUs are used by several processes (torchrun), never by the threads of one process.
        arguments._n_gpu = 1
    return arguments


def in_order(text: Dataset[dict[str, Tensor]], recipe: Training) -> Dataset[dict[str, Tensor]]:
    """Return the sequences of the whole run, shuffled separately for each pass. The order depends only on the seed."""
    if isinstance(text, IterableDataset):
        return text
    assert isinstance(text, Blocks)
    rng = np.random.default_rng(recipe.seed)
    needed = recipe.steps * recipe.batch
    passes = [rng.permutation(len(text)) for _ in range(math.ceil(needed / len(text)))]
    return Subset(text, np.concatenate(passes)[:needed].tolist())


class _Step(NamedTuple):
    """A step that has not yet been written to the log."""

    line: dict[str, Any]
    numbers: Float[Tensor, " number"]
    """The parts of the loss, the gradient norm, and what `Record.measure` returned, on the device."""


class Record(TrainerCallback):
    """Checks the losses, writes the log and updates the progress bar."""

    parts: tuple[str, ...] = ("loss",)
    """The names of the parts of a loss that are passed to `keep`. The first is the cross-entropy, in nats/token."""
    advice = "A lower lr or a longer warmup makes training more stable."
    """What to do if the loss has diverged."""
    guarded = "the loss"
    """A description of `excess`."""

    def __init__(self, trainer: RunTrainer, path: Path, name: str) -> None:
        self.trainer, self.path, self.name = trainer, path, name
        self.bar: tqdm[Any] = progress(disable=True)
        self.grad_norm: Tensor
        self._losses: list[Tensor] = []
        self._on_host: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._steps: list[_Step] = []
        self._first: list[float] = []
        self._risen = 0

    def keep(self, losses: Float[Tensor, " part"]) -> None:
        """Record the parts of a micro-batch's loss, and start copying them to the host."""
        self._losses.append(losses)
        self._on_host.append(losses.to("cpu", non_blocking=losses.is_cuda))
        if losses.is_cuda:
            self._copied = torch.cuda.current_stream().record_event()

    def replay(self, log: list[dict[str, Any]], step: int) -> None:
        """Restore the record's state from the log of a run that is resumed at `step`."""

    def excess(self, line: dict[str, Any]) -> float:
        """Return the quantity, in nats/token, that must not rise far above its value in the first steps.

        `line` contains the parts of a step's loss by name.
        """
        return line["loss"]

    def means(self, losses: Float[Tensor, " part"]) -> Float[Tensor, " part"]:
        """Return the parts of a step's loss as they are logged, given their means over micro-batches."""
        return losses

    def measure(self, line: dict[str, Any], losses: Float[Tensor, " part"]) -> list[Tensor]:
        """Add to a step's line what is already known. Return tensors to copy to the host together with the losses."""
        return []

    def status(self) -> dict[str, str]:
        """Return what the progress bar shows beside the loss."""
        return {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Truncate the log to the step from which the run continues."""
        lines = read_log(self.path, self.trainer.resumed_from)
        lines = [line for line in lines if line["model"] != self.name or line["step"] < state.global_step]
        own = [line for line in lines if line["model"] == self.name]
        self._first, self._risen = [], 0
        for line in own:
            self._judge(self.excess(line))
        self._begin = time.monotonic() - (own[-1]["seconds"] if own else 0)
        self.replay(own, state.global_step)
        if args.should_save:
            partial = self.path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
            partial.replace(self.path)
        self.bar = progress(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit="step",
            disable=not state.is_local_process_zero,
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the loss before the weights are updated, and record the step."""
        if self._copied is not None:
            self._copied.synchronize()  # waits only for the forward: the device is still busy with the backward
        parts = dict(zip(self.parts, self.means(torch.stack(self._on_host).mean(0)).tolist(), strict=True))
        self._check(self.excess(parts), state.global_step)
        step = state.global_step
        line = {
            "model": self.name,
            "step": step,
            "tokens": (step + 1) * self.trainer.tokens_a_step,
            "lr": kwargs["lr_scheduler"].get_last_lr()[0],
            "seconds": round(time.monotonic() - self._begin, 3),
        }
        losses = self.means(self.trainer.accelerator.reduce(torch.stack(self._losses).mean(0), "mean"))
        values = [losses, self.grad_norm.reshape(1), *self.measure(line, losses)]
        self._steps.append(_Step(line, torch.cat([value.to(losses) for value in values])))
        self._losses.clear()
        self._on_host.clear()
        self.bar.set_postfix({"loss": f"{parts['loss']:.3f}", **self.status()}, refresh=False)

    def _check(self, excess: float, step: int) -> None:
        self._judge(excess)
        if math.isfinite(excess) and self._risen < _RISEN_STEPS:
            return
        self.write()
        risen = f", and for {_RISEN_STEPS} steps in a row it was more than max_rise={self.trainer.recipe.max_rise:g}"
        raise self.diverged(
            f"{self.guarded} is {excess:.3f} nats/token at step {step}"
            + (f"{risen} above that of the first steps" if math.isfinite(excess) else "")
        )

    def _judge(self, excess: float) -> None:
        """Count the consecutive steps with too high a loss. One unusual token may cause a single such step."""
        usual = sum(self._first) / len(self._first) if self._first else math.inf
        self._risen = self._risen + 1 if excess > usual + self.trainer.recipe.max_rise else 0
        if not self._risen and len(self._first) < 10:
            self._first.append(excess)

    def diverged(self, what: str) -> DivergedError:
        """Return an error that says what happened, which checkpoint to resume from, and what to change."""
        saved = checkpoints(self.trainer.directory)
        return DivergedError(
            f"{self.name}: {what}. The last good checkpoint: {saved[-1] if saved else 'none yet'}. {self.advice}"
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the log every `log_every` steps."""
        self.bar.update()
        if state.global_step % args.logging_steps == 0:
            self.write()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the rest of the log."""
        self.write()

    def write(self) -> None:
        """Copy the records of the last steps to the host at once, append them to the log, and check the gradients.

        A gradient that is not finite has ruined the weights, even if the loss was good, so no checkpoint may follow it.
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
        """Return the numbers of a step, which are on the host, by name."""
        return dict(zip((*self.parts, "grad_norm"), numbers.tolist(), strict=False))
