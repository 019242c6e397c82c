"""Which of SmolLM2's norms are constants already, and at what cost: a checkpoint with other sets of sites frozen.

`python notebooks/sweeps/smollm2/subsets.py RUN CHECKPOINT…` adds to subsets.csv beside it, for each checkpoint of the
run, one row per set of sites and text. Sites of the set divide by constants: their own, if they had begun to freeze,
otherwise the running mean of their RMS. All others are live. The columns are

run, step            the run directory's name and the checkpoint's step
constant             the set, a key of SETS
guard                κ of the outlier guard; empty: no guard, as in an exported model
text                 what the model is measured on: the held-out part of each kind
loss                 cross-entropy above the original's, nats/token, a mean over tokens; NaN if any is not finite
jsd                  Jensen-Shannon divergence to the original, nats/token, a mean over tokens
loss_max             the largest loss of a token less the original's largest, nats
not_finite           the share of tokens at which the loss is not finite
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune import checkpoint, evaluate, massive_writes
from finetune.recipe.files import load
from finetune.sites import Sites
from finetune.text import Text, load_blocks

TABLE = Path(__file__).with_name("subsets.csv")
BLOCKS = 6
"""Of each text."""
GUARDS = (None, 1.2, 2.0)
"""What is tried where all sites divide by constants."""


def kind(site: str) -> str:
    """Return mlp, qk, v or final."""
    return site.rpartition(".")[2]


SETS: dict[str, Callable[[str], bool]] = {
    "none": lambda site: False,
    "MLP": lambda site: kind(site) == "mlp",
    "QK": lambda site: kind(site) == "qk",
    "V": lambda site: kind(site) == "v",
    "MLP, QK": lambda site: kind(site) in ("mlp", "qk"),
    "all but final": lambda site: site != "final",
    "all": lambda site: True,
}


def load_sites(run: Path, path: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, Sites]:
    """Return the tokenizer of a run, its original, and the sites of the model in the checkpoint `path`."""
    recipe = load(run / "recipe.yaml")
    tokenizer = checkpoint.load_tokenizer(recipe.model)
    original, model = (checkpoint.load(recipe.model).float() for _ in range(2))
    if recipe.longest_embedding is not None:
        massive_writes.untie(model)
    sites = Sites(model, tokenizer.eos_token_id, recipe.schedule.classes, recipe.std_mean)
    model.load_state_dict(load_file(path / "model.safetensors"), strict=False)  # tied weights are there once
    return tokenizer, original, sites


def rows(run: Path, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a checkpoint."""
    recipe = load(run / "recipe.yaml")
    tokenizer, original, sites = load_sites(run, path)
    model = sites.model
    for site in sites:
        if not sites[site].alpha:
            sites[site].freeze()
    assert recipe.context is not None
    for source in recipe.also:
        blocks = load_blocks(Text(source), tokenizer, recipe.context, model.config.vocab_size, most=BLOCKS)
        for name, is_constant in SETS.items():
            for site in sites:
                sites[site].alpha.fill_(float(is_constant(site)))
            for guard in GUARDS if name == "all" else GUARDS[:1]:
                sites.guard(0.0 if guard is None else 1 / guard)
                found = evaluate.measure_tokens({"original": original, "model": model}, blocks)
                ours, theirs = found["model"], found["original"]
                yield {
                    "run": run.name,
                    "step": int(path.name.rpartition("-")[2]),
                    "constant": name,
                    "guard": guard,
                    "text": Path(source).stem,
                    "loss": ours["loss"].mean() - theirs["loss"].mean(),
                    "jsd": ours["jsd"].mean(),
                    "loss_max": ours["loss"].max() - theirs["loss"].max(),
                    "not_finite": (~np.isfinite(ours["loss"])).mean(),
                }


if __name__ == "__main__":
    directory, *checkpoints = map(Path, sys.argv[1:])
    found = pd.DataFrame(row for path in checkpoints for row in rows(directory, path)).round(5)
    if TABLE.exists():
        found = pd.concat([pd.read_csv(TABLE), found])
    found = found.drop_duplicates(["run", "step", "constant", "guard", "text"], keep="last")
    found.to_csv(TABLE, index=False)
