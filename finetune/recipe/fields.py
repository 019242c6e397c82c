"""The fields of a recipe that removes LayerNorm: their types, what they mean, and which values are invalid."""

import dataclasses
import math
import re
import textwrap
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import pydantic
import pydantic_core
import tyro

from finetune.errors import NolnError

SiteKind = Literal["mlp", "qk", "v", "attn_out", "mlp_out", "final"]
"""A kind of site, the same in all families: `mlp`, the norm that a block's MLP reads; `qk` and `v`, the norm that its
attention reads, on the path to queries and keys and on the path to values; `attn_out` and `mlp_out`, the norms of the
outputs of attention and MLP in families that have them; `final`, the model's final norm."""
TokenClass = Literal["eot", "position_0"]
"""A token class with its own constant during training: end-of-text tokens, and tokens at position 0."""
Phase = Literal["mlp", "qk", "v", "attn_out", "mlp_out", "final", "eot", "position_0"]
"""One phase of a schedule: freezing the sites of a kind, or merging a token class."""
StdMean = Literal["arithmetic", "geometric", "harmonic"]
"""The kind of mean of stds that is used as a constant."""

LowRankTarget = Literal["readers", "writers", "embeddings"]
"""What can be trained, besides the norms, with lora_rank."""

EMPTY = tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default or 'none'})")
"""For a flag that takes any number of values: an empty default is called none."""

_COVER_KIND = re.compile(
    r"uniform|shuffled|renamed|repeated|runs|prompt|(unigram|corrupted)(-(?=[\d.]*[1-9])(\d+(\.\d+)?|\.\d+))?"
)

_Kind = TypeVar("_Kind")

strict = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)


def described(kind: type[_Kind]) -> type[_Kind]:
    """Append the docstrings of a dataclass's fields to its own docstring, for pydoc and Jupyter."""
    fields = [field for base in reversed(kind.__mro__) for field in vars(base).get("__pydantic_fields__", {}).items()]
    told = {name: " ".join(field.description.split()) for name, field in fields if field.description}
    lines = [textwrap.fill(f"{name}: {text}", 100, subsequent_indent="    ") for name, text in told.items()]
    kind.__doc__ = f"{kind.__doc__}\n\nFields:\n\n" + "\n".join(lines)
    return kind


_FORMER_NAMES = {"ln_2": "mlp", "ln_f": "final", "bos": "position_0"}


def current_name(name: str) -> str:
    """Return the current name of a phase, site (`h.3.ln_2`) or field (`schedule.gap.ln_f`) that may be a former one."""
    *parents, last = name.split(".")
    return ".".join([*parents, _FORMER_NAMES.get(last, last)])


class _ByPhase:
    """Settings by phase. Former names of phases are accepted."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _take_former_names(cls, given: Any) -> Any:
        if isinstance(given, pydantic_core.ArgsKwargs):  # from a call
            kwargs = {current_name(name): value for name, value in (given.kwargs or {}).items()}
            return pydantic_core.ArgsKwargs(given.args, kwargs)
        return {current_name(str(name)): value for name, value in given.items()} if isinstance(given, dict) else given


class RecipeError(NolnError):
    """A recipe contradicts itself, or does not fit the model; the message says what to change."""


@described
@pydantic.dataclasses.dataclass(frozen=True, config=strict)
class Text:
    """The text, and which part of it is held out."""

    source: Annotated[str, tyro.conf.arg(name="text", prefix_name=False)] = "books-train"
    """The text to train on: a bundled name (books-train, books-validation, books-report, shifted-peps), a file (.txt,
    .jsonl or .parquet, also compressed as .gz or .xz), a directory (of such files, saved by `datasets`, or with
    nanoGPT's train.bin and val.bin), or a data set on the Hub."""
    held_out: str | None = None
    """A second text to measure the loss on, which is never trained on. None: the files of a directory that are called
    validation or test, or else a part of `source`."""
    held_out_fraction: float = 0.01
    """The fraction of the documents of `source` that is held out if nothing else is."""
    held_out_blocks: int = 240
    """The largest number of held-out blocks to measure the losses on."""
    train_blocks: int | None = None
    """Train only on this many blocks, spread evenly over the source and repeated as needed. None: on all of them."""
    column: str | None = None
    """The column that holds the text. None: the column called text, or the only column of strings."""
    subset: str | None = None
    """The configuration of a Hub data set."""
    revision: str | None = None
    """The revision of a Hub data set. None: the newest or, if that is a loading script, which `datasets` no longer
    runs, the Hub's conversion, refs/convert/parquet."""
    split: str = "train"
    """The split of a Hub data set or of a directory saved by `datasets`."""
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """The type of the numbers in nanoGPT's .bin files. auto: uint16 for vocabularies of at most 65,536 tokens."""
    prefix: str | None = None
    """A token to put before each block, in training, in held-out text and in analyses: "bos" for the tokenizer's
    beginning-of-sequence token, or the text of a token. None: no token."""
    streaming: bool = False
    """Tokenise during training, for text that does not fit on the disk."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_fraction < 1:
            raise RecipeError(f"text.held_out_fraction is {self.held_out_fraction}; it must lie between 0 and 1.")
        for field in ("held_out_blocks", "train_blocks"):
            if (blocks := getattr(self, field)) is not None and blocks < 1:
                raise RecipeError(f"text.{field} is {blocks}; at least 1 is needed.")
        if self.train_blocks is not None and self.streaming:
            raise RecipeError(
                "text.train_blocks and text.streaming cannot be combined, because a stream is read only once. Set one."
            )


@described
@pydantic.dataclasses.dataclass(frozen=True, config=strict)
class Gaps(_ByPhase):
    """Steps from one event of a phase to the next event, of the same phase or of the next one. Fractions add up."""

    mlp: float = 0.0
    """From the norm that one layer's MLP reads to that of the next layer."""
    qk: float = 0.0
    """From one layer's QK path to that of the next layer."""
    v: float = 0.0
    """From one layer's V path, the most fragile kind of site, to that of the next layer."""
    attn_out: float = 0.0
    """From the norm of what one layer's attention writes to that of the next layer (Gemma 2 only)."""
    mlp_out: float = 0.0
    """From the norm of what one layer's MLP writes to that of the next layer (Gemma 2 only)."""
    final: float = 0.0
    """Steps from the final norm to the next phase."""
    eot: float = 0.0
    """From the merging of end-of-text tokens to the next phase."""
    position_0: float = 0.0
    """Steps from merging the position-0 class to the next phase."""

    def __post_init__(self) -> None:
        for phase, gap in dataclasses.asdict(self).items():
            if not 0 <= gap < math.inf:
                raise RecipeError(f"schedule.gap.{phase} is {gap}; it must be at least 0 steps (0: all at once).")


Direction = Literal["up", "down", "together"]
"""The order of layers in which the sites of a kind freeze: from the first, from the last, or all at the same step."""


@described
@pydantic.dataclasses.dataclass(frozen=True, config=strict)
class Layers(_ByPhase):
    """The order in which the layers of each kind of site freeze."""

    mlp: Direction = "up"
    """Norms that MLPs read."""
    qk: Direction = "up"
    """QK paths."""
    v: Direction = "up"
    """V paths."""
    attn_out: Direction = "up"
    """Norms of what attention writes."""
    mlp_out: Direction = "up"
    """Norms of what MLPs write."""


@described
@pydantic.dataclasses.dataclass(frozen=True, config=strict)
class Schedule:
    """When the norms freeze, relative to the number of layers, so that it serves a model of any depth."""

    start: float
    """The step at which the first site freezes. The stds are measured before it."""
    gap: Gaps
    """Steps from one event to the next."""
    order: tuple[str, ...] = get_args(Phase)
    """The phases, in order. A phase is a kind of site, which freezes layer by layer, a single site (`h.3.qk`), or a
    class of token, which is merged with the ordinary tokens. Kinds that a model lacks are skipped. A class that is not
    listed has no constant of its own: its tokens count as ordinary ones."""
    layers: Layers = Layers()
    """The order in which the layers of each kind of site freeze: up (from the first), down (from the last) or
    together."""
    fade: int = 1
    """Steps over which the divisor of a site moves from the live std to the constant. 1: at once, as published."""
    merge_fade: int | None = None
    """Steps over which a class of token is merged with the ordinary tokens. None: as many as `fade`."""
    tolerance: float | None = None
    """Makes the schedule adaptive: an event waits until the smoothed training loss is back within this many nats/token
    of its value before the previous event (Heimersheim 2024), and for at least `gap` steps. None: it waits for `gap`
    steps."""
    max_gap: float = math.inf
    """If adaptive: the most steps that an event waits. An event never waits so long that the remaining ones do not fit
    into the run."""
    smoothing: float = 0.8
    """If adaptive: the fraction of the smoothed loss that is kept at each step."""
    at: Annotated[tuple[int, ...], EMPTY] = ()
    """The step of each entry of `order`, used instead of `start` and `gap`: the steps at which an adaptive schedule
    acted."""

    @pydantic.field_validator("order", mode="before")
    @classmethod
    def _take_former_names(cls, order: Any) -> Any:
        return tuple(map(current_name, map(str, order))) if isinstance(order, list | tuple) else order

    def __post_init__(self) -> None:
        if not 1 <= self.start < math.inf:
            raise RecipeError(f"schedule.start is {self.start}; at least 1 step is needed to measure the stds.")
        for name, fade in (("fade", self.fade), ("merge_fade", self.merge_fade)):
            if fade is not None and fade < 1:
                raise RecipeError(f"schedule.{name} is {fade}; it must be 1 (a jump) or more (a fade).")
        for entry in self.order:
            if entry not in get_args(Phase) and not re.fullmatch(r"h\.\d+\.(mlp|qk|v|attn_out|mlp_out)", entry):
                raise RecipeError(
                    f"schedule.order contains {entry}, which is neither a kind of site or token class "
                    f"({', '.join(get_args(Phase))}) nor a single site, such as h.3.qk."
                )
        if len(set(self.order)) < len(self.order):
            raise RecipeError(f"schedule.order contains an entry twice: {', '.join(self.order)}.")
        for kind in ("mlp", "qk", "v", "final"):
            if not any(entry.split(".")[-1] == kind for entry in self.order):
                raise RecipeError(f"schedule.order lacks {kind}, which would never be frozen. Add it to the list.")
        if self.tolerance is not None and self.at:
            raise RecipeError(
                "schedule.at and schedule.tolerance cannot be combined: one fixes the steps, the other waits for the "
                "loss. Set one."
            )
        if not self.max_gap >= 1:
            raise RecipeError(f"schedule.max_gap is {self.max_gap}; at least 1 step is needed.")
        if not 0 <= self.smoothing < 1:
            raise RecipeError(f"schedule.smoothing is {self.smoothing}; it must be at least 0 and less than 1.")
        if self.at and (len(self.at) != len(self.order) or list(self.at) != sorted(self.at) or self.at[0] < 1):
            raise RecipeError(
                "schedule.at needs one step for each entry of schedule.order, at least 1 and in ascending order."
            )

    @property
    def classes(self) -> tuple[TokenClass, ...]:
        """The token classes that have their own constants."""
        return tuple(entry for entry in get_args(TokenClass) if entry in self.order)


@described
@pydantic.dataclasses.dataclass(frozen=True, config=strict)
class Training:
    """The fields that every kind of run needs. Steps are counted from 0."""

    name: Annotated[str, tyro.conf.Suppress]
    """The name that the run directory begins with."""
    steps: Annotated[int, tyro.conf.Suppress]
    """Optimizer steps of the run."""
    batch: int
    """Sequences per optimizer step, over all processes and micro-batches. `context` or `n_positions` is their
    length."""
    micro_batch: int | Literal["auto"]
    """Sequences per forward pass of one process; gradients accumulate over the micro-batches of a batch. auto: as many
    as fit into memory, found by trial before the first step and recorded in the recipe in the run directory."""
    lr: float
    """The highest learning rate, reached after the warm-up."""
    min_lr: float
    """The learning rate to which it falls, on a cosine, at `lr_horizon`."""
    warmup: int
    """Steps over which the learning rate rises from 0."""
    text: Annotated[Text, tyro.conf.arg(name="text")] = Text()
    """The text."""
    lr_horizon: int | None = None
    """The step at which the learning rate reaches `min_lr`. None: the last step. A later step cuts off the end of its
    fall."""
    weight_decay: float = 0.01
    """AdamW's weight decay of matrices. Vectors (biases, gains) have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    clip: float = 1.0
    """The largest norm of the gradient; larger gradients are scaled down to it. 0: no limit."""
    max_rise: float = 3.0
    """The run stops if the loss of three steps in a row exceeds the mean of the first ten by more than this, in
    nats/token. A single step may exceed it: while norms fade, one unusual token can. If the model is fitted to the
    original, the original's loss on the same tokens is subtracted first, so that difficult text does not count."""
    seed: int = 0
    """The seed of the order of the text and of everything else that is random."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The device to train on. auto: an accelerator, if there is one."""
    bf16: bool | None = None
    """Compute matrix products in bfloat16, with weights in float32: --bf16 or --no-bf16. None: on CUDA devices that
    support it, and on CPUs with AMX or AVX512-BF16; the recipe in the run directory records the choice."""
    compile: bool = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and is a third slower."""
    log_every: int = 10
    """Steps between records of the stds or signals, and between reports to `report_to`."""
    save_every: int = 50
    """Steps between checkpoints. The newest two are kept."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb"], ...], EMPTY] = ()
    """Where to report the losses, in addition to the run's log."""
    push_to_hub: str | None = None
    """The Hub repository to push the finished model to."""

    def __post_init__(self) -> None:
        for field in ("steps", "batch", "micro_batch", "log_every", "save_every"):
            if getattr(self, field) != "auto" and getattr(self, field) < 1:
                raise RecipeError(f"{field} is {getattr(self, field)}; at least 1 is needed.")
        if self.micro_batch != "auto" and self.batch % self.micro_batch:
            raise RecipeError(
                f"batch is {self.batch}, which is not a multiple of micro_batch, {self.micro_batch}. Change either."
            )
        if not 0 <= self.min_lr <= self.lr < math.inf or self.lr == 0:
            raise RecipeError(
                f"min_lr is {self.min_lr} and lr is {self.lr}; 0 <= min_lr <= lr and lr > 0 are required."
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(
                f"betas are {self.betas[0]} and {self.betas[1]}; each must be at least 0 and less than 1."
            )
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed is {self.seed}; it must lie between 0 and {2**32 - 1}.")
        self._check_not_negative("clip", "weight_decay", "max_rise")
        if not 0 <= self.warmup < self.steps:
            raise RecipeError(
                f"warmup is {self.warmup} steps; it must be at least 0 and shorter than the run of {self.steps} steps."
            )
        if self.horizon < self.steps:
            raise RecipeError(
                f"lr_horizon is {self.horizon}; it must not be before the end of the run at step {self.steps}."
            )

    def _check_not_negative(self, *fields: str) -> None:
        for field in fields:
            if not getattr(self, field) >= 0:
                raise RecipeError(f"{field} is {getattr(self, field)}; it must not be negative.")

    @property
    def horizon(self) -> int:
        """The step at which the learning rate reaches `min_lr`."""
        return self.steps if self.lr_horizon is None else self.lr_horizon

    def scaled(self, steps: int) -> Self:
        """Return the recipe for a run of `steps` steps, with warm-up, LR horizon and schedule, if any, scaled as well.

        Raises:
            RecipeError: `steps` is less than 1, or so small that the recipe is invalid.
        """
        if steps < 1:
            raise RecipeError(f"steps is {steps}; at least 1 is needed.")
        return dataclasses.replace(self, **self._scaled(steps))

    def _scaled(self, steps: int) -> dict[str, Any]:
        factor = steps / self.steps
        return {
            "steps": steps,
            "lr_horizon": None if self.lr_horizon is None else max(steps, round(self.lr_horizon * factor)),
            "warmup": round(self.warmup * factor),
        }


@described
@pydantic.dataclasses.dataclass(frozen=True, config=strict)
class Recipe(Training):
    """All settings of a run that removes LayerNorm."""

    schedule: Schedule = dataclasses.field(kw_only=True)
    """When the norms freeze."""
    context: int | None = None
    """The length of a sequence, in tokens. None: as many as the model has positions, but at most 1,024."""
    model: str = "micro"
    """The model whose norms are removed: a bundled name (micro), a local directory, a GGUF file, or a name on the
    Hub."""
    revision: str | None = None
    """The revision of a model on the Hub."""
    kl_weight: float = 0.0
    """What the LN-free model is fitted to. 0: the text (cross-entropy). 1: the original's predictions (KL divergence).
    Between: (1 − kl_weight) · cross-entropy + kl_weight · KL. The control is always fitted to the text."""
    match_weight: float = 0.0
    """The weight of the distance between the residual streams of the LN-free model and the original, both as LayerNorm
    reads them, averaged over all blocks but the last. It falls with the learning rate: early on the streams guide
    training, at the end the predictions do."""
    aux_weight: float = 0.0
    """The weight λ of the auxiliary loss of Baroni et al. 2025: λ · mean (σ_token − σ̂)² at the final norm."""
    cover: float = 0.0
    """The share of the run's blocks that are cover: tokens that need not be text, on which the LN-free model is held to
    the original's predictions (`kl_weight`, `match_weight`). The control is trained on text in their place."""
    cover_kinds: tuple[str, ...] = ("uniform",)
    """The kinds of cover, used in turn. uniform: tokens drawn uniformly from the vocabulary. unigram-T: drawn as often
    as in the text, at temperature T (1 if omitted). shuffled: a block of text in random order. corrupted-P: a block of
    text with a share P of its tokens replaced by uniform ones (if omitted, drawn for each block). renamed: a block of
    text in which each token is replaced by another one throughout. repeated: 1 to 32 tokens of the text, or uniform
    ones, over and over. runs: short runs of all of these. prompt: a block of text behind the token with which prompts
    begin, the tokenizer's beginning-of-sequence or end-of-text token."""
    cover_span: tuple[float, float] = (0.0, 1.0)
    """The fractions of the run between which there is cover. `cover` is its share there."""
    cover_stds: bool = True
    """Include cover in the running means of the stds."""
    spread_weight: float = 0.0
    """The weight of the spread, the mean over frozen sites and tokens of |log live std − log constant|^spread_power."""
    spread_power: float = 2.0
    """The exponent of the spread. The higher it is, the more the tokens with the most unusual stds count."""
    spread_live: bool = False
    """Squeeze: include live sites in the spread, with the running mean of a site as its constant, and pull the stds of
    tokens of all classes towards that of ordinary tokens. A live norm ignores the scale of what it reads, so this costs
    little before the first site freezes, at `schedule.start`."""
    spread_position_0: float = 1.0
    """How many tokens a token at position 0 counts as in the spread."""
    spread_on: Literal["all", "cover"] = "all"
    """The blocks that `spread_weight` acts on."""
    std_decay: float = 0.9
    """The fraction of the running means of the stds that is kept at each optimizer step."""
    std_mean: StdMean = "arithmetic"
    """The kind of running mean of the stds: of σ, log σ, or 1/σ."""
    also: Annotated[tuple[str, ...], EMPTY] = ()
    """More texts to measure the finished models on, named as in `text.source`. Held-out text and random tokens are
    always measured."""
    longest_write: float | None = None
    """Before training, scale down MLP neurons of the LN-free model that write massive activations, so that none writes
    a vector with an RMS above this many times the stream's median (`finetune.massive_writes`). None: scale none."""
    longest_embedding: float | None = None
    """Before training, scale down the token embeddings of the LN-free model whose RMS is above this many times the
    median over text. The live norms of the first block hide their length, but constants do not. An unembedding that is
    tied to the embedding is untied and keeps its weights. None: scale none."""
    guard: float | None = None
    """κ of the outlier guard: during training, the divisor of a token at a site is at least the live std over κ. None:
    no guard. The LN-free model has no guard."""
    guard_span: tuple[float, float] = (0.5, 0.9)
    """The fractions of the run between which the guard is lifted: 1/κ falls linearly to 0."""
    live_gradients: bool = False
    """While the guard is on, backpropagate through a frozen site as through a live norm, without the part of the
    gradient along the divided vector, which grows from block to block. Requires a guard, and a spread_weight to hold
    stds together."""
    outlier_noise: float = 1.0
    """While the guard is up, lengthen what one token in 16 reads at a frozen norm by a factor between 1 and this, drawn
    for each token and norm: it reads the vector that it would read if its std were so many times larger. The model
    learns to bring such tokens back instead of lengthening them from block to block. Requires a guard. 1: none."""
    max_outlier: float = 1e6
    """The run stops if the live std of a token is this many times its divisor, because the constant no longer fits."""
    shard: bool = False
    """Divide the model, its gradients and moments, and the original among the processes, each of which otherwise holds
    all of them. For models that are too large for one device; slower. `accelerate launch` with FSDP does the same."""
    lora_rank: int | None = None
    """Train at low rank (LoRA, Hu et al. 2021): each matrix W stays as it is, and a product of rank `lora_rank` that is
    added to it trains, along with the gains and biases of norms. Gradients and AdamW's moments take memory only for
    what trains, and the exported models are ordinary ones. 0: train only gains and biases of norms. None: train all
    weights. Needs the extra `lora`, and usually a higher lr."""
    lora_alpha: float = 32.0
    """At low rank, the product is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[LowRankTarget, ...] = ("readers", "writers")
    """At low rank, what trains in addition to the norms. readers: the matrices that read the norms of blocks. writers:
    the matrices through which attention and MLPs write to the residual stream. embeddings: the embeddings and the
    unembedding, at full rank."""
    control: bool = True
    """Also fine-tune a control that keeps its norms, by cross-entropy alone, which shows what fine-tuning alone does.
    With `kl_weight` or `match_weight`, the original is the better comparison."""
    control_from: str | None = None
    """The directory of a control from an earlier run, to use instead of training one."""
    export_format: Literal["b25", "h24"] = "b25"
    """The format of the LN-free checkpoint: each norm keeps its γ and β (b25), or they are folded into the next weights
    (h24)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_not_negative("match_weight", "aux_weight", "spread_weight", "spread_position_0")
        if not 0 <= self.kl_weight <= 1:
            raise RecipeError(f"kl_weight is {self.kl_weight}; it must be from 0 (the text) to 1 (the original).")
        if self.context is not None and self.context < 2:
            raise RecipeError(f"context is {self.context}; at least 2 tokens are needed.")
        self._check_cover()
        self._check_outliers()
        if self.shard and self.lora_rank is not None:
            raise RecipeError(
                "shard and lora_rank cannot be combined. Training at low rank takes little memory, so omit shard."
            )
        if self.shard and self.micro_batch == "auto":
            raise RecipeError(
                "With shard, micro_batch cannot be auto, because that tests each process alone. Set it to a number."
            )
        if self.lora_rank is not None and self.lora_rank < 0:
            raise RecipeError(f"lora_rank is {self.lora_rank}; it must be at least 0, or None to train all weights.")
        if self.lora_rank and not {"readers", "writers"} & {*self.lora_targets}:
            raise RecipeError(
                f"lora_rank is {self.lora_rank}, but lora_targets has neither readers nor writers. Add one of them, or "
                "set lora_rank to 0."
            )
        if not 0 < self.lora_alpha < math.inf:
            raise RecipeError(f"lora_alpha is {self.lora_alpha}; it must be above 0.")
        if not 0 <= self.std_decay < 1:
            raise RecipeError(f"std_decay is {self.std_decay}; it must be at least 0 and less than 1.")
        if self.schedule.start >= self.steps:
            raise RecipeError(
                f"schedule.start is {self.schedule.start}, so nothing would freeze in a run of {self.steps} steps."
            )
        if self.control_from is not None and not self.control:
            raise RecipeError(f"control_from is {self.control_from}, but control is false. Change one of them.")

    def guard_at(self, step: int) -> float:
        """Return 1/κ of the outlier guard at a step, or 0 without a guard."""
        if self.guard is None:
            return 0.0
        start, end = self.guard_span
        lifted = (step / self.steps - start) / (end - start)
        return (1 - min(max(lifted, 0.0), 1.0)) / self.guard

    @property
    def control_settings(self) -> tuple[Any, ...]:
        """The values of the fields on which the control depends. Recipes with equal values have the same control."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self) if SHAPES_CONTROL[field.name])

    def _check_outliers(self) -> None:
        if not 1 <= self.spread_power < math.inf:
            raise RecipeError(f"spread_power is {self.spread_power}; it must be at least 1.")
        for name in ("longest_write", "longest_embedding"):
            longest = getattr(self, name)
            if longest is not None and not 0 < longest < math.inf:
                raise RecipeError(f"{name} is {longest}; it must be above 0, or None.")
        if self.guard is not None and not 1 < self.guard < math.inf:
            raise RecipeError(f"guard is {self.guard}; it must be above 1, or None for no guard.")
        if self.live_gradients and (self.guard is None or not self.spread_weight):
            raise RecipeError(
                "live_gradients needs a guard, because it acts only under one, and a spread_weight, because otherwise "
                "nothing trains the lengths of residual vectors. Set both, or set live_gradients to false."
            )
        if not 1 <= self.outlier_noise < math.inf or (self.outlier_noise > 1 and self.guard is None):
            raise RecipeError(
                f"outlier_noise is {self.outlier_noise}; it must be at least 1, and above 1 it needs a guard, with "
                "which it ends."
            )
        start, end = self.guard_span
        if not 0 <= start < end <= 1:
            raise RecipeError(f"guard_span is {start}, {end}; it must begin before it ends, between 0 and 1.")
        if self.guard_at(self.steps - 1):
            raise RecipeError(
                f"guard_span ends at {end}, so the guard would not be lifted by the last of {self.steps} steps, but "
                "the LN-free model has no guard. Let it end earlier."
            )
        if not self.max_outlier >= 2:
            raise RecipeError(f"max_outlier is {self.max_outlier}; it must be at least 2.")

    def _check_cover(self) -> None:
        if not 0 <= self.cover <= 1 - 1 / self.batch:
            raise RecipeError(
                f"cover is {self.cover}; it must be at least 0, and at most {1 - 1 / self.batch:g}, which leaves one "
                f"block of text in every batch of {self.batch}. Lower cover, or raise batch."
            )
        if self.cover and not (self.kl_weight or self.match_weight):
            raise RecipeError(
                f"cover is {self.cover}, but without fitting the original the model learns nothing from it. Set "
                "kl_weight or match_weight, or set cover to 0."
            )
        unknown = [kind for kind in self.cover_kinds if not _COVER_KIND.fullmatch(kind)]
        if unknown or not self.cover_kinds:
            raise RecipeError(
                f"cover_kinds is {', '.join(self.cover_kinds) or 'empty'}; the kinds are uniform, unigram, unigram-T, "
                "shuffled, corrupted, corrupted-P, renamed, repeated, runs and prompt, with positive numbers T and P."
            )
        start, end = self.cover_span
        if not 0 <= start < end <= 1:
            raise RecipeError(f"cover_span is {start}, {end}; it must begin before it ends, between 0 and 1.")
        if self.spread_weight and self.spread_on == "cover" and not self.cover:
            raise RecipeError("spread_on is cover, but cover is 0, so there would be no penalty. Change one of them.")

    def _scaled(self, steps: int) -> dict[str, Any]:
        factor = steps / self.steps
        start = max(1.0, self.schedule.start * factor)
        # This equals `factor` unless start was raised to 1: the rest of the schedule is fitted into the steps left.
        after_start = (steps - start) / (self.steps - self.schedule.start)
        schedule = dataclasses.replace(
            self.schedule,
            start=start,
            gap=Gaps(**{phase: gap * after_start for phase, gap in dataclasses.asdict(self.schedule.gap).items()}),
            fade=max(1, int(self.schedule.fade * after_start + 1e-6)),
            merge_fade=self.schedule.merge_fade and max(1, int(self.schedule.merge_fade * after_start + 1e-6)),
            max_gap=max(1.0, self.schedule.max_gap * after_start),
            at=tuple(max(1, int(step * factor + 1e-6)) for step in self.schedule.at),
        )
        return super()._scaled(steps) | {"schedule": schedule}


SHAPES_CONTROL: dict[str, bool] = dict.fromkeys(
    (
        *("model", "revision", "control", "control_from", "context"),
        *("text", "seed", "steps", "batch", "micro_batch", "lr", "min_lr", "warmup", "lr_horizon", "max_rise"),
        *("weight_decay", "betas", "clip", "device", "bf16", "compile", "gradient_checkpointing"),
        *("shard", "lora_rank", "lora_alpha", "lora_targets"),
    ),
    True,
) | dict.fromkeys(
    (
        *("schedule", "std_decay", "std_mean", "kl_weight", "match_weight", "aux_weight", "export_format"),
        *("cover", "cover_kinds", "cover_span", "cover_stds", "spread_weight", "spread_on"),
        *("spread_power", "spread_live", "spread_position_0", "longest_write", "longest_embedding"),
        *("guard", "guard_span", "live_gradients", "outlier_noise", "max_outlier"),
        *("name", "also", "log_every", "save_every", "report_to", "push_to_hub"),
    ),
    False,
)
"""For each field of `Recipe`, whether the control depends on it. The others determine how LN is removed, and what is
saved and reported of the run. A new field needs an entry."""
