"""Other people's implementations, imported where they are installed; a peer that is not says so instead of a number."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

#: Distributions whose versions belong beside every number.
PACKAGES = (
    "torch", "numpy", "numba", "stable-baselines3", "torchrl", "tensordict", "liger-kernel", "trl", "verl",
)  # fmt: skip


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def imported(module: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why not. Anything may go wrong while a foreign package loads, and none of it is ours."""
    try:
        return importlib.import_module(module), ""
    except Exception as error:
        return None, f"{module.partition('.')[0]} cannot be imported: {error}"


def function(module: str, name: str) -> tuple[Any, str]:
    """What the module calls `name`, or None and why not."""
    found, why = imported(module)
    if found is not None and not hasattr(found, name):
        why = f"{module} has no {name}"
    return getattr(found, name, None), why


def torchrl_function(name: str) -> tuple[Any, str]:
    return function("torchrl.objectives.value.functional", name)


@functools.cache
def njit(function: Callable) -> tuple[Callable | None, str]:
    """`function` through numba, single-threaded, at numba's defaults (strict IEEE arithmetic, as every provider here)."""
    numba, why = imported("numba")
    return (numba.njit(function) if numba else None), why
