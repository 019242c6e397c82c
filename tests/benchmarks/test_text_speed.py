"""Seconds of tokenising and packing a .jsonl, against the tokenizer's own batch call with the same documents.

Each row is measured in processes of its own, all in turn and then again, and the fastest of each counts. Imports do
not count. Peak is by how much the row raised it.

    tokenizer    one call with all documents, in memory already, on all cores
    load_blocks  finetune.text.load_blocks: reads the file, tokenises, writes tokens to an empty cache, cuts blocks
    again        the same once more, from the cache
    blocks       reads every block of `again` as training does

`python tests/benchmarks/test_text_speed.py --help` has sizes to choose from.
"""

import argparse
import json
import lzma
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import machine
import pandas as pd

from finetune import checkpoint
from finetune.bundled import TEXTS
from finetune.recipe import Text
from finetune.text import load_blocks

ROWS = ("tokenizer", "load_blocks", "again", "blocks")
DOCUMENT = 3000
"""Characters of a document, at the most."""
CONTEXT = 256


def _documents(characters: int) -> Iterator[str]:
    """Yield pieces of the bundled books, so many characters in all."""
    with lzma.open(TEXTS["books-train"], "rt", encoding="utf-8") as lines:
        for line in lines:
            book = json.loads(line)["text"]
            for start in range(0, len(book), DOCUMENT):
                if characters <= 0:
                    return
                document = book[start : start + DOCUMENT]
                characters -= len(document)
                yield document


def _measure(row: str, path: Path) -> dict[str, float]:
    tokenizer = checkpoint.load_tokenizer("micro")
    text = Text(source=str(path))
    documents = [json.loads(line)["text"] for line in path.read_text().splitlines()] if row == "tokenizer" else []
    blocks = load_blocks(text, tokenizer, CONTEXT, len(tokenizer)) if row == "blocks" else None
    before, start = machine.peak("cpu"), time.perf_counter()
    if row == "tokenizer":
        encoded = tokenizer(documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
        tokens = sum(map(len, encoded["input_ids"])) + len(documents)
    elif blocks is None:
        tokens = load_blocks(text, tokenizer, CONTEXT, len(tokenizer)).blocks.size
    else:
        tokens = sum(blocks[i]["input_ids"].numel() for i in range(len(blocks)))
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "peak MiB": machine.peak("cpu") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", nargs=2, metavar=("ROW", "FILE"), help="measure one row, and print JSON")
    options = parser.parse_args()
    if options.alone:
        datasets.disable_progress_bars()
        print(json.dumps(_measure(options.alone[0], Path(options.alone[1]))))
        return
    rounds = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "text.jsonl"
        documents = _documents(int(options.megabytes * 1e6))
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        for i in range(options.rounds):
            cache = f"{directory}/{i}"
            found = {row: machine.alone(__file__, "--alone", row, path, HF_DATASETS_CACHE=cache) for row in ROWS}
            rounds.append(pd.DataFrame(found).T)
        size = path.stat().st_size / 1e6
    table = pd.concat(rounds).groupby(level=0, sort=False).min()
    table.insert(1, "over tokenizer", table["seconds"] / table["seconds"]["tokenizer"])
    table.loc["blocks", "over tokenizer"] = math.nan
    table["tokens a second"] = table["tokens"] / table["seconds"]
    print(f"\n{machine.describe('cpu', threads=os.cpu_count())}\n{size:.1f} MB of .jsonl, {options.rounds} rounds")
    print(machine.markdown(table, "row"), flush=True)


def test_text_speed() -> None:
    subprocess.run([sys.executable, __file__], check=True)


if __name__ == "__main__":
    main()
