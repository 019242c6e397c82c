"""A model of `finetune.blocks` with the part of `HookedTransformer`'s interface that the analyses use.

The model already has modules with the names of TransformerLens's hooks. Here they are replaced by `HookPoint`s, and
`HookedRootModule` provides `run_with_cache`, `run_with_hooks` and `hooks`. `attn.hook_pattern` is the softmax, whose
rows sum to 1. The matrix that multiplies the values, α · I + β · pattern − γ · C, is `attn.hook_mixing`, our own name.

Which analyses support which blocks:

- Loss, residual norms, outlier features, attention (of the softmax), faithfulness, confidence neurons, patching: all
  blocks. The faithfulness of heads, however, needs logit attribution.
- Logit attribution: all except post-norm. If every skip has a gain of 1 (pre-ln, parallel, op), it is as in GPT-2.
  Without a skip around attention (v-skipinit and the skipless blocks), the final residual stream contains only the
  outputs of the last block's heads and MLP, and the former are multiplied by the gain of the MLP's skip. All earlier
  components are 0.
- Edges and graphs: no blocks, because they read through norms that are not folded.
- DLA is equal to the direct effect only if `final_norm` is none. The nine named blocks have an LN there; the NMAE shows
  how large the error is.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformers import PreTrainedTokenizerBase

from analysis.strings import TextTokens
from finetune.blocks import BlocksForCausalLM
from finetune.errors import NolnError


class HookedBlocks(TextTokens, HookedRootModule):
    """A copy of `source`, with weights under TransformerLens's names and in its shapes.

    Each block has `attn.W_Q`, `W_K`, `W_V`, `W_O`, `mlp.W_in`, `W_out`, and their `b_…`. A missing value or projection
    matrix is given as the identity. The gains of the branches are folded into `W_O`, `b_O`, `W_out` and `b_out`; the
    norms of blocks are not folded. The model has `W_E` and `W_pos`, and `W_U` and `b_U` with the final norm folded into
    them. These weights are computed once and are read-only: changing them does not change logits, and they do not
    follow the model's parameters.
    """

    def __init__(self, source: BlocksForCausalLM, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        model: Any = copy.deepcopy(source).eval()
        model.set_attn_implementation("eager")  # other implementations do not compute attention probabilities
        for name, _ in list(model.named_modules()):
            if name.rpartition(".")[2].startswith("hook_"):
                model.set_submodule(name, HookPoint())
        self.__dict__["model"] = model  # not a submodule: its children are, under TransformerLens's names
        for name, child in model.named_children():
            self.add_module(name, child)
        config = model.config
        self.cfg = TransformerBridgeConfig(
            d_model=config.n_embd,
            d_head=config.n_embd // config.n_head,
            n_heads=config.n_head,
            n_layers=config.n_layer,
            n_ctx=config.n_positions,
            d_vocab=config.vocab_size,
            d_mlp=config.n_inner or 4 * config.n_embd,
            act_fn=config.activation_function,
            normalization_type={"ln": "LNPre", "rmsnorm": "RMSPre", "none": None}[config.final_norm],
            eps=config.norm_epsilon,
            device=str(model.device),
            dtype=model.dtype,
        )
        self.tokenizer = None
        if tokenizer is not None:
            self.take_tokenizer(tokenizer)
        with torch.no_grad():
            for block in model.blocks:
                attn, mlp, heads = block.attn, block.mlp, (config.n_head, -1)
                (W_Q, W_K), (b_Q, b_K) = (part.chunk(2, -1) for part in _affine(attn.qk, config.n_embd, model))
                W_V, b_V = _affine(attn.v, config.n_embd, model)
                for name, W, b in (("Q", W_Q, b_Q), ("K", W_K, b_K), ("V", W_V, b_V)):
                    _put(attn, name, W.unflatten(-1, heads).transpose(0, 1), b.unflatten(0, heads))
                W, b = _affine(nn.Sequential(attn.o, block.attn_gain), config.n_embd, model)
                _put(attn, "O", W.unflatten(0, heads), b)
                _put(mlp, "in", *_affine(mlp.fc, config.n_embd, model))
                _put(mlp, "out", *_affine(nn.Sequential(mlp.proj, block.mlp_gain), self.cfg.d_mlp, model))
            norm, W = model.ln_final, model.unembed.weight.T
            bias = getattr(norm, "bias", None)
            b = W.new_zeros(W.shape[1]) if bias is None else bias @ W
            W = W * getattr(norm, "weight", W.new_ones(1))[:, None]
            _put(self, "U", W - W.mean(0) if config.final_norm == "ln" else W, b)  # folds the centring of LN
        self.setup()
        self.eval()

    def forward(self, tokens: Int[Tensor, "batch pos"] | str | list[str]) -> Float[Tensor, "batch unembedded vocab"]:
        """Return the logits of tokens or texts."""
        return self.model(self.to_tokens(tokens) if isinstance(tokens, str | list) else tokens, use_cache=False).logits

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:  # noqa: N802
        """The token embedding."""
        return self.model.embed.weight

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:  # noqa: N802
        """The position embedding."""
        return self.model.pos_embed.weight

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Keep `cfg` up to date when `to`, `cuda`, `half`, … is called."""
        super()._apply(*args, **kwargs)
        self.cfg.device, self.cfg.dtype = str(self.W_U.device), self.W_U.dtype
        return self

    def run_with_cache(self, *args: Any, return_cache_object: bool = False, **kwargs: Any) -> Any:
        """Run the model, and return the logits and a dict of activations by hook name.

        Raises:
            NotImplementedError: `return_cache_object` is set. The methods of an `ActivationCache` are not valid for all
                blocks.
        """
        if return_cache_object:
            raise NotImplementedError(
                "HookedBlocks has no ActivationCache. Use the dict that it returns without `return_cache_object`."
            )
        return super().run_with_cache(*args, **kwargs)

    def skip_gain(self, layer: int, attention: bool = False) -> Float[Tensor, " 1"]:
        """Return the product of the gains of the skips after a layer's MLP output, dimensionless.

        Args:
            layer: the layer; −1 for the embeddings.
            attention: whether to return the product for the attention's output instead.

        Raises:
            NolnError: with post-norm, the final residual stream is not a sum of the outputs of layers.
        """
        if self.model.config.norm_position == "post":
            raise NolnError(
                "With post-norm, the residual stream passes through norms, so it is not a sum of components to which "
                "logits could be attributed."
            )
        product = self.W_U.new_ones(1)
        for i, block in enumerate(self.blocks):
            if not block.parallel and i > layer:
                product = product * _gain(block.attn_skip_gain)
            if i > layer or (attention and i == layer and not block.parallel):
                product = product * _gain(block.mlp_skip_gain)
        return product

    reach = skip_gain  # the old name


def _gain(skip: Any) -> Float[Tensor, " 1"] | float:
    return 0.0 if skip is None else getattr(skip, "value", 1.0)


def _put(module: nn.Module, name: str, W: Tensor, b: Tensor) -> None:
    module.register_buffer(f"W_{name}", W.contiguous(), persistent=False)
    module.register_buffer(f"b_{name}", b, persistent=False)


def _affine(function: nn.Module, width: int, like: Any) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Return the weight and bias of an affine map, computed in at least float32: in bf16, W + b − b is not W."""
    wide = torch.promote_types(like.dtype, torch.float32)
    function, eye = copy.deepcopy(function).to(wide), torch.eye(width, device=like.device, dtype=wide)
    bias = function(torch.zeros_like(eye[None, :1]))[0, 0]
    return (function(eye[None])[0] - bias).to(like.dtype), bias.to(like.dtype)
