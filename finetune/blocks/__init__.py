"""GPT-2-shaped models whose blocks may lack skips, value and projection matrices, or norms: one module, many blocks.

[S24] He and Hofmann, "Simplifying Transformer Blocks" (arXiv 2311.01906); [O24] He et al., "Understanding and
Minimising Outlier Features" (arXiv 2405.19279). With a branch's gain β and its skip's gain α, a block is

    x̂ = α_attn · x + β_attn · MHA(Norm(x)),    out = α_mlp · x̂ + β_mlp · MLP(Norm(x̂))        [S24] eq. 1

or, in parallel, out = α_mlp · x + β_attn · MHA(Norm(x)) + β_mlp · MLP(Norm(x)). Post-norm normalises what comes in,
ahead of the skip too, and x̂ likewise; the final norm then is that of the last block. Of each head

    MHA(x)_h = (α · I + β · A(x) − γ · C) · x · V_h,    A(x) = softmax(x Q (x K)ᵀ / √d)        [S24] eq. 5

with C the uniform causal matrix, what A is where Q = 0: at α = β = γ = 1 attention starts as the identity. V, and the
projection P of all heads together, are matrices of their own, or gains of two: α_V · W₀ + β_V · ΔW, ΔW from 0
([S24] eq. 6); with the identity for W₀, α_V = 1 and β_V = 0 there is no matrix at all. There is no dropout.

`block_config` names the blocks, `BlocksForCausalLM` is the model, which the Auto classes of transformers know once this
is imported, `to_gpt2` makes a `GPT2LMHeadModel` of it where the blocks are GPT-2's, and `signals` measures what the
papers log while it trains.
"""

from finetune.blocks.config import BLOCKS, BlockError, BlocksConfig, block_config
from finetune.blocks.conversion import other_than_gpt2, to_gpt2
from finetune.blocks.model import BlocksForCausalLM, Norm
from finetune.blocks.signals import signals

__all__ = [
    "BLOCKS",
    "BlockError",
    "BlocksConfig",
    "BlocksForCausalLM",
    "Norm",
    "block_config",
    "other_than_gpt2",
    "signals",
    "to_gpt2",
]
