"""Looks at LN-free models and at what they were made from, in the tools that researchers use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.loading import (
        PUBLISHED,
        Published,
        load_bridge,
        load_hooked,
        load_nnsight,
        load_transformers,
        load_trio,
    )

__all__ = [
    "PUBLISHED",
    "Published",
    "load_bridge",
    "load_hooked",
    "load_nnsight",
    "load_transformers",
    "load_trio",
]


def __getattr__(name: str) -> Any:
    """Import `analysis.loading` when it is first used: torch and the tools take seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'analysis' has no attribute {name!r}")
    from analysis import loading

    return getattr(loading, name)
