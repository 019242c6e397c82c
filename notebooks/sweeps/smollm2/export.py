"""Export the LN-free model of a checkpoint at which all sites divide by constants, although the guard is still up.

`python notebooks/sweeps/smollm2/export.py RUN CHECKPOINT OUT` writes the model into the new directory OUT, without the
guard. The runs here diverge when training goes on without it.
"""

import runpy
import sys
from pathlib import Path

from finetune import checkpoint

if __name__ == "__main__":
    run, path, out = map(Path, sys.argv[1:])
    tokenizer, _, sites = runpy.run_path(str(Path(__file__).with_name("subsets.py")))["load_sites"](run, path)
    checkpoint.save(sites.to_plain(), out, tokenizer)
