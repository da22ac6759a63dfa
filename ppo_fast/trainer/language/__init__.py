"""PPO, GRPO and their kin for causal language models: `train(LanguageConfig(...))`; docs/language.md explains the loop."""

from ..errors import UserError
from .config import LanguageConfig

__all__ = ["LanguageConfig", "TrainResult", "UserError", "train"]


def __getattr__(name: str):
    if name in ("TrainResult", "train"):  # imports transformers, which takes seconds: help must come at once
        from . import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
