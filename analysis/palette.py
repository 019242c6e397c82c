"""One colour per model name, everywhere.

The colours are those of Okabe and Ito (2008, "Color Universal Design") that are visible on light and dark pages. The
trio has the three with a contrast of at least 3 on both that readers with any colour vision can distinguish best.
"""

import html

_COLOURS = {"original": "#0072B2", "control": "#CC79A7", "ln_free": "#D55E00"}
_OTHERS = ("#009E73", "#56B4E9", "#E69F00")


def colour(model: str) -> str:
    """Return the colour of the model called `model`, as "#RRGGBB". It stays the same for the life of the process.

    Names other than the trio's are assigned a colour at first use. From the seventh name on, colours repeat.
    """
    model = html.unescape(model)  # names are escaped in figures
    return _COLOURS.setdefault(model, _OTHERS[len(_COLOURS) % len(_OTHERS)])
