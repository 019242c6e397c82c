"""`python -m finetune.bundled RUN`: bundle the models of a run, replacing those that are named after its recipe.

A run of `micro` gives `micro-control` and `micro-ln-free`. A run of `pretrain micro-llama` gives `micro-llama`.

Matrices are stored in float16. Vectors stay in float32, because an LN-free model's norm weights contain 1e6 divided by
a std.
"""

import argparse
import json
import shutil
from pathlib import Path

from finetune import checkpoint
from finetune.bundled import MODELS, ROOT
from finetune.errors import NolnError
from finetune.run_directory import recipe_of


def bundle(run: Path) -> None:
    """Write the models of the run directory `run` that have names in `MODELS` into the package.

    Raises:
        NolnError: none of its models has such a name.
    """
    name = recipe_of(run).name
    sources = {name: run / "model", f"{name}-control": run / "control", f"{name}-ln-free": run / "ln_free"}
    sources = {name: source for name, source in sources.items() if name in MODELS and source.is_dir()}
    if not sources:
        raise NolnError(f"{run}, a run of the recipe {name}, contains none of the models {', '.join(MODELS)}.")
    for name, source in sources.items():
        model = checkpoint.load(source)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.half()
        card = (source / "README.md").read_text(encoding="utf-8")
        made = ROOT / f".{name}.partial"
        shutil.rmtree(made, ignore_errors=True)
        checkpoint.save(model, made, checkpoint.load_tokenizer(source), card)
        # transformers loads weights in the config's dtype, and save took that from the first matrix.
        config = made / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
        shutil.rmtree(MODELS[name], ignore_errors=True)
        made.rename(MODELS[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m finetune.bundled", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the directory of a complete run of a recipe whose models are bundled")
    bundle(parser.parse_args().run)
