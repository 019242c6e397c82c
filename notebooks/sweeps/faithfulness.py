"""Measure for the runs of sweeps whether LN-free models compute like the original, or only answer like it.

`python notebooks/sweeps/faithfulness.py FOLDER…` takes the folders of sweeps, with their runs, and writes
faithfulness.csv beside this script. The table has one row for each of the longest runs, with the measures of
`analysis.faithfulness` on 8,192 tokens of books-report.
"""

import sys
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from analysis import faithfulness, load_bridge
from analysis.texts import read_text

HERE = Path(__file__).parent


def measure(sweep: Path) -> pd.DataFrame:
    """Return one row per run of `sweep`: means over tokens (jsd in nats), heads, neurons, and streams after blocks."""
    rows = []
    results = pd.read_csv(sweep / "results.csv")
    results = results[results["tokens"] == results["tokens"].max()]
    for _, run in tqdm(list(results.iterrows()), desc=sweep.name, unit="run"):
        models = {"original": load_bridge("micro"), "ln_free": load_bridge(sweep / "runs" / run["run"] / "ln_free")}
        tokens = read_text("books-report", models["original"]).tokens
        row = run[["recipe", "seed", "tokens"]].to_dict()
        for compare, columns in {
            faithfulness.measure: ["jsd", "agreement"],
            faithfulness.measure_layers: ["cosine", "cka"],
            faithfulness.measure_heads: ["attention_distance", "dla_correlation"],
            faithfulness.measure_neurons: ["correlation"],
        }.items():
            frame = compare(models, tokens)
            frame = frame[frame["model"] == "ln_free"]
            if "positions" in frame:
                frame = frame[frame["positions"] == "after 0"]
            row |= {column: frame[column].mean() for column in columns}
        rows.append({"run": run["run"]} | row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = pd.concat([measure(Path(folder)) for folder in sys.argv[1:]], ignore_index=True)
    table.to_csv(HERE / "faithfulness.csv", index=False)
