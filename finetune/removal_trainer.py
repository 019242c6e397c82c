"""Training through the removal of norms: the schedule as a callback, the losses, and the log.

An optimizer step of the removal, in order:
1. Sites are brought to their state in the schedule (`Sites.advance`).
2. Each micro-batch is run forward and backward, and the live stds of its forward are recorded (`Sites.observe`).
3. The losses, which have been copied to the host since the forward, are checked before the weights are updated.
4. The running means are updated with the stds of all micro-batches and processes (`Sites.update`), and the optimizer
   updates the weights.
5. The step's record stays on the device until the next report, so that no step has to wait for the device.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from finetune import objective, schedule, sharding
from finetune.cover import Cover
from finetune.recipe import Recipe
from finetune.schedule import Event
from finetune.sites import Sites
from finetune.text import Blocks, StreamedBlocks
from finetune.training import DivergedError, Record, RunTrainer, cast_matrices, share_frozen

_NOTABLE = 2
"""When a run has diverged, report the largest live std if it is at least this many times its divisor, rounded down."""


class RemovalTrainer(RunTrainer):
    """Trains a model with `Sites` through a schedule. Without events, it trains the control.

    Checkpoints are written to `directory`, and one line of JSON per step to `log_path`:

    - always: model (`name`), step, tokens seen so far, lr, grad_norm, frozen (the sites that froze at this step) and
      seconds; loss (cross-entropy, nats/token) and kl to the teacher (0 without one), means over the step's text;
      distance to the teacher and aux (the auxiliary loss), means over all of the step's tokens;
    - with a teacher: teacher_loss, its cross-entropy on the same text, and teacher_seconds, the time of its forward
      without the unembedding;
    - with cover: cover_kl, the kl on cover (None if the step had none), and text, the fraction of text tokens;
    - with a penalty on it: spread;
    - with a guard: guarded, the fraction of sites and tokens on which it acted;
    - every `log_every` steps: std, the live and frozen stds of each site by token class, and over_constant, the 99.9th
      percentile and the maximum of live std over constant (at a live site, over the running mean).
    """

    recipe: Recipe
    _record: "_RemovalRecord"

    def __init__(
        self,
        sites: Sites,
        recipe: Recipe,
        events: Sequence[Event],
        text: Blocks | StreamedBlocks,
        directory: Path,
        log_path: Path,
        name: str,
        teacher: PreTrainedModel | None = None,
        cover: Cover | None = None,
        decode: Callable[[int], str] = str,
    ) -> None:
        """See the class. `decode` turns a token into text, for messages."""
        self.sites, self.removes, self.covers = sites, bool(events), cover is not None
        adaptive = self.removes and recipe.schedule.tolerance is not None
        self.pacing = schedule.Pacing(events, recipe.schedule, recipe.steps) if adaptive else None
        self.events = [] if adaptive else list(events)  # with an adaptive schedule, the events that have begun
        objective.defer_unembedding(sites.model)
        super().__init__(sites.model, recipe, text, directory, _RemovalRecord(self, log_path, name), recipe.shard)
        if cover is not None:
            assert isinstance(self.train_dataset, Dataset)
            self.train_dataset = cover.over(self.train_dataset)
        self._counted: Bool[Tensor, " batch"] | None = None
        self.decode = decode
        if recipe.spread_weight and self.removes:
            sites.keep_live_graph()
        self.teacher = teacher
        if teacher is not None:
            teacher.requires_grad_(False)
            if self._dtype is not None:
                cast_matrices(teacher, self._dtype)
            objective.defer_unembedding(teacher)
            backend = self.args.torch_compile_backend if recipe.compile else None
            if self.shards:
                sharding.shard(teacher, backend)
            else:
                share_frozen(teacher, sites.model)
                teacher.to(self.args.device)  # type: ignore[arg-type]
                if backend is not None:
                    teacher.base_model.compile(backend=backend)
        self._softcap = objective.softcap_of(sites.model)
        self._centred = sites.norms[-1].style.centred
        # Streams are matched between blocks, so a model with one block has nothing to match.
        self._matches = teacher is not None and recipe.match_weight > 0 and sites.model.config.num_hidden_layers > 1

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Return the next-token loss plus the recipe's other losses: distance, auxiliary loss and spread."""
        input_ids, is_cover, recipe = inputs["input_ids"], inputs.get("is_cover"), self.recipe
        self._counted = None if is_cover is None or recipe.cover_stds else ~is_cover
        own = model(input_ids=input_ids, use_cache=False, output_hidden_states=self._matches)
        head, teacher = objective.head_of(self.sites.model, own.logits), None
        auxiliary = distance = spread = guarded = own.logits.new_zeros(())
        if self.teacher is not None:
            with self._record.teacher_clock(input_ids.device), torch.no_grad(), self.accelerator.autocast():
                original = self.teacher(input_ids=input_ids, use_cache=False, output_hidden_states=self._matches)
            teacher = objective.head_of(self.teacher, original.logits)
            if self._matches:
                # Omit the embeddings (first) and the final norm's output (last), whose predictions KL compares.
                streams = own.hidden_states[1:-1], original.hidden_states[1:-1]
                distance = objective.residual_distance(*streams, centred=self._centred)
        kl_weight = recipe.kl_weight if teacher else 0.0
        loss = objective.next_token_loss(
            *(head, input_ids, teacher, kl_weight, self._dtype, is_cover, self._softcap, None, self._of_logits)
        )
        if self.teacher is not None and self.shards:
            self.teacher.reshard()  # type: ignore[operator]
        if self.removes and recipe.aux_weight:
            auxiliary = objective.auxiliary_loss(self.sites.norms[-1].live_std, self.sites.classes.index, is_cover)
        if self.removes and recipe.spread_weight:
            of = is_cover if recipe.spread_on == "cover" else None
            spread_of = self.sites.spread(of, recipe.spread_live, recipe.spread_position_0)
            spread = objective.spread_loss(*spread_of, recipe.spread_power)
        if self.removes:
            guarded = self._record.watch(input_ids)
        text = torch.ones_like(loss.kl) if is_cover is None else (~is_cover).to(loss.kl).mean()
        parts = [*loss[1:], distance.detach(), auxiliary.detach(), spread.detach(), guarded.to(text), text]
        self._record.keep(torch.stack(parts))
        if self._matches:
            assert self.lr_scheduler is not None
            distance = distance * recipe.match_weight * self.lr_scheduler.get_last_lr()[0] / recipe.lr
        return loss.total + distance + recipe.aux_weight * auxiliary + recipe.spread_weight * spread

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch forward and backward, and observe its stds once, even if the forward is recomputed."""
        loss = super().training_step(*args, **kwargs)
        self.sites.observe(self._counted, keep=self.removes and self.state.global_step % self.recipe.log_every == 0)
        return loss


class _RemovalRecord(Record):
    """Runs the schedule as well, and logs what froze, the stds and the teacher's time."""

    trainer: RemovalTrainer
    parts = ("loss", "kl", "teacher_loss", "cover_kl", "distance", "aux", "spread", "guarded", "text")
    advice = "A longer schedule.fade, larger gaps, another lr or a higher min_lr can make the removal more stable."

    def __init__(self, trainer: RemovalTrainer, path: Path, name: str) -> None:
        super().__init__(trainer, path, name)
        self._teacher: list[Callable[[], float]] = []
        self._outliers: list[tuple[tuple[int, ...], Tensor]] = []
        self._worst = ""
        """The token whose std most exceeds its divisor in the last step that is not all NaN, if that is notable."""

    @contextlib.contextmanager
    def teacher_clock(self, device: torch.device) -> Iterator[None]:
        """Time the teacher's work. On CUDA, use the device's clock, which is read when the log is written."""
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

    def watch(self, input_ids: Int[Tensor, "batch pos"]) -> Float[Tensor, ""]:
        """Find the token whose std most exceeds its divisor, and start copying it to the host.

        Returns the fraction of sites and tokens on which the guard acts.
        """
        recipe, least = self.trainer.recipe, self.trainer.sites.least
        excess = self.trainer.sites.excess()
        guarded = (excess * least > 1).to(excess).mean()
        flat = excess.clamp(max=1 / least if least else 1e15).nan_to_num(0.0).flatten()
        # If any exceeds the limit, take the first in the order of the forward: it has caused those after it.
        first = torch.where(flat > recipe.max_outlier, torch.arange(len(flat), device=flat.device), len(flat)).min()
        place = torch.where(first < len(flat), first, flat.argmax())
        found = torch.stack([place, flat.take(place).long(), input_ids.take(place % input_ids.numel())])
        self._outliers.append((tuple(excess.shape), found.to("cpu", non_blocking=found.is_cuda)))
        return guarded

    def _check(self, excess: float, step: int) -> None:
        """Also stop if a live std exceeds its divisor too far."""
        trainer, limit = self.trainer, self.trainer.recipe.max_outlier
        outliers = [(shape, *found.tolist()) for shape, found in self._outliers]
        self._outliers.clear()
        factor = 0
        if outliers:
            shape, place, factor, token = max(outliers, key=lambda outlier: outlier[2])
        if factor:  # if all is NaN, keep the description of the step before
            self._worst = ""
        if factor >= _NOTABLE:
            site, _, position = np.unravel_index(place, shape)
            self._worst = (
                f"the live {'std' if trainer._centred else 'RMS'} of token {token} ({trainer.decode(token)!r}) at "
                f"position {position} is {factor:,} times its divisor at {list(trainer.sites)[site]}"
            )
        if factor > limit:
            worst, self._worst = self._worst, ""
            self.write()
            raise self.diverged(
                f"at step {step} {worst}, more than max_outlier={limit:g}: the std has drifted from the constant. "
                "spread_live pulls stds together before sites freeze, and guard limits outliers during training"
            )
        super()._check(excess, step)

    def replay(self, log: list[dict[str, Any]], step: int) -> None:
        """Repeat the decisions of an adaptive schedule."""
        for line in log:
            self._begin_events(line["step"])
            self._observe(line["loss"], line["kl"])
        begun = [event.name for event in self.trainer.events if event.step < step]
        self._frozen = begun[-1] if begun else "none"

    @property
    def guarded(self) -> str:  # type: ignore[override]
        """A description of `excess`."""
        return "the loss" if self.trainer.teacher is None else "the loss minus the original's on the same tokens"

    def excess(self, line: dict[str, Any]) -> float:
        """Return the loss minus the teacher's: text that is difficult for both says nothing about the training."""
        if self.trainer.teacher is None:
            return super().excess(line)
        if not all(math.isfinite(line[part] or 0) for part in ("cover_kl", "distance") if part in line):
            return math.nan
        return line["loss"] - line["teacher_loss"]

    def means(self, losses: Float[Tensor, " part"]) -> Float[Tensor, " part"]:
        """Return means over text, or over cover, given sums over these divided by the number of all tokens."""
        if not self.trainer.covers:
            return losses
        loss, kl, teacher_loss, cover_kl, *others, text = losses.unbind()
        of_text = torch.where(text > 0, text, 1.0)  # all of the text may be on another process
        of_cover = torch.where(text < 1, 1 - text, 1.0)
        return torch.stack([loss / of_text, kl / of_text, teacher_loss / of_text, cover_kl / of_cover, *others, text])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Bring the sites to their state in the schedule."""
        self._begin_events(state.global_step)
        sites, recipe = self.trainer.sites, self.trainer.recipe
        constant = sites.constant
        if self.trainer.removes and recipe.guard is not None:
            least = recipe.guard_at(state.global_step)
            held = least * recipe.guard if recipe.live_gradients else 0.0
            sites.guard(least, held, recipe.outlier_noise if least else 1.0)
        self._begun = [event.name for event in sites.advance(self.trainer.events, state.global_step)]
        if self._begun:
            self._frozen = self._begun[-1]
        if sites.constant and not constant:
            compiling = " The model is compiled again." if args.torch_compile else ""
            self.bar.write(f"Step {state.global_step}: every norm is a constant from here on.{compiling}")

    def _begin_events(self, step: int) -> None:
        if self.trainer.pacing is not None:
            self.trainer.events += self.trainer.pacing.begin(step)

    def _observe(self, cross_entropy: float, kl: float) -> None:
        if self.trainer.pacing is not None:
            kl_weight = self.trainer.recipe.kl_weight
            self.trainer.pacing.observe((1 - kl_weight) * cross_entropy + kl_weight * kl)

    def measure(self, line: dict[str, Any], losses: Float[Tensor, " part"]) -> list[Tensor]:
        """Update the running stds. Every `log_every` steps, return live and frozen ones."""
        recipe, sites = self.trainer.recipe, self.trainer.sites
        live = sites.update(recipe.std_decay)
        line["frozen"] = self._begun
        if self.trainer.teacher is not None:
            line["teacher_seconds"], self._teacher = self._teacher, []
        if self.trainer.pacing is not None:
            self._observe(*losses[:2].tolist())  # waits for the device; the same numbers as in the log, for `replay`
        if line["step"] % recipe.log_every:
            return []
        stds = [live.flatten(), sites.constants().flatten()]
        return [*stds, sites.largest_over_constants().flatten()] if self.trainer.removes else stds

    def status(self) -> dict[str, str]:
        """Return what froze last, except for the control."""
        return {"frozen": self._frozen} if self.trainer.removes else {}

    def diverged(self, what: str) -> DivergedError:
        """Add what froze last, and the worst outlier, to the error."""
        worst = f"; {self._worst}" if self._worst else ""
        return super().diverged(f"{what}{worst}; the last site to freeze was {self._frozen}")

    def named(self, numbers: Float[Tensor, " number"], line: dict[str, Any]) -> dict[str, Any]:
        """Also return the stds by site, and read the teacher's clocks."""
        named = super().named(numbers, line)
        if self.trainer.teacher is None:
            del named["teacher_loss"]
        if not self.trainer.covers:
            del named["cover_kl"], named["text"]
        elif named["text"] == 1:
            named["cover_kl"] = None
        if not self.trainer.removes or not self.trainer.recipe.spread_weight:
            del named["spread"]
        if not self.trainer.removes or self.trainer.recipe.guard is None:
            del named["guarded"]
        if "teacher_seconds" in line:
            named["teacher_seconds"] = round(sum(clock() for clock in line["teacher_seconds"]), 4)
        stds = numbers[len(self.parts) + 1 :]
        if len(stds):
            sites = list(self.trainer.sites)
            live, constants = stds[: 6 * len(sites)].view(2, len(sites), -1)
            over = stds[6 * len(sites) :].view(-1, 2)
            begun = {event.name for event in self.trainer.events if event.step <= line["step"]}
            named["std"] = {
                site: {
                    "live": _or_none(live[i]),
                    "frozen": constants[i].tolist() if site in begun else None,
                }
                | ({"over_constant": _or_none(over[i])} if len(over) else {})
                for i, site in enumerate(sites)
            }
        return named


def _or_none(numbers: Float[Tensor, " number"]) -> list[float | None]:
    """Return numbers as a JSON list, with None for NaN."""
    return [None if math.isnan(number) else number for number in numbers.tolist()]
