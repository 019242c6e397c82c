"""The knobs of a model's blocks, and the named blocks, each of which sets some knobs."""

import math
from typing import Any, Literal, no_type_check

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from finetune.errors import NolnError

NormKind = Literal["ln", "rmsnorm", "none"]
MatrixInit = Literal["identity", "orthogonal", "normal"]
Number = float | int  # a strict config does not accept 1 as a float


class BlockError(NolnError):
    """Knobs contradict each other, or a model cannot be converted as requested."""


@no_type_check  # strict checks types; jaxtyping's import hook would reject the extra arguments that configs accept
@strict
class BlocksConfig(PreTrainedConfig):
    """The shape of a model and the knobs of its blocks. The defaults are GPT-2's block in the shape of `micro`."""

    model_type = "noln-blocks"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    vocab_size: int = 4096
    n_positions: int = 256
    n_embd: int = 192
    n_layer: int = 6
    n_head: int = 6
    n_inner: int | None = None
    """The width of the MLP. None: four times that of the model."""
    activation_function: str = "gelu_new"
    """A name in transformers' `ACT2FN`."""
    negative_slope: Number = 0.0
    """The slope of "leaky_relu" below 0. At 0, as published, it is ReLU."""
    qk_bias: bool = True
    vp_bias: bool = True
    """Whether value and projection matrices have biases, if they are ordinary matrices without gains."""
    mlp_bias: bool = True

    norm: NormKind = "ln"
    first_norm: NormKind | None = None
    """Block 0's first norm. None: the same as `norm` or, if that is none, an LN, as in the published code."""
    final_norm: NormKind = "ln"
    """The model's last norm. In the published code it is always an LN, even with RMSNorm or none in the blocks."""
    norm_position: Literal["pre", "post"] = "pre"
    norm_epsilon: Number = 1e-5
    qk_norm: NormKind = "none"
    """The norm of queries and keys, over the width of a head. All heads share one weight per coordinate."""
    softcap: Number | None = None
    """c in c · tanh(logit / c), applied to attention logits. In the published code it is 30 or None."""

    parallel: bool = False
    """Attention and MLP read the same norm and add to the same skip, whose gain is `mlp_skip_gain`. The gain is trained
    if `train_mlp_gains`; in the published code it never is."""
    attn_skip_gain: Number = 1.0
    """At 0 there is no skip, whether gains are trained or not."""
    attn_gain: Number = 1.0
    mlp_skip_gain: Number = 1.0
    mlp_gain: Number = 1.0
    train_attn_gains: bool = False
    train_mlp_gains: bool = False

    attn_identity_gain: Number = 0.0
    """α of the attention matrix."""
    attn_softmax_gain: Number = 1.0
    """β of the attention matrix."""
    attn_centre_gain: Number = 0.0
    """γ of the attention matrix."""
    train_attn_matrix_gains: bool = False
    """Whether to train α, β and γ. Each head has its own. An α or γ of 0 is omitted and not trained."""

    value_skip_gain: Number | None = None
    """α_V, the gain of the initial value matrix, which is then constant. None: an ordinary, trained matrix."""
    value_gain: Number = 1.0
    """β_V, the gain of the learned value matrix that is added to it. At 0 there is none."""
    first_value_gain: Number | None = None
    """β_V in block 0. None: the same as `value_gain`."""
    value_init: MatrixInit = "normal"
    """normal: with std `vp_init_std`, or 1/√n_embd if `value_skip_gain` is given."""
    train_value_gains: bool = False
    proj_skip_gain: Number | None = None
    proj_gain: Number = 1.0
    last_proj_gain: Number | None = None
    """β_P in the last block. None: the same as `proj_gain`."""
    proj_init: MatrixInit = "normal"
    train_proj_gains: bool = False
    tie_value_proj_init: Literal["all_blocks", "last_block"] | None = None
    """all_blocks: each initial projection is the transpose of its block's value matrix. last_block: the last projection
    is the transpose of the product of all other value and projection matrices. Orthogonal matrices then cancel."""

    initializer_range: Number = 0.02
    residual_init_std: Number | None = None
    """The std of normal projections and of the MLP's output matrix. None: GPT-2's `initializer_range` / √(2 · n_layer).
    """
    vp_init_std: Number | None = None
    """The std of normal value and projection matrices that are ordinary ones. None: `initializer_range` for values,
    `residual_init_std` for projections."""
    query_init_std: Number | None = None
    """The std of query weights. At 0, attention is initially uniform. None: `initializer_range`, as for key weights."""
    key_init_std: Number | None = None

    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        least = dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"), 1)
        stds = ("initializer_range", "residual_init_std", "vp_init_std", "query_init_std", "key_init_std")
        for name, bound in (least | dict.fromkeys(stds, 0)).items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise BlockError(f"{name} is {value}; it must be at least {bound}.")
        for name in BlocksConfig.__annotations__:
            if isinstance(value := getattr(self, name), float) and not math.isfinite(value):
                raise BlockError(f"{name} is {value}; it must be finite.")
        for name in ("norm_epsilon", "softcap"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise BlockError(f"{name} is {value}; it must be above 0.")
        if self.n_embd % self.n_head:
            raise BlockError(f"n_embd is {self.n_embd}; it must be a multiple of n_head, {self.n_head}.")
        if self.parallel and self.attn_skip_gain != 0:
            raise BlockError("A parallel block has only one skip, with mlp_skip_gain. Set attn_skip_gain to 0.")
        if self.activation_function not in ACT2FN:
            raise BlockError(
                f"activation_function is {self.activation_function}; it must be one of {', '.join(ACT2FN)}."
            )
        if self.tie_value_proj_init and "identity" in (self.value_init, self.proj_init):
            raise BlockError("tie_value_proj_init ties random matrices, but value_init or proj_init is identity.")


_SKIPLESS = {
    "attn_skip_gain": 0.0,
    "attn_identity_gain": 1.0,
    "attn_centre_gain": 1.0,
    "value_skip_gain": 1.0,
    "value_gain": 0.0,
    "first_value_gain": 1.0,
    "value_init": "identity",
    "proj_skip_gain": 1.0,
    "proj_gain": 0.0,
    "proj_init": "identity",
    "train_attn_gains": True,
    "train_mlp_gains": True,
    "train_attn_matrix_gains": True,
    "train_value_gains": True,
    "train_proj_gains": True,
    "query_init_std": 0.0,
    "residual_init_std": 0.02,
}
BLOCKS: dict[str, dict[str, Any]] = {
    "pre-ln": {},
    "post-ln": {"norm_position": "post"},
    "parallel": {"parallel": True, "attn_skip_gain": 0.0},
    "v-skipinit": _SKIPLESS
    | {"value_skip_gain": None, "value_init": "orthogonal", "proj_skip_gain": None, "proj_init": "orthogonal"},
    "skipless": _SKIPLESS,
    "skipless-parallel": _SKIPLESS | {"parallel": True, "mlp_skip_gain": 0.0},
    "skipless-nonorm": _SKIPLESS | {"norm": "none"},
    "skipless-parallel-nonorm": _SKIPLESS | {"parallel": True, "mlp_skip_gain": 0.0, "norm": "none"},
    "op": {"norm": "none", "qk_norm": "rmsnorm", "residual_init_std": 0.02},
}
"""The knobs in which each block differs from GPT-2's, as in the published code and its scripts: V-SkipInit with shaped
attention (set `attn_softmax_gain` and `attn_centre_gain` to 0 to omit it), SAS and SAS-P of [S24] with and without
norms, and OP of [O24]."""


def block_config(name: str, **knobs: Any) -> BlocksConfig:
    """Return the config of the block `name` of `BLOCKS`, with the given shape and knobs.

    Small initial gains are O(1/√n_layer). In blocks without a skip around attention, the gain of the MLP is 0.1 at the
    18 layers of [S24]. In OP, the gains of both branches are 0.2 at the published default of 12 layers.

    Raises:
        BlockError: a block or knob does not exist, a value has the wrong type, or knobs contradict each other or have
            no effect.
    """
    if name not in BLOCKS:
        raise BlockError(f"There is no block {name}. The blocks are {', '.join(BLOCKS)}.")
    if unknown := sorted(set(knobs) - set(BlocksConfig.__annotations__)):
        raise BlockError(f"Blocks do not have the knobs {', '.join(unknown)}.")
    try:
        config = BlocksConfig(**BLOCKS[name] | knobs)
    except StrictDataclassFieldValidationError as error:
        raise BlockError(str(error)) from error
    if idle := [
        f"{knob} is {knobs[knob]}, but {why}" for knob, why in _without_effect(config).items() if knob in knobs
    ]:
        raise BlockError(f"These knobs have no effect: {'; '.join(idle)}.")
    small = {}
    if name == "op":
        small = dict.fromkeys(("attn_gain", "mlp_gain"), 0.2 * math.sqrt(12 / config.n_layer))
    elif BLOCKS[name].get("attn_identity_gain"):
        small = {"mlp_gain": 0.1 * math.sqrt(18 / config.n_layer)}
    for gain in small.keys() - knobs.keys():
        setattr(config, gain, small[gain])
    return config


def _without_effect(config: BlocksConfig) -> dict[str, str]:
    """Return the knobs that have no effect in a model with this config, each with the reason."""
    idle: dict[str, str] = {}
    if config.value_skip_gain is None:
        idle |= dict.fromkeys(("value_gain", "first_value_gain", "train_value_gains"), "value_skip_gain is None")
    if config.proj_skip_gain is None:
        idle |= dict.fromkeys(("proj_gain", "last_proj_gain", "train_proj_gains"), "proj_skip_gain is None")
    if config.activation_function != "leaky_relu":
        idle["negative_slope"] = f"activation_function is {config.activation_function}"
    ordinary = [("value_skip_gain", "value_init"), ("proj_skip_gain", "proj_init")]
    if not any(getattr(config, gain) is None and getattr(config, init) == "normal" for gain, init in ordinary):
        idle["vp_init_std"] = "no value or projection matrix is an ordinary one with normal initialisation"
    return idle
