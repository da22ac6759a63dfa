"""Reward functions: finding one, calling it, and what ships. A reward function is any callable

    def f(prompts: list[str], completions: list[str], **columns: list) -> list[float]

with a number for each completion; columns are the other keys of the prompt file, a value for each completion (TRL's reward
functions of plain text have this form). A judge or a reward model is called from inside such a function.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line

Reward = Callable[..., Sequence[float]]
_AGAIN = "correct it, then continue the run with --resume"


def exact_match(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the completion, blanks at its ends aside, is the answer; else 0."""
    return [float(c.strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def find(name: str) -> Reward:
    """The callable that "module:function" or "file.py:function" names."""
    source, _, attribute = name.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            if "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))  # a console script does not look here by itself
            module = importlib.import_module(source)
        function = getattr(module, attribute)
    except Exception as error:  # a user's module may raise anything
        raise UserError(f"--reward: expected an importable {name}, got {one_line(error)}") from error
    if not callable(function):
        raise UserError(f"--reward: expected a function, got {name} = {function!r}")
    return function


def score(
    reward: Reward, name: str, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> list[float]:
    """Rewards of completions, checked; `UserError` names the sample that has none."""

    def sample(i: int) -> str:
        return f"sample {i} (prompt {prompts[i][-80:]!r}, completion {completions[i][:80]!r})"

    try:
        rewards = reward(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        where = sample(_culprit(reward, prompts, completions, columns))
        raise UserError(f"--reward: {name} raised {one_line(error)} at {where}; {_AGAIN}") from error
    try:
        rewards = [float(r) for r in rewards]
    except (TypeError, ValueError) as error:
        raise UserError(f"--reward: expected {name} to return numbers, got {one_line(error)}; {_AGAIN}") from None
    if len(rewards) != len(completions):
        raise UserError(
            f"--reward: expected {len(completions)} rewards from {name}, one for each completion, got {len(rewards)}, the "
            f"last for {sample(min(max(len(rewards), 1), len(completions)) - 1)}; {_AGAIN}"
        )
    for i, value in enumerate(rewards):
        if not math.isfinite(value):
            raise UserError(f"--reward: expected finite rewards from {name}, got {value} for {sample(i)}; {_AGAIN}")
    return rewards


def _culprit(reward: Reward, prompts: list[str], completions: list[str], columns: dict[str, list]) -> int:
    """The first sample that fails alone; the first of all if none does."""
    for i in range(len(prompts)):
        try:
            reward(
                prompts=prompts[i : i + 1],
                completions=completions[i : i + 1],
                **{k: v[i : i + 1] for k, v in columns.items()},
            )
        except Exception:
            return i
    return 0
