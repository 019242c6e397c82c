"""`python -m finetune.bundled RUN`: bundle a run of `micro`, its control and its LN-free model, in place of those here.

Matrices are stored in float16. Vectors stay in float32: the weights of an LN-free model's norms hold 1e6 over a std.
"""

import json
import shutil
import sys
from pathlib import Path

from finetune import checkpoint
from finetune.bundled import MODELS


def bundle(run: Path) -> None:
    """Write the control and the LN-free model of the run directory `run` into the package."""
    for name, source in {"micro-control": run / "control", "micro-ln-free": run / "ln_free"}.items():
        model = checkpoint.load(source)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.half()
        shutil.rmtree(MODELS[name], ignore_errors=True)
        card = (source / "README.md").read_text(encoding="utf-8")
        checkpoint.save(model, MODELS[name], checkpoint.load_tokenizer(source), card)
        # transformers loads in the config's type, which it took from the first matrix.
        config = MODELS[name] / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    bundle(Path(sys.argv[1]))
