"""Measure what a squeeze does to the lengths of residual vectors.

`python notebooks/sweeps/squeeze.py FOLDER` takes the folder of the sweep `squeeze`, with its runs, and writes
squeeze.csv beside this script. The table has one row per run and model:

recipe, seed, run    of the sweep
squeezed             whether the recipe has a squeeze
model                original or ln_free
position_0           the norm of residual vectors at position 0 divided by that of ordinary tokens, at the point of the
                     stream where this ratio is largest; means over 4,096 tokens of books-report
over_constant        the 99.9th percentile of live std, or RMS, over constant at the site where it is largest; the mean
                     over the last tenth of the steps in the log. Empty for the original
largest              the same for the largest ratio instead of the percentile
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from analysis import load_trio, residual_norms
from analysis.texts import read_text
from finetune.checkpoints import read_log

TABLE = Path(__file__).with_suffix(".csv")


def over_constants(run: Path) -> dict[str, float]:
    """Return the largest ratios of live std to constant in the last tenth of a run's log."""
    lines = [line for line in read_log(run / "log.jsonl") if line.get("std")]
    lines = lines[-max(1, len(lines) // 10) :]
    ratios = pd.DataFrame(
        [[max(site["over_constant"][i] for site in line["std"].values()) for i in range(2)] for line in lines]
    )
    return dict(zip(("over_constant", "largest"), ratios.mean(), strict=True))


def position_0(models: dict[str, Any]) -> pd.Series:
    """Return by model how many times as long as others residual vectors at position 0 are, where they are longest."""
    tokens = read_text("books-report", models["original"], 4096).tokens
    norms = residual_norms.measure(models, tokens)
    by_class = norms.pivot_table("norm", ["model", "point"], "token_class", sort=False)
    return (by_class["position 0"] / by_class["ordinary"]).groupby("model", sort=False).max()


if __name__ == "__main__":
    sweep = Path(sys.argv[1])
    rows = []
    for _, run in tqdm(list(pd.read_csv(sweep / "results.csv").iterrows()), unit="run"):
        directory = sweep / "runs" / run["run"]
        ratios = position_0(load_trio(run["recipe"], None, directory / "ln_free"))
        for model, ratio in ratios.items():
            row = run[["recipe", "seed", "run"]].to_dict()
            row |= {"squeezed": run["override.spread_weight"] > 0, "model": model, "position_0": ratio}
            rows.append(row | (over_constants(directory) if model == "ln_free" else {}))
    pd.DataFrame(rows).round(4).to_csv(TABLE, index=False)
