"""The models and texts that ship inside the package. Only this module turns their short names into paths."""

from pathlib import Path

ROOT = Path(__file__).parent

MODELS = {
    name: ROOT / name for name in ("micro", "micro-control", "micro-ln-free", "micro-llama", "micro-llama-ln-free")
}
"""Short names of models: a GPT-2 and a Llama, and what the recipes with their names make of them at seed 0. Any other
name is a local directory or a Hub id."""

TEXTS = {
    name: ROOT / "text" / f"{name}.jsonl.xz"
    for name in ("books-train", "books-validation", "books-report", "shifted-peps")
}
"""Short names of texts. Any other name is a local path or a Hub data set."""


def resolve_model(name: str) -> str:
    """Return the path of the bundled model `name`, or `name` itself if there is no such model."""
    return str(MODELS.get(name, name))


def resolve_text(name: str) -> str:
    """Return the path of the bundled text `name`, or `name` itself if there is no such text."""
    return str(TEXTS.get(name, name))
