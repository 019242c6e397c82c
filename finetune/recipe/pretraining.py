"""The recipe of a run that trains from random weights."""

import ast
import contextlib
import dataclasses
from typing import Annotated, Any, Literal

import pydantic
import tyro

from finetune.recipe.fields import EMPTY, RecipeError, Text, Training, described, strict

Block = Literal[
    "pre-ln",
    "post-ln",
    "parallel",
    "v-skipinit",
    "skipless",
    "skipless-parallel",
    "skipless-nonorm",
    "skipless-parallel-nonorm",
    "op",
]
"""The blocks of `finetune.blocks`."""


def _from_flag(words: list[str]) -> dict[str, Any]:
    """Parse alternating names and values. A value that is not a number, bool or None is a string."""
    if len(words) % 2:
        raise ValueError(f"names and values must alternate, but there are {len(words)} words")
    values = {}
    for name, word in zip(words[::2], words[1::2], strict=True):
        value = word
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval({"true": "True", "false": "False", "null": "None"}.get(word, word))
        values[name] = value if isinstance(value, bool | int | float | None) else word
    return values


_NAMES_AND_VALUES = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[KNOB VALUE …]",
    instance_from_str=_from_flag,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda values: [str(word) for pair in values.items() for word in pair],
)
"""A dict as a flag. tyro's own flag for a dict that is not empty accepts neither new keys nor other types of values."""


@described
@pydantic.dataclasses.dataclass(frozen=True, config=strict)
class PretrainRecipe(Training):
    """All settings of a run that trains from random weights. By default, a model as large as `micro` is trained on 3 M
    tokens.
    """

    steps: Annotated[int, tyro.conf.Suppress] = 366
    """Optimizer steps of the run."""
    batch: int = 32
    """Sequences per optimizer step, over all processes and micro-batches. A sequence is as long as the model's
    context."""
    micro_batch: int | Literal["auto"] = 8
    """Sequences per forward pass of one process; gradients accumulate over the micro-batches of a batch. auto: as many
    as fit into memory, found by trial before the first step and recorded in the recipe in the run directory."""
    lr: float = 2e-3
    """The highest learning rate, reached after the warm-up."""
    min_lr: float = 2e-4
    """The learning rate to which it falls, at `lr_horizon`."""
    warmup: int = 13
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """AdamW's weight decay of matrices. Vectors (biases, gains) have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    text: Annotated[Text, tyro.conf.arg(name="text")] = Text(held_out="books-validation")
    """The text."""
    lr_decay: Literal["cosine", "linear"] = "cosine"
    """The shape of the learning rate's decay."""
    block: Block = "pre-ln"
    """The blocks of the model, as `finetune.blocks` describes them."""
    family: str | None = None
    """Train one of transformers' own models instead, of the family with this `model_type` (gpt2, llama, gpt_neox, …).
    None: train a model of `finetune.blocks`."""
    n_layer: int = 6
    """The number of blocks."""
    n_embd: int = 192
    """The width of the residual stream."""
    n_head: int = 6
    """The number of heads in a block."""
    n_positions: int = 256
    """The context: the length of a sequence, in tokens."""
    vocab_size: int | None = None
    """The size of the vocabulary, in tokens. None: that of the tokenizer."""
    knobs: Annotated[dict[str, bool | int | float | str | None], _NAMES_AND_VALUES, EMPTY] = dataclasses.field(
        default_factory=dict
    )
    """Other fields of the model's config: of `finetune.blocks.BlocksConfig`, where they override those of `block`, or
    of the family's. Those given as a flag are added to those of the recipe, and replace them where the name is the
    same."""
    tokenizer: str = "micro"
    """The model whose tokenizer is used: a bundled name (micro), a local directory, or a name on the Hub."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in {"n_layer": 1, "n_embd": 1, "n_head": 1, "n_positions": 2}.items():
            if getattr(self, field) < least:
                raise RecipeError(f"{field} is {getattr(self, field)}; at least {least} is needed.")
        if own := sorted(set(self.knobs) & {field.name for field in dataclasses.fields(self)}):
            raise RecipeError(f"knobs contains {', '.join(own)}, a field of the recipe itself. Set it there.")
        if self.lr_decay == "linear" and self.min_lr == self.lr:
            raise RecipeError(f"lr_decay is linear, but min_lr and lr are both {self.lr}. Lower min_lr.")
        if self.family is not None and self.block != "pre-ln":
            raise RecipeError(f"family is {self.family}, but block is {self.block}. Set only one of them.")
        norm = self.knobs.get("norm", "none")
        if norm != "none" and (self.block.endswith("nonorm") or self.block == "op"):
            raise RecipeError(f"block is {self.block}, which has no norms, but knobs.norm is {norm}. Change either.")
