"""Short names of bundled and published models, each of which stands for a directory or a model on the Hub.

Any other name is a directory or a Hub id.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetune.bundled import MODELS, TEXTS
from finetune.errors import NolnError

Format = Literal["b25", "h24"]
"""The format of a checkpoint without norms: see `folding`."""


@dataclass(frozen=True)
class Published:
    """A published model."""

    id: str
    revision: str
    format: Format | None
    """None for a control, which keeps LN."""
    base: str
    """The model that it was made from, whose tokenizer it uses."""
    paper: str
    checked: bool = False
    """Whether this model itself was loaded and checked, rather than only models of its format."""


_H24 = "arXiv 2409.13710"
_B25 = "arXiv 2507.02559"
_NO_LN = "apollo-research/gpt2_noLN"

PUBLISHED: dict[str, Published] = {
    "gpt2_noLN": Published(_NO_LN, "main", "h24", "openai-community/gpt2", _H24),
    **{
        f"gpt2_noLN-{version}": Published(_NO_LN, version, "h24", "openai-community/gpt2", _H24)
        for version in ("v1", "v2", "v3", "v4", "v5")
    },
    **{
        f"gpt2_noLN-{control}": Published(_NO_LN, control, None, "openai-community/gpt2", _H24)
        for control in ("vanilla", "vanilla_1200")
    },
    **{
        name: Published(f"schaeff/{name}", "main", "b25", f"openai-community/{base}", _B25)
        for name, base in {
            "gpt2-small_LNFree300": "gpt2",
            "gpt2-medium_LNFree500": "gpt2-medium",
            "gpt2-large_LNFree600": "gpt2-large",
            "gpt2-xl_LNFree800": "gpt2-xl",
        }.items()
    },
}
"""Short names of published models."""


def resolve(name: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Return the directory or Hub id that a name stands for, and its revision."""
    if published := PUBLISHED.get(str(name)):
        return published.id, revision or published.revision
    return str(MODELS.get(str(name), name)), revision


def public_name(name: str) -> str:
    """Return the name of a model or text; of a local one, without the directories above it."""
    return Path(name).name if is_local(name) else name


def is_local(name: str) -> bool:
    """Return whether the name of a model or text is an existing path, rather than a bundled name."""
    return name not in MODELS | TEXTS and expanded(name).exists()


def expanded(path: str | Path) -> Path:
    """Return a path with `~` expanded.

    Raises:
        NolnError: the user that `~` names has no home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise NolnError(f"{path}: the home directory that ~ stands for is unknown. Write it out.") from error
