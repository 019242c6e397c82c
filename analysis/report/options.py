"""What can be asked for: the flags of the command line, of a report also the keyword arguments of `run` and `write`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


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


@dataclass(frozen=True)
class GraphOptions:
    """Draw what makes a logit after a prompt, check it by taking parts out, and write one page and the graphs."""

    prompt: Positional[str]
    """The text; the logit is that of what comes next."""
    target: str | None = None
    """The token whose logit it is, such as " the". None: the one that the original finds likeliest."""
    against: str | None = None
    """Another token: the logit is then how far that of the target is above its own. None: above the mean of all."""
    original: str = "micro"
    """The model that lost its norms: a short name, a directory, or a Hub id."""
    ln_free: str = "micro-ln-free"
    """The LN-free model."""
    control: str | None = None
    """The model fine-tuned in the same way with its norms. None: none."""
    revision: str | None = None
    """The revision of an original on the Hub."""
    share: float = 0.8
    """The share of all influence that the nodes shown are to have."""
    most: int = 60
    """Nodes at most; the page says what share they have."""
    neurons: int = 0
    """Neurons of each MLP and position to be nodes by themselves."""
    paths: int = 20
    """The largest paths from the tokens to the logit that are listed."""
    components: int = 3
    """Heads and MLPs that these paths go through, at most."""
    prefix: str | None = None
    """A token before the prompt: "bos", or a token by its text. None: none."""
    out: Path | None = None
    """The directory to write. None: graphs/TIME."""
