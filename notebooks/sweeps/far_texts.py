"""Measure how close LN-free models are to the original on text that is far from their training text.

`python notebooks/sweeps/far_texts.py RUN…` takes run directories of models with the tokenizer of `micro`, and writes
far_texts.csv beside this script. The table has one row per run, text and model, with the mean loss, the largest loss of
a token, and the JSD to the original, in nats/token, on at most 32 blocks of 256 tokens. No recipe was chosen on these
texts.
"""

import base64
import sys
import sysconfig
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from finetune import checkpoint, evaluate
from finetune.recipe import Recipe, Text
from finetune.run_directory import Run, recipe_of
from finetune.text import RANDOM_TOKENS, Blocks, load_blocks, token_ids

HERE = Path(__file__).parent
CONTEXT, MOST, REPEATS = 256, 32, 200


def texts() -> dict[str, str]:
    """Return texts by name. Each is far from the bundled books in its own way."""
    rng = np.random.default_rng(0)
    library = Path(sysconfig.get_path("stdlib"))
    prompts = [
        path.read_text(encoding="utf-8") for path in sorted(Path(str(files("lm_eval") / "tasks")).rglob("*yaml"))
    ]
    lines = sorted({line.strip() for prompt in prompts for line in prompt.splitlines()})
    foreign = [line for line in lines if np.mean([char > "~" for char in line] or [0]) > 0.3]
    return {
        "source code": "\n".join((library / f"{name}.py").read_text() for name in ("argparse", "heapq", "textwrap")),
        "other languages": "\n".join(rng.permutation(foreign)),
        "digits": " ".join(map(str, rng.integers(10**6, size=10_000))),
        "base64": base64.encodebytes(rng.bytes(40_000)).decode(),
    }


def blocks() -> dict[str, Blocks]:
    """Return all texts, packed, and blocks of tokens that are not text."""
    tokenizer = checkpoint.load_tokenizer("micro")
    vocabulary = len(tokenizer)
    packed = {
        name: load_blocks(Text(name), tokenizer, CONTEXT, vocabulary, most=MOST)
        for name in ("books-report", "shifted-peps", RANDOM_TOKENS)
    }
    with tempfile.TemporaryDirectory() as directory:
        for name, text in texts().items():
            file = Path(directory) / f"{name}.txt"
            file.write_text(text, encoding="utf-8")
            packed[name] = load_blocks(Text(str(file)), tokenizer, CONTEXT, vocabulary, most=MOST)
            packed[name] = Blocks(
                np.array(packed[name].blocks).ravel(), CONTEXT
            )  # in memory, because the file is deleted
    rng = np.random.default_rng(0)
    ids = token_ids(tokenizer, vocabulary)
    books = load_blocks(Text("books-report"), tokenizer, CONTEXT, vocabulary).blocks.ravel()
    openings, repeated = rng.integers(len(books) - CONTEXT, size=MOST), rng.choice(ids, MOST)
    rows = [np.repeat(token, CONTEXT) for token in repeated]
    for row, start in zip(rows, openings, strict=True):
        row[: CONTEXT - REPEATS] = books[start : start + CONTEXT - REPEATS]
    packed[f"one token {REPEATS} times"] = Blocks(np.concatenate(rows).astype(np.uint32), CONTEXT)
    seen = np.unique(load_blocks(Text("books-train"), tokenizer, CONTEXT, vocabulary).blocks)
    unseen = rng.choice(np.setdiff1d(ids, seen), MOST * CONTEXT)
    packed["tokens that books-train lacks"] = Blocks(unseen.astype(np.uint32), CONTEXT)
    return packed


def measure(directories: list[Path]) -> pd.DataFrame:
    """Return one row per run, text and model."""
    packed, rows = blocks(), []
    for directory in tqdm(directories, unit="run"):
        run, recipe = Run(directory, pd.DataFrame()), recipe_of(directory)
        assert isinstance(recipe, Recipe)
        models = {name: run.load(name) for name in ("original", "ln_free")}
        for text, those in packed.items():
            frame = evaluate.compare(evaluate.measure_documents(models, those))
            frame = frame[["model", "loss", "loss_max", "jsd", "tokens"]]
            said = {
                "run": directory.name,
                "recipe": recipe.name,
                "seed": recipe.seed,
                "trained": recipe.steps * recipe.batch * CONTEXT,
            }
            rows.append(frame.assign(text=text, cover=recipe.cover, kinds=" ".join(recipe.cover_kinds), **said))
    return pd.concat(rows, ignore_index=True)


if __name__ == "__main__":
    measure([Path(argument) for argument in sys.argv[1:]]).to_csv(HERE / "far_texts.csv", index=False)
