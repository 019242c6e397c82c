"""Load LN-free models into the tools that researchers use, and compare them with the models they were made from.

`load_bridge`, `load_hooked`, `load_nnsight` and `load_transformers` load one model, `load_hooked_blocks` loads one of
`finetune.blocks`, and `load_trio` loads the original, the control and the LN-free model that the analyses compare. An
analysis is a module with `measure(models, tokens)`, which returns a table, and `plot(table)`, which returns a figure:
`loss`, `generation`, `residual_norms`, `logit_attribution`, `edges`, `composition`, `faithfulness`, `attention`,
`confidence_neurons`, `patching`, `outlier_features`, `benchmarks`. `report` runs them all. `graph` draws the circuit
behind one logit, and checks it by interventions; `paths` finds the largest paths to it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.loading import (
        load_bridge,
        load_hooked,
        load_hooked_blocks,
        load_nnsight,
        load_transformers,
        load_trio,
    )
    from finetune.names import PUBLISHED, Published

__all__ = [
    "PUBLISHED",
    "Published",
    "load_bridge",
    "load_hooked",
    "load_hooked_blocks",
    "load_nnsight",
    "load_transformers",
    "load_trio",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, because torch and the tools take seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    from analysis import loading
    from finetune import names

    return getattr(names if name in ("PUBLISHED", "Published") else loading, name)


def __dir__() -> list[str]:
    """List public names that are not imported yet, too, so that `python -m pydoc analysis` shows them."""
    return sorted({*globals(), *__all__})
