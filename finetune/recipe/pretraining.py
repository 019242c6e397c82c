"""The recipe of a run that trains from random weights."""

import ast
import contextlib
import dataclasses
from typing import Annotated, Any, Literal

import pydantic
import tyro

from finetune.recipe.fields import RecipeError, Text, Training, described, strict

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
    """Return names and their values, which follow each other; what is not a number, bool or None is a string."""
    if len(words) % 2:
        raise ValueError(f"names and values are to alternate, but these are {len(words)}")
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
"""A dict as a flag: tyro's own flags of a dict that is not empty take no other keys, and no values of other types."""


@described
@pydantic.dataclasses.dataclass(frozen=True, config=strict)
class PretrainRecipe(Training):
    """Everything that a run needs which trains from random weights. The defaults: 3 M tokens, the shape of `micro`."""

    steps: Annotated[int, tyro.conf.Suppress] = 366
    """Optimizer steps of the run."""
    batch: int = 32
    """Sequences a step, over all processes and micro-batches. A sequence is as long as the model's context."""
    micro_batch: int | Literal["auto"] = 8
    """Sequences in one forward of one process; the batch is made up by accumulating gradients. auto: as many as fit
    into memory, tried before the first step; the recipe in the run directory says how many that are."""
    lr: float = 2e-3
    """The highest learning rate, after the warm-up."""
    min_lr: float = 2e-4
    """The learning rate at `lr_horizon`, to which it falls."""
    warmup: int = 13
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices; vectors (biases, gains) have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    text: Annotated[Text, tyro.conf.arg(name="text")] = Text(held_out="books-validation")
    """Where the text comes from."""
    lr_decay: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls."""
    block: Block = "pre-ln"
    """The blocks of the model: see `finetune/blocks/`."""
    family: str | None = None
    """The family of transformers' own models to train instead, by its `model_type` (gpt2, llama, gpt_neox, …). None: a
    model of `finetune.blocks`."""
    n_layer: int = 6
    """Blocks."""
    n_embd: int = 192
    """Width of the residual stream."""
    n_head: int = 6
    """Heads of a block."""
    n_positions: int = 256
    """Context, in tokens: the length of a sequence."""
    vocab_size: int | None = None
    """Tokens of the vocabulary. None: as many as the tokenizer has."""
    knobs: Annotated[dict[str, bool | int | float | str | None], _NAMES_AND_VALUES] = dataclasses.field(
        default_factory=dict
    )
    """Other fields of the model's config: of `finetune.blocks.BlocksConfig`, in place of what `block` says, or of the
    family's. Those of the flag join those of the recipe, and replace them where the name is the same."""
    tokenizer: str = "micro"
    """The model whose tokenizer to use: a bundled name (micro), a local directory, or a name on the Hub."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in {"n_layer": 1, "n_embd": 1, "n_head": 1, "n_positions": 2}.items():
            if getattr(self, field) < least:
                raise RecipeError(f"{field} is {getattr(self, field)}; at least {least} is needed.")
        if own := sorted(set(self.knobs) & {field.name for field in dataclasses.fields(self)}):
            raise RecipeError(f"knobs holds {', '.join(own)}: say it as a field of the recipe itself.")
        if self.lr_decay == "linear" and self.min_lr == self.lr:
            raise RecipeError(f"lr_decay is linear, but min_lr is lr, {self.lr}: lower min_lr.")
        if self.family is not None and self.block != "pre-ln":
            raise RecipeError(f"family is {self.family}, but block is {self.block}: choose one.")
        norm = self.knobs.get("norm", "none")
        if norm != "none" and (self.block.endswith("nonorm") or self.block == "op"):
            raise RecipeError(f"block is {self.block}, which has no norms, but knobs.norm is {norm}: choose one.")
