"""Reduce the logs of runs that remove the norms of SmolLM2 to a table that is small enough to keep.

`python notebooks/sweeps/smollm2/curves.py RUN…` writes curves.csv beside this script. It has one row per run and ten
steps, with the columns

run, step, tokens     the name of the run directory, the first of the ten steps, and the tokens seen before it
kl, kl_max, cover_kl  KL of the original to the model in nats/token: mean and maximum on text, and mean on cover
distance, spread      distance of residual streams to the original's; spread of log RMS around the constants, as in
                      the objective
grad_norm             the median gradient norm before clipping
frozen                the number of sites that have begun to freeze
position_0            RMS at position 0 over that of other tokens, where it is largest, from `std` in the log
over_constant         the largest ratio of a token's RMS to its divisor, at any site
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd

from finetune.checkpoints import read_log

STEPS = 10


def rows(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run."""
    log = [line for line in read_log(run / "log.jsonl") if line["model"] == "ln_free"]
    frozen: set[str] = set()
    for start in range(0, len(log), STEPS):
        lines = log[start : start + STEPS]
        frozen |= {name for line in lines for name in line["frozen"]}
        stds = next((line["std"] for line in lines if "std" in line), {})
        position_0 = [site["live"][1] / site["live"][0] for site in stds.values() if site["live"][1]]
        cover = [line["cover_kl"] for line in lines if line["cover_kl"] is not None]
        yield {
            "run": run.name,
            "step": lines[0]["step"],
            "tokens": log[start - 1]["tokens"] if start else 0,
            "kl": mean(line["kl"] for line in lines),
            "kl_max": max(line["kl"] for line in lines),
            "cover_kl": mean(cover) if cover else None,
            "distance": mean(line["distance"] for line in lines),
            "spread": mean(line["spread"] for line in lines),
            "grad_norm": median(line["grad_norm"] for line in lines),
            "frozen": len(frozen - {"merge position_0", "merge eot"}),
            "position_0": max(position_0, default=None),
            "over_constant": max((site["over_constant"][1] for site in stds.values()), default=None),
        }


if __name__ == "__main__":
    table = pd.DataFrame(row for run in sys.argv[1:] for row in rows(Path(run)))
    table.round(5).to_csv(Path(__file__).with_name("curves.csv"), index=False)
