"""One colour per model name, everywhere.

The colours are those of Okabe and Ito (2008, "Color Universal Design") that can be seen on light and on dark pages; the
trio has the three that have a contrast of at least 3 on both and that readers of every colour vision tell apart best.
"""

import html

_COLOURS = {"original": "#0072B2", "control": "#CC79A7", "ln_free": "#D55E00"}
_OTHERS = ("#009E73", "#56B4E9", "#E69F00")


def colour(model: str) -> str:
    """Return the colour of the model called `model`, as "#RRGGBB": the same as long as the process lives.

    Beside the trio, names get a colour when they are first asked for; from the seventh on colours repeat.
    """
    model = html.unescape(model)  # as figures have it
    return _COLOURS.setdefault(model, _OTHERS[len(_COLOURS) % len(_OTHERS)])
