"""The data that ships inside the package, and the one place where short names become paths."""

from pathlib import Path

ROOT = Path(__file__).parent

MODELS = {
    name: ROOT / name for name in ("micro", "micro-control", "micro-ln-free", "micro-llama", "micro-llama-ln-free")
}
"""Short names of models: a GPT-2 and a Llama, and what the recipes of their names make of them with seed 0. A name that
is not here is a local directory or a Hub id."""

TEXTS = {
    name: ROOT / "text" / f"{name}.jsonl.xz"
    for name in ("books-train", "books-validation", "books-report", "shifted-peps")
}
"""Short names of texts. A name that is not here is a local path or a Hub data set."""


def resolve_model(name: str) -> str:
    """Return the path of the bundled model called `name`, or `name` itself if none is called so."""
    return str(MODELS.get(name, name))


def resolve_text(name: str) -> str:
    """Return the path of the bundled text called `name`, or `name` itself if none is called so."""
    return str(TEXTS.get(name, name))
