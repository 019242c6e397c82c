"""What both kinds of run share: `transformers.Trainer` with a log of every step and checkpoints that are whole.

An optimizer step, in order:
1. For each micro-batch: forward, loss, backward; the parts of the loss are kept (`Record.keep`).
2. The losses, copied to the host since the forward, are checked before the weights move.
3. The optimizer steps. The step's record waits on the device until the next report, so that no step waits for it.
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
"""Steps in a row at which the loss has to be too high for a run to stop."""


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
            # The model itself is not compiled, blocks are: FSDP gathers their weights in between.
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            sharding.shard(model, self.args.torch_compile_backend if recipe.compile else None)
            # Another word for: leave the model as it is, and do not wrap it in DDP.
            self.is_distributed_loading_by_transformers = True
        self._of_logits = objective.loss_of_logits
        if recipe.compile:
            self._of_logits = torch.compile(self._of_logits, backend=self.args.torch_compile_backend or "inductor")
        # Mean losses of equally long micro-batches: the Trainer divides by their number, `forward` knows nothing of it.
        self.model_accepts_loss_kwargs = False

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Have DDP hold gradients once, and not in its buckets too: 4 bytes a parameter."""
        arguments = super()._build_accelerator_args(**kwargs)
        for handler in arguments["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = True
        return arguments

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave a model that is to be sharded where it is: it may be larger than the device."""
        if not self.shards:
            super()._move_model_to_device(model, device)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint on if there is one, and leave the line of the progress bar, however it ends."""
        self.resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            return super().train(str(self.resumed_from) if self.resumed_from else None, *args, **kwargs)
        finally:
            self._record.bar.close()

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Have a stream read ahead: a step's blocks while the step before it is taken. Other blocks take no time."""
        if isinstance(self.train_dataset, IterableDataset) and not isinstance(self.train_dataset, ReadAhead):
            size = self.args.per_device_train_batch_size
            self.train_dataset = ReadAhead(self.train_dataset, size, 2 * self.recipe.batch // size)
        return super().get_train_dataloader()

    def try_out(self) -> None:
        """Take two steps of one micro-batch, without the other processes; what is left is not to be trained.

        The second holds all that training ever does: gradients and moments beside activations.
        """
        self.create_optimizer_and_scheduler(self.recipe.steps)
        assert isinstance(self.model, PreTrainedModel)
        assert self.optimizer is not None
        if self.args.activation_checkpointing:
            self.model.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)  # cast and compiled, not shared
        block: dict[str, Tensor] = next(iter(self.train_dataset))  # type: ignore[arg-type]
        size = self.args.per_device_train_batch_size
        inputs = {name: torch.stack([tensor] * size).to(self.args.device) for name, tensor in block.items()}
        for _ in range(2):
            loss: Any = self.compute_loss(model, inputs)
            loss.backward()
            self.optimizer.step()

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
        norm = super()._get_grad_norm(*args, **kwargs)
        self._record.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._record.grad_norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial or self.directory)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save weights by the names of their modules, by which resuming loads them.

        transformers saves GPT-NeoX's unembedding by the name that it had in old checkpoints, and its Trainer, which
        loads whatever names agree, would go on with that of the untrained model.
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
        """Write a checkpoint under another name and rename it: one that has its name is whole."""
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
                "Make room, then go on from the last one with `python -m finetune resume`."
            ) from error
        if self.args.should_save:
            for checkpoint in self._partial.iterdir():
                whole = self.directory / checkpoint.name
                shutil.rmtree(whole, ignore_errors=True)  # one that is there is not whole, or would not be written anew
                checkpoint.rename(whole)
                to_disk(self.directory)
            # One of a later step is of a run that went on from before it, because that one was damaged.
            behind = [path for path in checkpoints(self.directory) if step_of(path) <= self.state.global_step]
            for checkpoint in behind[:-2]:
                shutil.rmtree(checkpoint)
        self._partial = None


def fuse_gelu(model: nn.Module) -> None:
    """Compute GPT-2's activation function in one kernel and not in seven."""
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "act", None), NewGELUActivation):
            module.act = nn.GELU(approximate="tanh")


def cast_matrices(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights of a model's products, but for the unembedding's, to what autocast makes of them each time.

    The rest stays as it is: embeddings, norms and the residual stream in float32.
    """
    for module in model.base_model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.weight.data = module.weight.data.to(dtype)


def share_frozen(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """Have `teacher`, the model as it was, hold no copy of what does not train in `model`."""
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
"""transformers' SDPA by a name that it makes no masks for: without one it is causal, and flash kernels take it."""
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def attend_without_masks(model: PreTrainedModel, context: int) -> None:
    """Have `model` attend causally to sequences of `context` tokens without padding, and make no mask for it.

    The same function: transformers leaves the mask away too, but not where the model is compiled, and elsewhere asks
    the device each time whether it may. Models whose windows are shorter, or that do not use SDPA, stay as they are.
    """
    window = getattr(model.config, "sliding_window", None)
    is_whole = window is None or window > context
    if model.config.model_type in FAMILIES and model.config._attn_implementation == "sdpa" and is_whole:
        model.set_attn_implementation(CAUSAL)


def training_arguments(recipe: Training, directory: Path, **others: Any) -> TrainingArguments:
    """Return what the Trainer is told of `recipe`; `others` are more of its arguments, or others in place of these."""
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
            # Of a sharded model: whole gradients of every process would wait for the last micro-batch otherwise.
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
        # None: begun by an earlier version, which took it on CPUs with AMX alone.
        bf16=has_bf16(PartialState().device.type, ("amx_bf16",)) if recipe.bf16 is None else recipe.bf16,
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
    guarded = "the loss"
    """What `excess` is."""

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
        """Keep the parts of a micro-batch's loss, and start to copy them to the host."""
        self._losses.append(losses)
        self._on_host.append(losses.to("cpu", non_blocking=losses.is_cuda))
        if losses.is_cuda:
            self._copied = torch.cuda.current_stream().record_event()

    def replay(self, log: list[dict[str, Any]], step: int) -> None:
        """Take in the log of a run that is taken up at `step`."""

    def excess(self, line: dict[str, Any]) -> float:
        """Return what must not rise far above what it was in the first steps, of a step's parts by name, nats/token."""
        return line["loss"]

    def means(self, losses: Float[Tensor, " part"]) -> Float[Tensor, " part"]:
        """Return the parts of a step, averaged over its micro-batches, as they are logged."""
        return losses

    def measure(self, line: dict[str, Any], losses: Float[Tensor, " part"]) -> list[Tensor]:
        """Add to a step's line what is known of it; return what is to be copied to the host with its losses."""
        return []

    def status(self) -> dict[str, str]:
        """Return what the progress bar says beside the loss."""
        return {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Cut the log back to where the run stands."""
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
        """Check the loss before the weights move, and record the step."""
        if self._copied is not None:
            self._copied.synchronize()  # the forward is done; the backward still keeps the device busy
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
        risen = f", for {_RISEN_STEPS} steps in a row more than max_rise={self.trainer.recipe.max_rise:g} above that of"
        raise self.diverged(
            f"{self.guarded} is {excess:.3f} nats/token at step {step}"
            + (f"{risen} the first steps" if math.isfinite(excess) else "")
        )

    def _judge(self, excess: float) -> None:
        """Count for how many steps in a row the loss has risen too far: at a single one, an unusual token may do it."""
        usual = sum(self._first) / len(self._first) if self._first else math.inf
        self._risen = self._risen + 1 if excess > usual + self.trainer.recipe.max_rise else 0
        if not self._risen and len(self._first) < 10:
            self._first.append(excess)

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
