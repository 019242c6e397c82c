"""How long the longest outliers of a checkpoint are without a guard, and on how many blocks the model overflows.

`python notebooks/sweeps/smollm2/outliers.py RUN CHECKPOINT…` adds to outliers.csv beside it, for each checkpoint of the
run, one row per kind of text: the held-out texts, tokens drawn uniformly from the vocabulary, and held-out text in
which a random share of tokens is replaced by such tokens. All sites divide by constants. The columns are

run, step    the run directory's name and the checkpoint's step
text         the kind of text
blocks       how many blocks of 128 tokens were run
overflow     the blocks on which a token's RMS exceeds its constant tenfold or is not finite
largest      the largest RMS of a token over its constant, at any site; infinite if the model overflows
"""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from finetune.recipe import load
from finetune.text import Text, load_blocks

TABLE = Path(__file__).with_name("outliers.csv")
BLOCKS = 24
"""Of each kind."""


@torch.no_grad()
def rows(run: Path, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a checkpoint."""
    recipe = load(run / "recipe.yaml")
    subsets = runpy.run_path(str(Path(__file__).with_name("subsets.py")))
    tokenizer, _, sites = subsets["load_sites"](run, path)
    for site in sites:
        sites[site].alpha.fill_(1.0)
        sites[site].merged.fill_(1.0)
    vocabulary = sites.model.config.vocab_size
    assert recipe.context is not None
    kinds = {}
    for source in recipe.also:
        held_out = load_blocks(Text(source), tokenizer, recipe.context, vocabulary, most=BLOCKS)
        kinds[Path(source).stem] = np.asarray(held_out.blocks, dtype=np.int64)
    rng = np.random.default_rng(0)
    text = np.concatenate(list(kinds.values()))[:: len(kinds)]
    kinds["uniform"] = rng.integers(0, vocabulary, text.shape)
    replaced = rng.random(text.shape) < rng.random((len(text), 1))
    kinds["corrupted"] = np.where(replaced, rng.integers(0, vocabulary, text.shape), text)
    for kind, blocks in kinds.items():
        largest = []
        for block in torch.from_numpy(blocks).split(1):
            sites.model.base_model(input_ids=block, use_cache=False)
            largest.append(sites.excess().nan_to_num(torch.inf).max().item())
        over = [ratio > 10 for ratio in largest]
        yield {
            "run": run.name,
            "step": int(path.name.rpartition("-")[2]),
            "text": kind,
            "blocks": len(blocks),
            "overflow": sum(over),
            "largest": np.inf if any(over) else max(largest),
        }


if __name__ == "__main__":
    directory, *checkpoints = map(Path, sys.argv[1:])
    found = pd.DataFrame(row for path in checkpoints for row in rows(directory, path)).round(3)
    if TABLE.exists():
        found = pd.concat([pd.read_csv(TABLE), found])
    found.drop_duplicates(["run", "step", "text"], keep="last").to_csv(TABLE, index=False)
