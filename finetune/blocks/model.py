"""The model: gains, norms and matrices; attention and MLPs; blocks; and the whole model.

`nn.Identity` modules with the names of TransformerLens's hooks (`blocks.0.hook_resid_pre`, …) are at the places of
GPT-2's hooks. If a forward hook on one of them returns a tensor, it replaces the activation. With the "eager" attention
implementation, attention probabilities are computed, and activations pass through the hooks of attention and norms.
Otherwise attention is `scaled_dot_product_attention`, which builds no tokens × tokens matrix, except with a soft-cap,
with padding on the left, or for several tokens after cached ones.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from finetune.blocks.config import BlockError, BlocksConfig, MatrixInit, NormKind


class Gain(nn.Module):
    """Multiplies by a gain: a single one, or one per head."""

    value: Float[Tensor, " gain"]

    def __init__(self, initial: float, train: bool, heads: int = 1) -> None:
        super().__init__()
        self.initial, self.shape = initial, (1,) if heads == 1 else (heads, 1, 1)
        value = torch.empty(heads)
        if train:
            self.value = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the gain. If there is one per head, x has the shape [batch, head, pos, any], or broadcasts."""
        return x * self.value.view(self.shape)


def _gain(initial: float, train: bool) -> nn.Module:
    return Gain(initial, train) if train or initial != 1 else nn.Identity()


class Norm(nn.Module):
    """LN or RMSNorm. For RMSNorm, the published code adds ε to the RMS, this class to its square."""

    def __init__(self, kind: NormKind, width: int, config: BlocksConfig) -> None:
        super().__init__()
        self.kind, self.config = kind, config
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if kind == "ln" else None
        self.hook_scale, self.hook_normalized = nn.Identity(), nn.Identity()

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise x over its width, and scale and shift it. Statistics are in at least float32."""
        eps = self.config.norm_epsilon
        if self.config._attn_implementation != "eager":
            if self.kind == "ln":
                return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps)
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "ln":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide / self.hook_scale((wide.square().mean(-1, keepdim=True) + eps).sqrt()) * self.weight
        return self.hook_normalized((wide if self.bias is None else wide + self.bias).to(x.dtype))


def _norm(kind: NormKind, width: int, config: BlocksConfig) -> nn.Module:
    return nn.Identity() if kind == "none" else Norm(kind, width, config)


def _residual_std(config: BlocksConfig) -> float:
    std = config.residual_init_std
    return config.initializer_range / math.sqrt(2 * config.n_layer) if std is None else std


def _init_matrix(matrix: Tensor, kind: MatrixInit, std: float) -> None:
    if kind == "identity":
        initialization.eye_(matrix)
    elif kind == "orthogonal":
        initialization.orthogonal_(matrix)
    else:
        initialization.normal_(matrix, 0, std)


class Linear(nn.Linear):
    """An ordinary linear map that defines the initialisation of its own weight. Its bias is initially 0.

    It is defined here because transformers does not initialise custom modules without own parameters, such as a module
    that only contains linear maps.
    """

    def __init__(self, d_in: int, d_out: int, bias: bool, *stds: float, kind: MatrixInit = "normal") -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.stds, self.kind = stds, kind
        """The output is divided into as many equal parts as there are stds, and each part is initialised with its std.
        """


class GainedMatrix(nn.Module):
    """The map α · W₀ + β · ΔW. W₀ is constant, and random or the identity. ΔW is initially 0, and omitted if β is 0."""

    def __init__(self, width: int, kind: MatrixInit, skip_gain: float, gain: float, train: bool) -> None:
        super().__init__()
        self.kind = kind
        self.skip_gain = _gain(skip_gain, train)
        if kind != "identity":
            self.initial: Tensor
            self.register_buffer("initial", torch.empty(width, width))
        self.learns = gain != 0
        if self.learns:
            self.gain: Any = _gain(gain, train)
            self.weight = nn.Parameter(torch.empty(width, width))

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """Map x."""
        y = self.skip_gain(x if self.kind == "identity" else F.linear(x, self.initial))
        return y + self.gain(F.linear(x, self.weight)) if self.learns else y


def _matrix(
    config: BlocksConfig, skip_gain: float | None, gain: float, kind: MatrixInit, train: bool, std: float
) -> nn.Module:
    """Return a value or projection map: an ordinary matrix, one with gains, or none."""
    if skip_gain is None:
        return Linear(config.n_embd, config.n_embd, config.vp_bias, std, kind=kind)
    if kind == "identity" and skip_gain == 1 and gain == 0:
        return nn.Identity()
    return GainedMatrix(config.n_embd, kind, skip_gain, gain, train)


def _random_part(matrix: nn.Module) -> Any:
    """Return the randomly initialised tensor of a value or projection map."""
    return matrix.weight if isinstance(matrix, Linear) else matrix.initial


class Attention(nn.Module):
    """Causal attention whose matrix is α · I + β · A − γ · C."""

    def __init__(self, config: BlocksConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        d_head = config.n_embd // config.n_head
        std, of_vp = config.initializer_range, config.vp_init_std
        qk_stds = (std if own is None else own for own in (config.query_init_std, config.key_init_std))
        v_std, o_std = (usual if of_vp is None else of_vp for usual in (std, _residual_std(config)))
        self.qk = Linear(config.n_embd, 2 * config.n_embd, config.qk_bias, *qk_stds)
        is_first, is_last = layer == 0, layer == config.n_layer - 1
        gain = config.first_value_gain if is_first and config.first_value_gain is not None else config.value_gain
        self.v = _matrix(config, config.value_skip_gain, gain, config.value_init, config.train_value_gains, v_std)
        gain = config.last_proj_gain if is_last and config.last_proj_gain is not None else config.proj_gain
        self.o = _matrix(config, config.proj_skip_gain, gain, config.proj_init, config.train_proj_gains, o_std)
        self.q_norm, self.k_norm = (_norm(config.qk_norm, d_head, config) for _ in "qk")
        train, heads = config.train_attn_matrix_gains, config.n_head
        shaped = config.attn_identity_gain or config.attn_centre_gain or config.attn_softmax_gain != 1 or train
        self.beta = Gain(config.attn_softmax_gain, train, heads) if shaped else nn.Identity()
        self.alpha = Gain(config.attn_identity_gain, train, heads) if config.attn_identity_gain else None
        self.gamma = Gain(config.attn_centre_gain, train, heads) if config.attn_centre_gain else None
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = (nn.Identity() for _ in "qkvz")
        self.hook_attn_scores, self.hook_pattern, self.hook_mixing = (nn.Identity() for _ in range(3))

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        past: DynamicCache | None = None,
        tokens: Bool[Tensor, "batch key"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Attend from x to x and, if there is a cache, to its contents. Keys and values of x are added to `past`.

        `tokens` is False at padding. If it is given, the attention matrix is built.
        """
        # [batch, pos, head, d_head], as in TransformerLens's hooks
        q, k, v = (part.unflatten(-1, (self.config.n_head, -1)) for part in (*self.qk(x).chunk(2, -1), self.v(x)))
        q, k, v = self.hook_q(self.q_norm(q)), self.hook_k(self.k_norm(k)), self.hook_v(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = past.update(k, v, self.layer)
        if self.config._attn_implementation == "eager" or self.config.softcap is not None or tokens is not None:
            z = self._attention_matrix(q, k, tokens) @ v
        else:
            z = self._attend(q, k, v)
        return self.o(self.hook_z(z.transpose(1, 2)).flatten(2))

    def _mask(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the causal mask, [query, key]: whether a query sees a key. The last query sees all keys."""
        queries, keys = q.shape[-2], k.shape[-2]
        return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)

    def _attention_matrix(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch head key d_head"],
        tokens: Bool[Tensor, "batch key"] | None,
    ) -> Float[Tensor, "batch head query key"]:
        """Return the attention matrix."""
        mask = self._mask(q, k)
        eye = mask.triu(k.shape[-2] - q.shape[-2])
        if tokens is not None:
            mask = mask & tokens[:, None, None] | eye  # padding sees itself, so that no row is empty
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.config.softcap is not None:
            scores = self.config.softcap * torch.tanh(scores / self.config.softcap)
        scores = self.hook_attn_scores(scores.masked_fill(~mask, -torch.inf))
        pattern = self.hook_pattern(scores.softmax(-1))
        mixing = self.beta(pattern)
        if self.alpha is not None:
            mixing = mixing + self.alpha(eye.to(q.dtype))
        if self.gamma is not None:
            mixing = mixing - self.gamma(mask.to(q.dtype) / mask.sum(-1, keepdim=True))
        return self.hook_mixing(mixing)

    def _attend(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch head key d_head"],
        v: Float[Tensor, "batch head key d_head"],
    ) -> Float[Tensor, "batch head query d_head"]:
        """Return the attention matrix times the values without building it: I · v = v, and C · v is a running mean."""
        queries, keys = q.shape[-2], k.shape[-2]
        mask = self._mask(q, k) if 1 < queries < keys else None
        z = self.beta(F.scaled_dot_product_attention(q, k, v, mask, is_causal=queries == keys))
        if self.alpha is not None:
            z = z + self.alpha(v[..., -queries:, :])
        if self.gamma is not None:
            total = v.cumsum(-2, dtype=torch.promote_types(v.dtype, torch.float32))[..., -queries:, :]
            count = torch.arange(keys - queries + 1, keys + 1, device=v.device)[:, None]
            z = z - self.gamma((total / count).to(v.dtype))
        return z


class MLP(nn.Module):
    """Two matrices around an activation function."""

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.fc = Linear(config.n_embd, width, config.mlp_bias, config.initializer_range)
        leaky = config.activation_function == "leaky_relu"
        self.act = nn.LeakyReLU(config.negative_slope) if leaky else ACT2FN[config.activation_function]
        self.proj = Linear(width, config.n_embd, config.mlp_bias, _residual_std(config))
        self.hook_pre, self.hook_post = nn.Identity(), nn.Identity()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the output of the MLP for x."""
        return self.proj(self.hook_post(self.act(self.hook_pre(self.fc(x)))))


class Block(GradientCheckpointingLayer):
    """Attention and an MLP, in sequence or in parallel.

    `hook_attn_out` and `hook_mlp_out` receive what is added to the stream, including gains. In a parallel block,
    `hook_resid_mid` receives the sum without the MLP. With post-norm, the `hook_resid_…` receive the sums before the
    norms.
    """

    def __init__(self, config: BlocksConfig, layer: int) -> None:
        super().__init__()
        self.parallel, self.post = config.parallel, config.norm_position == "post"
        first_norm = config.first_norm or ("ln" if config.norm == "none" else config.norm)
        self.ln1 = _norm(first_norm if layer == 0 else config.norm, config.n_embd, config)
        self.ln2 = _norm("none" if self.parallel else config.norm, config.n_embd, config)
        self.attn, self.mlp = Attention(config, layer), MLP(config)
        self.attn_gain = _gain(config.attn_gain, config.train_attn_gains)
        self.mlp_gain = _gain(config.mlp_gain, config.train_mlp_gains)
        attn_skip, mlp_skip = config.attn_skip_gain, config.mlp_skip_gain
        self.attn_skip_gain = _gain(attn_skip, config.train_attn_gains) if attn_skip else None
        self.mlp_skip_gain = _gain(mlp_skip, config.train_mlp_gains) if mlp_skip else None
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = (nn.Identity() for _ in range(3))
        self.hook_attn_out, self.hook_mlp_out = nn.Identity(), nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        past_key_values: DynamicCache | None = None,
        tokens: Bool[Tensor, "batch key"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return the block's output. Keys and values are added to `past_key_values`."""
        x = self.hook_resid_pre(x)
        read = self.ln1(x)
        skip = self.mlp_skip_gain if self.parallel else self.attn_skip_gain
        mid = self.hook_attn_out(self.attn_gain(self.attn(read, past_key_values, tokens)))
        if skip is not None:
            mid = skip(read if self.post else x) + mid
        mid = self.hook_resid_mid(mid)
        if not self.parallel:
            read = self.ln2(mid)
        out = self.hook_mlp_out(self.mlp_gain(self.mlp(read)))
        if self.parallel:
            out = mid + out
        elif self.mlp_skip_gain is not None:
            out = self.mlp_skip_gain(read if self.post else mid) + out
        return self.hook_resid_post(out)


class BlocksForCausalLM(PreTrainedModel, GenerationMixin):
    """Token and position embeddings, blocks, a final norm and an unembedding tied to the token embedding by default."""

    config_class = BlocksConfig
    config: BlocksConfig
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _tied_weights_keys = {"unembed.weight": "embed.weight"}  # noqa: RUF012
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True

    def __init__(self, config: BlocksConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_embed = nn.Embedding(config.n_positions, config.n_embd)
        self.hook_embed, self.hook_pos_embed = nn.Identity(), nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_final = _norm(config.final_norm, config.n_embd, config)
        self.unembed = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()
        if config.tie_value_proj_init is not None:
            self._tie_value_proj_init()  # overwritten if the model is being loaded

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.embed = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the unembedding."""
        return self.unembed

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the unembedding."""
        self.unembed = new_embeddings

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # otherwise transformers looks for its own dispatcher in the source

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Initialise `module`, whose children have already been initialised. Loaded weights are not changed."""
        config = self.config
        super()._init_weights(module)
        if isinstance(module, Gain):
            initialization.constant_(module.value, module.initial)
        elif isinstance(module, Norm):
            initialization.ones_(module.weight)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, GainedMatrix):
            if module.learns:
                initialization.zeros_(module.weight)
            if module.kind != "identity":
                _init_matrix(module.initial, module.kind, 1 / math.sqrt(config.n_embd))
        elif isinstance(module, Linear):
            fresh = torch.empty_like(module.weight)
            for rows, std in zip(fresh.chunk(len(module.stds)), module.stds, strict=True):
                _init_matrix(rows, module.kind, std)
            initialization.copy_(module.weight, fresh)

    @torch.no_grad()
    def _tie_value_proj_init(self) -> None:
        product = torch.eye(self.config.n_embd)
        block: Any
        for i, block in enumerate(self.blocks):
            value, proj = _random_part(block.attn.v), _random_part(block.attn.o)
            product = value.to(product) @ product
            if self.config.tie_value_proj_init == "all_blocks":
                proj.copy_(value.T)
            elif i == self.config.n_layer - 1:
                proj.copy_(product.T)
            product = proj.to(product) @ product

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#batch pos"] | None = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Any = None,
    ) -> CausalLMOutputWithPast:
        """Return logits, [batch, pos, vocab], and, given `labels`, the mean next-token cross-entropy (nats/token).

        Padding, marked with 0 in `attention_mask`, [batch, key], does not affect other tokens. `position_ids` only
        change the position embeddings: sequences packed into one row attend to each other. `hidden_states` are those of
        GPT-2: the input of every block, and the output of the final norm.

        Raises:
            BlockError: the mask or the cache is invalid, or there are more tokens than positions.
        """
        if past_key_values is not None and not isinstance(past_key_values, DynamicCache):
            raise BlockError(f"The cache is a {type(past_key_values).__name__}. These models require a DynamicCache.")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        end = seen + input_ids.shape[1]
        if end > self.config.n_positions:
            raise BlockError(f"The model has only {self.config.n_positions} positions, but there are {end} tokens.")
        tokens = None
        if attention_mask is not None:
            if attention_mask.shape != (len(input_ids), end):
                raise BlockError(
                    f"The attention_mask has the shape {list(attention_mask.shape)} instead of {[len(input_ids), end]}."
                )
            # Padding on the right is never seen, so it needs no mask. On a GPU this test waits for the device.
            if (attention_mask.int().diff(dim=-1) > 0).any():
                tokens = attention_mask.bool()
                if position_ids is None:
                    position_ids = (tokens.cumsum(-1) - 1).clamp(min=0)[:, seen:]
        if position_ids is None:
            position_ids = torch.arange(seen, end, device=input_ids.device)[None]
        x = self.hook_embed(self.embed(input_ids))
        x = x + self.hook_pos_embed(self.pos_embed(position_ids).expand_as(x))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = []
        for block in self.blocks:
            if output_hidden_states:
                hidden_states.append(x)
            # Passed by keyword, because gradient checkpointing identifies the cache, which it removes, by this name.
            x = block(x, past_key_values=past_key_values, tokens=tokens)
        x = self.ln_final(x)
        logits = self.unembed(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )


AutoConfig.register("noln-blocks", BlocksConfig, exist_ok=True)
AutoModelForCausalLM.register(BlocksConfig, BlocksForCausalLM, exist_ok=True)
