"""The shapes and types of arrays that functions are annotated with, checked at run time."""

import typing
from collections.abc import Callable, Mapping
from types import UnionType

import jaxtyping
import torch
from beartype import beartype


def check(function: Callable) -> Callable:
    """Check arrays alone: of an iterator beartype would take an item, to see its type."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in hints.items() if _is_of_arrays(hint)}
    return beartype(function)


def _is_of_arrays(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    origins = typing.Union, UnionType, list, tuple, dict, Mapping
    return typing.get_origin(hint) in origins and any(map(_is_of_arrays, typing.get_args(hint)))


class _UncheckedInCompiledCode(type(jaxtyping.config)):
    jaxtyping_disable = property(lambda self: torch.compiler.is_compiling(), lambda self, value: None)


def install(*packages: str) -> None:
    """Check the functions of `packages`, imported from here on, except where torch compiles them."""
    jaxtyping.config.__class__ = _UncheckedInCompiledCode
    jaxtyping.install_import_hook(packages, "shape_checks.check")
