"""GPT-2-shaped models whose blocks may lack skips, value and projection matrices, or norms.

[S24] He and Hofmann, "Simplifying Transformer Blocks" (arXiv 2311.01906); [O24] He et al., "Understanding and
Minimising Outlier Features" (arXiv 2405.19279). With a branch's gain β and its skip's gain α, a block computes

    x̂ = α_attn · x + β_attn · MHA(Norm(x)),    out = α_mlp · x̂ + β_mlp · MLP(Norm(x̂))        [S24] eq. 1

or, in parallel, out = α_mlp · x + β_attn · MHA(Norm(x)) + β_mlp · MLP(Norm(x)). With post-norm, x and x̂ are normalised
before they enter the skips as well; the final norm is then that of the last block. Each head computes

    MHA(x)_h = (α · I + β · A(x) − γ · C) · x · V_h,    A(x) = softmax(x Q (x K)ᵀ / √d)        [S24] eq. 5

where C is the uniform causal matrix, to which A is equal if Q = 0. At α = β = γ = 1, attention is initially the
identity. V, and the projection P of all heads together, are either ordinary matrices or sums of two matrices with
gains, α_V · W₀ + β_V · ΔW, with ΔW initially 0 ([S24] eq. 6). If W₀ is the identity, α_V = 1 and β_V = 0, there is no
matrix at all. There is no dropout.

`block_config` returns the config of a named block. `BlocksForCausalLM` is the model; importing this package registers
it with the Auto classes of transformers. `to_gpt2` converts it to a `GPT2LMHeadModel` if its blocks are GPT-2's.
`signals` measures during training what the papers log.
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
