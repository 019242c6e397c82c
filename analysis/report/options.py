"""What a report can be asked for: the flags of the command line, and the keyword arguments of `run` and `write`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Compare an original model, a control and an LN-free model, and write tables, figures and one HTML page."""

    original: str | None = None
    """The model that lost its norms: a short name, a directory, or a Hub id. None: that of the newest run."""
    ln_free: str | None = None
    """The LN-free model. None: that of the newest run."""
    control: str | None = None
    """The model fine-tuned in the same way with its norms. None: that of the newest run, or none at all where the other
    models are named."""
    revision: str | None = None
    """The revision of an original on the Hub. None: that of the newest run."""
    text: tuple[str, ...] = ("books-report", "shifted-peps")
    """Texts to compare the models on: bundled names, files, directories, or Hub data sets. The first one, which is to
    be like that of the fine-tuning, serves the analyses that look at one text. Random tokens are always added."""
    pairs: Path | None = None
    """A JSON file of prompt pairs for patching, a list of objects with the texts clean, corrupt, correct and wrong.
    None: pairs that come with the package or, where the tokenizer cuts their words, some made for it."""
    tokens: int = 8_192
    """Tokens of each text, at most, in blocks spread evenly over it."""
    context: int | None = None
    """Tokens of a block. None: as the newest run trained on or, where models are named, as many as the model takes, at
    most 1,024."""
    prefix: str | None = None
    """A token before each block and prompt, as `text.prefix` in a recipe: "bos", or a token by its text. None: that of
    the newest run or, where models are named, none."""
    out: Path | None = None
    """The directory to write. None: reports/TIME."""
    only: tuple[str, ...] = ()
    """The analyses to run, by their module's names. Empty: all."""
    batch_size: int = 8
    """Blocks in one forward, at most. No number depends on it."""
    png: bool = False
    """Also write the figures as PNG; needs the extra `png`, and Chrome or Chromium."""
    benchmark: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-evaluation-harness, such as hellaswag: NAME, on its data on the Hub, or NAME=FILE.jsonl,
    a file with the fields of those data in their place; needs the extra `eval`. Empty: none."""
