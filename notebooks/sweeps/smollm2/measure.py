"""Measure an LN-free model of SmolLM2 on each kind of held-out text and on random tokens.

`python notebooks/sweeps/smollm2/measure.py ORIGINAL LN_FREE TEXT…` writes measured.csv beside this script. It has one
row per text, with the columns

text, blocks    what the models are measured on: blocks of 128 tokens, the first 60 of a text
original        cross-entropy of the original, nats/token
loss, jsd       cross-entropy of the LN-free model minus the original's, and JSD to the original, nats/token; means over
                tokens, NaN if the model overflows
loss_max        its largest loss of a token minus the original's largest, nats
overflow        the blocks on which it overflows
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from finetune import checkpoint, evaluate
from finetune.text import RANDOM_TOKENS, Text, load_blocks

CONTEXT, BLOCKS = 128, 60

if __name__ == "__main__":
    names, texts = sys.argv[1:3], sys.argv[3:]
    tokenizer = checkpoint.load_tokenizer(names[0])
    models = {name: checkpoint.load(path).float() for name, path in zip(("original", "ln_free"), names, strict=True)}
    vocabulary = models["original"].config.vocab_size
    rows = []
    for text in tqdm([*texts, RANDOM_TOKENS], unit="text"):
        blocks = load_blocks(Text(text), tokenizer, CONTEXT, vocabulary, most=BLOCKS)
        found = evaluate.measure_tokens(models, blocks)
        ours, theirs = found["ln_free"], found["original"]
        rows.append(
            {
                "text": Path(text).stem,
                "blocks": len(blocks),
                "original": theirs["loss"].mean(),
                "loss": ours["loss"].mean() - theirs["loss"].mean(),
                "jsd": ours["jsd"].mean(),
                "loss_max": ours["loss"].max() - theirs["loss"].max(),
                "overflow": (~np.isfinite(ours["loss"]).reshape(len(blocks), -1).all(-1)).sum(),
            }
        )
    pd.DataFrame(rows).round(5).to_csv(Path(__file__).with_name("measured.csv"), index=False)
