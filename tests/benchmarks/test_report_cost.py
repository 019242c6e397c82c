"""Tokens a second, CPU time and peak memory of each analysis of a report: memory must not grow with the tokens.

Each measurement is a process of its own, with three models (`micro`, itself as its own control, and `micro-ln-free`),
all of which see each token. Timed is all that a report of this analysis alone takes once the models are loaded, its
figures and its page too. CPU time is what the process used, of all its threads: unlike seconds, it can be compared
where other processes share the cores. `rise` is the memory on top of models and text, in MiB. Tables with one row per
token do grow: `loss` and `faithfulness`, by what their tables hold.
`python tests/benchmarks/test_report_cost.py 10000 200000` takes other numbers of tokens, and `python
tests/benchmarks/test_report_cost.py faithfulness 10000` measures one analysis.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import pandas as pd
import pytest
import torch

from analysis import load_trio, report
from analysis.texts import Sample

TOKENS = 10_000, 50_000
ROW_BYTES = 3 * 500
"""What the tables with a row a token and model may hold of a token, and the copies that are made of them."""


def _measure(name: str, tokens: int) -> dict[str, float]:
    """Return by how many MiB an analysis raises the peak, the peak, tokens a second, and CPU milliseconds a token."""
    models = load_trio("micro", "micro", "micro-ln-free")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(models["original"].cfg.d_vocab, (tokens // 256, 256), generator=generator)
    sample = Sample(blocks, (torch.arange(blocks.numel()) // 1000).view_as(blocks).numpy(), "random tokens")
    before, begin, used = machine.peak("cpu"), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        report.write(models, {"random": sample}, Path(directory) / "report", only=[name])
    seconds, used, peak = time.perf_counter() - begin, time.process_time() - used, machine.peak("cpu")
    return {
        "rise": peak - before,
        "peak": peak,
        "tokens a second": tokens / seconds,
        "CPU ms a token": 1000 * used / tokens,
    }


def measure(tokens: tuple[int, ...]) -> pd.DataFrame:
    """Return a row an analysis, a column a number of tokens."""
    rows = []
    for analysis in report.ANALYSES:
        for count in tokens:
            run = [sys.executable, __file__, analysis.name, str(count)]
            done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            rows.append({"analysis": analysis.name, "tokens": count, **json.loads(done.stdout.splitlines()[-1])})
    columns = ["tokens a second", "CPU ms a token", "rise", "peak"]
    return pd.DataFrame(rows).pivot(index="analysis", columns="tokens", values=columns)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_tokens() -> None:
    table = measure(TOKENS)
    print(f"\n{machine.describe('cpu')}")
    print(table.round(2).to_string())
    few, many = TOKENS
    allowed = 100 + ROW_BYTES * (many - few) / 2**20
    assert (table["rise"][many] - table["rise"][few] < allowed).all()
    assert (table["peak"] < 3 * 1024).all(axis=None)


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    if first.isdigit():
        print(measure((int(first), *map(int, rest))).round(2).to_string())
    else:
        print(json.dumps(_measure(first, int(rest[0]))))
