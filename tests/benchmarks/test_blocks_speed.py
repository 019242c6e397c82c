"""A training step of each block's recipe, over GPT-2's block: micro's shape, 8 × 256 random tokens, fused AdamW.

The blocks take turns step by step, in one process. `python tests/benchmarks/test_blocks_speed.py --help`.
"""

import argparse
import statistics
import subprocess
import sys

import machine
import pandas as pd
import torch
from torch.nn import functional as F
from tqdm import tqdm

from finetune.blocks import BLOCKS, BlocksForCausalLM, block_config
from finetune.recipe import load_pretraining

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--csv", help="write the table there, too")
    options = parser.parse_args()
    input_ids = torch.randint(block_config("pre-ln").vocab_size, (options.batch, 256), device=DEVICE)
    configs = {name: block_config(name, **load_pretraining(name).knobs) for name in options.blocks}
    models = {name: BlocksForCausalLM(config).to(DEVICE).train() for name, config in configs.items()}
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(WARM_UP + options.steps), unit="round"):
        for name, model in models.items():
            clock = machine.Clock(DEVICE)
            clock.mark()
            logits = model(input_ids=input_ids, use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            clock.mark()
            seconds[name] += clock.seconds()
    step = pd.Series({name: statistics.median(times[WARM_UP:]) for name, times in seconds.items()})
    first = step.index[0]
    table = pd.DataFrame(
        {
            "parameters": {name: float(model.num_parameters()) for name, model in models.items()},
            "seconds a step": step,
            f"over {first}": step / step[first],
            "tokens a second": input_ids.numel() / step,
        }
    ).loc[step.index]
    if options.csv:
        table.to_csv(options.csv, index_label="block")
    print(machine.describe(DEVICE))
    print(machine.markdown(table, "block"))


def test_blocks_speed() -> None:
    subprocess.run([sys.executable, __file__, "--steps", "2"], check=True)


if __name__ == "__main__":
    main()
