"""The raw calls by name, each from the file of its op, which is imported when it is first called."""

from __future__ import annotations

import importlib
from typing import Any

#: Names that are not an op's.
_ELSEWHERE = {"LossParams": "_params", "has_overlap": "_params", "scale": "scale"}


def __getattr__(name: str) -> Any:
    module = _ELSEWHERE.get(name, name.removesuffix("_backward"))
    try:
        found = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    except ModuleNotFoundError as error:
        raise AttributeError(f"ppo_fast.kernels has no {name!r}") from error
    globals()[name] = found
    return found
