"""Measure whether low rank keeps more of how the original computes.

`python notebooks/sweeps/low_rank.py FOLDER…` takes the folders of sweeps, with their runs, and writes low_rank.csv
beside this script. The table has one row per run: the JSD to the original and measures of
`analysis.faithfulness` on 2,048 tokens of books-report, and the angle by which the matrices have turned away from the
original's.
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from analysis import faithfulness, load_bridge
from analysis.texts import read_text
from finetune import checkpoint, folding
from finetune.families import family_of
from finetune.run_directory import Run

HERE = Path(__file__).parent
TOKENS = 2048


def matrices(model: Any) -> dict[str, Float[Tensor, "_ _"]]:
    """Return the matrices of a model's blocks by name, with norms folded in and packed matrices split into parts."""
    found = {}
    folded = {path: weight for path, weight, _ in folding.linear_maps(model)}
    for norm in folding.norms_of(model):
        for reader in norm.readers if norm.layer is not None else ():
            part = folding.part_of_column(model, reader)
            for i, name in enumerate(reader.parts):
                found[f"{reader.path}.{name}"] = folded[reader.path][:, part == i]
    for layer, _, path in family_of(model).writers_of(model.config.num_hidden_layers):
        if layer is not None:
            found[path] = folding.matrix(model.get_submodule(path))
    return found


def turned(model: Any, original: Any) -> float:
    """Return the sine of the angle between a matrix of `model` and that of `original`, averaged over matrices.

    The angle does not depend on the scale of a matrix, such as the constant of its norm.
    """
    pairs = zip(matrices(model).values(), matrices(original).values(), strict=True)
    cosines = [torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) for ours, theirs in pairs]
    return (1 - torch.stack(cosines).square()).clamp(min=0).sqrt().mean().item()


def measure(sweep: Path) -> pd.DataFrame:
    """Return one row per run of `sweep`: means over tokens, heads and matrices."""
    results = pd.read_csv(sweep / "results.csv")
    rows = []
    for _, run in tqdm(list(results.iterrows()), desc=sweep.name, unit="run"):
        directory = sweep / "runs" / run["run"]
        original = Run(directory, pd.DataFrame()).load("original")
        row = {"sweep": sweep.name, "run": run["run"], "seed": run["seed"]}
        row["turned"] = turned(checkpoint.load(directory / "ln_free"), original)
        models = {"original": load_bridge(run["recipe"]), "ln_free": load_bridge(directory / "ln_free")}
        tokens = read_text("books-report", models["original"], TOKENS).tokens
        for compare, columns in {
            faithfulness.measure: ["jsd"],
            faithfulness.measure_heads: ["attention_distance", "dla_correlation"],
        }.items():
            frame = compare(models, tokens)
            row |= {column: frame[frame["model"] == "ln_free"][column].mean() for column in columns}
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table = pd.concat([measure(Path(folder)) for folder in sys.argv[1:]], ignore_index=True)
    table.to_csv(HERE / "low_rank.csv", index=False)
