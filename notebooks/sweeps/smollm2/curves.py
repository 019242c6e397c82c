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

It also writes results.csv. It has one row per run, with the columns

run, seed             the name of the run directory, and its seed
command               the command that made it. A run that goes on from another one begins with a copy of it, as the
                      comment in its recipe says
tokens, seconds       the tokens it trained on, and how long that took
frozen                the number of sites, of 91, that have begun to freeze
kl, kl_max            as above, over the last 50 steps
exported              whether the run left an LN-free model; the others diverged or were stopped
loss_TEXT, jsd_TEXT   of that model on a text: its loss minus the original's, and JSD to the original, in nats/token
loss_max_TEXT         its largest loss of a token minus the original's largest, in nats
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import pandas as pd

from finetune.checkpoints import read_log
from finetune.recipe import load

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


def command(name: str) -> str:
    """Return the command that made the attempt `name`."""
    recipe = Path(__file__).with_name(f"{name}.yaml")
    if "finetune resume" in recipe.read_text():
        return f"resume runs/{name} --anyway"
    return f"run notebooks/sweeps/smollm2/{recipe.name} --out runs/{name}"


def result(run: Path) -> dict[str, Any]:
    """Return the row of a run in results.csv."""
    log = [line for line in read_log(run / "log.jsonl") if line["model"] == "ln_free"]
    last = [line["kl"] for line in log[-50:]]
    row: dict[str, Any] = {
        "run": run.name,
        "seed": load(run / "recipe.yaml").seed,
        "command": f"python -m finetune {command(run.name)}",
        "tokens": log[-1]["tokens"],
        "seconds": log[-1]["seconds"],
        "frozen": len({name for line in log for name in line["frozen"] if not name.startswith("merge")}),
        "kl": mean(last),
        "kl_max": max(last),
        "exported": (run / "results.csv").exists(),
    }
    if row["exported"]:
        measured = pd.read_csv(run / "results.csv").set_index(["text", "model"])
        for text in measured.index.unique("text"):
            ours, theirs = measured.loc[text, "ln_free"], measured.loc[text, "original"]
            row[f"loss_{text}"], row[f"jsd_{text}"] = ours["loss"] - theirs["loss"], ours["jsd"]
            row[f"loss_max_{text}"] = ours["loss_max"] - theirs["loss_max"]
    return row


if __name__ == "__main__":
    runs = [Path(run) for run in sys.argv[1:]]
    curves = pd.DataFrame(row for run in runs for row in rows(run))
    for name, table in {"curves": curves, "results": pd.DataFrame(map(result, runs))}.items():
        table.round(5).to_csv(Path(__file__).with_name(f"{name}.csv"), index=False)
