"""`python -m finetune.bundled RUN`: bundle a run of `micro`, its control and its LN-free model, in place of those here.

Matrices are stored in float16. Vectors stay in float32: the weights of an LN-free model's norms hold 1e6 over a std.
"""

import argparse
import json
import shutil
from pathlib import Path

from finetune import checkpoint
from finetune.bundled import MODELS, ROOT


def bundle(run: Path) -> None:
    """Write the control and the LN-free model of the run directory `run` into the package."""
    for name, source in {"micro-control": run / "control", "micro-ln-free": run / "ln_free"}.items():
        model = checkpoint.load(source)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.half()
        card = (source / "README.md").read_text(encoding="utf-8")
        made = ROOT / f".{name}.partial"
        shutil.rmtree(made, ignore_errors=True)
        checkpoint.save(model, made, checkpoint.load_tokenizer(source), card)
        # transformers loads in the config's type, which it took from the first matrix.
        config = made / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
        shutil.rmtree(MODELS[name], ignore_errors=True)
        made.rename(MODELS[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m finetune.bundled", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the directory of a complete run of the recipe micro")
    bundle(parser.parse_args().run)
