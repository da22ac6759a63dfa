"""One trial of a study, in a process of its own: whatever it does, even a crash, the study lives on."""

from __future__ import annotations

import math
import shutil
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .errors import UserError, one_line
from .fields import RunFields

POINTS = 20  # intermediate values of a run, where a trial may be pruned: the same share of the work in every trial


class Pruned(Exception):
    """The study has seen enough."""


def objective(config: RunFields) -> str:
    """The column of progress.csv that a trial is judged by, larger is better."""
    if config.kind != "ppo_fast.language":
        return "mean_return"
    fields: Any = config
    return "eval_reward" if fields.eval_prompts or not fields.prompts else "reward"


def _train(config: Any, on_iteration: Any) -> bool:
    """A quiet run; whether it was finished."""
    from rich.console import Console

    console = Console(quiet=True)
    if config.kind == "ppo_fast.language":
        from .language.run import train as train_language

        return train_language(config, console=console, on_iteration=on_iteration).finished
    from . import control, ddpg

    kind = ddpg.DDPGTrainer if config.kind == "ppo_fast.ddpg" else control.Trainer
    return control.train(config, console=console, trainer=kind, on_iteration=on_iteration).finished


class Reporter:
    """Sends intermediate values of the `index`-th run to the study and waits for its word."""

    def __init__(self, connection: Connection, config: Any, finished: list[float]) -> None:
        self.connection, self.config, self.finished = connection, config, finished
        self.name, self.value, self.point = objective(config), math.nan, 0

    def __call__(self, row: dict[str, Any]) -> None:
        if self.connection.poll():  # nothing was asked, so the study is gone: nobody waits for this trial
            raise EOFError
        if not math.isnan(row[self.name]):  # not every iteration is evaluated
            self.value = float(row[self.name])
        config = self.config
        share = (
            row["global_step"] / config.planned_steps if "global_step" in row else row["iteration"] / config.iterations
        )
        point = int(share * POINTS + 1e-9)
        if point == self.point or math.isnan(self.value):
            return
        self.point = point
        values = [*self.finished, self.value]
        self.connection.send(("report", len(self.finished) * POINTS + point, sum(values) / len(values)))
        if not self.connection.recv():
            raise Pruned


def run(connection: Connection, configs: list[Any]) -> None:
    """Runs `configs`, which differ in their seed; sends ("done", values), ("pruned",) or ("failed", message)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the study, which then ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves by the `finally`s, which close environments
    try:
        connection.send(_outcome(connection, configs))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(1)  # the study is gone


def _outcome(connection: Connection, configs: list[Any]) -> tuple[Any, ...]:
    finished: list[float] = []
    try:
        for config in configs:
            reporter = Reporter(connection, config, finished)
            try:
                if not _train(config, reporter):
                    raise UserError("interrupted")
            finally:
                shutil.rmtree(Path(config.run_dir), ignore_errors=True)  # --config best.json makes the run again
            if math.isnan(reporter.value):
                raise UserError(f"expected a {reporter.name}, got none: no episode has ended")
            finished.append(reporter.value)
        return "done", finished
    except Pruned:
        return ("pruned",)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except UserError as error:
        return "failed", str(error)
    except Exception as error:  # whatever an environment or a reward function raises belongs to this trial alone
        return "failed", one_line(error)
