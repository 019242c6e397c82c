"""The flags of the command line. Those of a report are also the keyword arguments of `run` and `write`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Options:
    """Compare an original model, a control and an LN-free model on one HTML page."""

    original: str | None = None
    """The original model, with its norms: a bundled name, a directory, or a Hub id. None: that of the newest run."""
    ln_free: str | None = None
    """The LN-free model. None: that of the newest run."""
    control: str | None = None
    """The control, fine-tuned in the same way with its norms. None: that of the newest run or, if the other models are
    named, no control."""
    revision: str | None = None
    """The revision of an original on the Hub. None: that of the newest run."""
    text: tuple[str, ...] = ("books-report", "shifted-peps")
    """Texts to compare the models on: bundled names, files, directories, or Hub data sets. Analyses that use one text
    use the first, which should be like the text of the fine-tuning. Random tokens are always added."""
    pairs: Path | None = None
    """A JSON file of prompt pairs for patching: a list of objects with the texts clean, corrupt, correct and wrong.
    None: pairs that come with the package or, if the tokenizer splits their words, pairs made for it."""
    tokens: int = 8_192
    """The largest number of tokens of each text, in blocks spread evenly over it."""
    context: int | None = None
    """Tokens per block. None: as in the newest run or, if models are named, as many as the models take, but at most
    1,024."""
    prefix: str | None = None
    """A token to put before each block and prompt, as `text.prefix` in a recipe: "bos", or the text of a token. None:
    that of the newest run or, if models are named, no token."""
    out: Path | None = None
    """The directory to write, which must not exist. None: reports/TIME."""
    only: Annotated[tuple[str, ...], arg(help_behavior_hint="(default: all)")] = ()
    """The analyses to run, by the names of their modules, such as loss or patching. If a name does not exist, the error
    lists them all."""
    batch_size: int = 8
    """The largest number of blocks in one forward pass. No result depends on it."""
    png: bool = False
    """Also write the figures as PNG. Needs the extra `png`, and Chrome or Chromium."""
    benchmark: Annotated[tuple[str, ...], arg(help_behavior_hint="(default: none)")] = ()
    """Tasks of EleutherAI's lm-evaluation-harness: NAME, such as hellaswag, for its data on the Hub, or NAME=FILE.jsonl
    for a file with the same fields. Needs the extra `eval`."""


@dataclass(frozen=True)
class GraphOptions:
    """Draw the circuit behind a logit as a graph on an HTML page, and check it by ablation."""

    prompt: Annotated[str, arg(metavar="PROMPT"), Positional]
    """The text after which the next token is predicted."""
    target: str | None = None
    """The token whose logit is explained, such as " the" (with its space). None: the most likely one in the original
    model."""
    against: str | None = None
    """Explain the difference to the logit of this token instead. None: the difference to the mean logit of all
    tokens."""
    original: str = "micro"
    """The original model, with its norms: a bundled name, a directory, or a Hub id."""
    ln_free: str = "micro-ln-free"
    """The LN-free model."""
    control: str | None = None
    """The control, fine-tuned in the same way with its norms. None: no control."""
    revision: str | None = None
    """The revision of an original on the Hub."""
    share: float = 0.8
    """The share of all influence on the logit that the nodes of the graph should have."""
    most: int = 60
    """The largest number of nodes. The page says what share of the influence they have."""
    neurons: int = 0
    """The number of neurons of each MLP, at each position, that are nodes of their own."""
    paths: int = 20
    """The number of paths to list, from the tokens to the logit, largest first."""
    components: int = 3
    """The largest number of heads and MLPs on such a path."""
    prefix: str | None = None
    """A token to put before the prompt: "bos", or the text of a token. None: no token."""
    out: Path | None = None
    """The directory to write, which must not exist. None: graphs/TIME."""
