"""Compare models whose LN was removed with models that never had LN.

`python notebooks/sweeps/removed_vs_never.py RUN…` takes run directories of `finetune pretrain BLOCK`, and of `finetune
run` on the resulting models. It writes removed_vs_never.csv beside this script, with one row per model, in order.
Losses are measured on 240 blocks of each text, and outlier features and the attribution error on 8,192 tokens of
books-report.
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from analysis import load_bridge, load_hooked_blocks, logit_attribution, loss, outlier_features
from analysis.texts import read_text
from finetune.blocks import BlocksConfig
from finetune.checkpoint import load_config
from finetune.recipe import PretrainRecipe, load_pretraining
from finetune.run_directory import recipe_of

HERE = Path(__file__).parent


def measure(model: Any, is_sum: bool = True) -> dict[str, float]:
    """Return a model's losses (nats/token), outlier features averaged over the stream, and the NMAE of its heads (%).

    If the stream is not the sum of what components write, as with post-norm, pass `is_sum=False`; the NMAE is then NaN.
    """
    row = {}
    for text in ("books-validation", "books-report"):
        sample = read_text(text, model, 240 * model.cfg.n_ctx)
        measured = loss.measure({"model": model}, sample.tokens, sample.documents, reference="model").iloc[0]
        row |= {f"loss_{text}": measured["loss"], f"loss_error_{text}": measured["loss_error"]}
    tokens = read_text("books-report", model).tokens
    features = outlier_features.measure({"model": model}, tokens)
    features = features[features["token_class"] == "all"]
    for column in ("kurtosis", "max_median_ratio"):
        row |= {column: features[column].mean(), f"{column}_max": features[column].max()}
    row["nmae"] = logit_attribution.measure({"model": model}, tokens)["nmae"][0] if is_sum else float("nan")
    return row


def training(run: Path) -> dict[str, Any]:
    """Describe a run of `finetune pretrain`: its block, and what differs from the recipe of the block."""
    recipe: Any = recipe_of(run)
    shipped = load_pretraining(recipe.block)
    own = (recipe.knobs | {"lr": recipe.lr}).items() - (shipped.knobs | {"lr": shipped.lr}).items()
    row = {"model": ", ".join([recipe.block, *(f"{knob} {value}" for knob, value in sorted(own))])}
    row |= {"seed": recipe.seed, "lr": recipe.lr}
    return row | pd.read_csv(run / "results.csv")[["parameters", "trained_tokens"]].iloc[0].to_dict()


def read(run: Path) -> list[dict[str, Any]]:
    """Return one row for each model that a run made."""
    recipe = recipe_of(run)
    if isinstance(recipe, PretrainRecipe):
        config = load_config(run / "model")
        if isinstance(config, BlocksConfig):
            return [training(run) | measure(load_hooked_blocks(run / "model"), config.norm_position != "post")]
        return [training(run) | measure(load_bridge(run / "model"))]
    before = training(Path(recipe.model).parent)
    trained = pd.read_csv(run / "results.csv").set_index("model")["trained_tokens"]
    rows = []
    for name, what in {"control": "LN kept", "ln_free": "LN removed"}.items():
        row = before | {"model": f"{before['model']}, {what}", "seed": recipe.seed, "lr": recipe.lr}
        row |= {"trained_tokens": before["trained_tokens"] + trained[name]}
        rows.append(row | measure(load_bridge(run / name)))
    return rows


if __name__ == "__main__":
    rows = [row for run in tqdm(sys.argv[1:], unit="run") for row in read(Path(run))]
    pd.DataFrame(rows).to_csv(HERE / "removed_vs_never.csv", index=False)
