"""The flags of the command line. Those of a report are also the keyword arguments of `run` and `write`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class Options:
    """Compare an original model, a control and an LN-free model, and write tables, figures and one HTML page."""

    original: str | None = None
    """The model whose norms were removed: a short name, a directory, or a Hub id. None: that of the newest run."""
    ln_free: str | None = None
    """The LN-free model. None: that of the newest run."""
    control: str | None = None
    """The model that was fine-tuned in the same way, but with its norms. None: that of the newest run, or no control if
    the other models are given."""
    revision: str | None = None
    """The revision of an original on the Hub. None: that of the newest run."""
    text: tuple[str, ...] = ("books-report", "shifted-peps")
    """Texts to compare the models on: bundled names, files, directories, or Hub data sets. Analyses of a single text
    use the first, which should be like that of the fine-tuning. Random tokens are always added."""
    pairs: Path | None = None
    """A JSON file of prompt pairs for patching: a list of objects with the texts clean, corrupt, correct and wrong.
    None: the bundled pairs or, if the tokenizer splits their answers, pairs that are created for it."""
    tokens: int = 8_192
    """The maximum number of tokens per text, in blocks that are spread evenly over it."""
    context: int | None = None
    """Tokens per block. None: the context of the newest run or, if models are given, that of the model, at most 1,024.
    """
    prefix: str | None = None
    """A token to prepend to each block and prompt, as `text.prefix` in a recipe: "bos", or the text of a token. None:
    that of the newest run or, if models are given, no prefix."""
    out: Path | None = None
    """The directory to write. None: reports/TIME."""
    only: tuple[str, ...] = ()
    """The analyses to run, by module name. Empty: all."""
    batch_size: int = 8
    """The maximum number of blocks per forward. No number depends on it."""
    png: bool = False
    """Also write the figures as PNG. Requires the extra `png`, and Chrome or Chromium."""
    benchmark: tuple[str, ...] = ()
    """Tasks of EleutherAI's lm-evaluation-harness, such as hellaswag: NAME, with data from the Hub, or NAME=FILE.jsonl,
    with data from a file that has the same fields. Requires the extra `eval`. Empty: none."""


@dataclass(frozen=True)
class GraphOptions:
    """Draw the circuit behind a logit after a prompt, check it by removing parts, and write a page and the graphs."""

    prompt: Positional[str]
    """The text. The logit is that of the next token."""
    target: str | None = None
    """The token whose logit is explained, such as " the". None: the original's most likely token."""
    against: str | None = None
    """Another token, whose logit is subtracted. None: subtract the mean over all tokens."""
    original: str = "micro"
    """The model whose norms were removed: a short name, a directory, or a Hub id."""
    ln_free: str = "micro-ln-free"
    """The LN-free model."""
    control: str | None = None
    """The model that was fine-tuned in the same way, but with its norms. None: no control."""
    revision: str | None = None
    """The revision of an original on the Hub."""
    share: float = 0.8
    """The fraction of all influence that the shown nodes should have."""
    most: int = 60
    """The maximum number of nodes. The page gives the fraction of influence that they have."""
    neurons: int = 0
    """The number of neurons, per MLP and position, that are separate nodes."""
    paths: int = 20
    """How many of the largest paths from the tokens to the logit to list."""
    components: int = 3
    """The maximum number of heads and MLPs on these paths."""
    prefix: str | None = None
    """A token to prepend to the prompt: "bos", or the text of a token. None: no prefix."""
    out: Path | None = None
    """The directory to write. None: graphs/TIME."""
