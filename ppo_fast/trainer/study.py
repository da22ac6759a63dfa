"""A study of hyperparameters: Optuna's SQLite file in a folder, and the table and best configuration beside it."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
import sqlite3
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import trial as worker
from .errors import UserError, one_line
from .fields import RunFields
from .rundir import RunDir
from .search import Dimension, Value

NAME = "ppo_fast"


@dataclass(frozen=True)
class TuneConfig:
    """Searches hyperparameters: trains many times with other values of the fields that --search names.

    All other flags are those of ppo-fast train: what every trial has in common. Example:

    ppo-fast tune control --env-id CartPole-v1 --total-timesteps 50000 --search learning_rate=log:1e-4:1e-2
    num_steps=32,64,128 clip_coef=0.1:0.3 --trials 20 --jobs 2

    Leaves in --study: study.db (Optuna's), trials.csv, best.json for ppo-fast train --config, and two pictures. The same
    command goes on with a study that was interrupted or killed, and with more --trials adds to it.
    """

    search: tuple[str, ...] = ()
    """Fields and their values: field=a,b,c, field=low:high, or field=log:low:high for a logarithmic range. Layer widths
    are 64x64."""

    trials: int | None = None
    """Trials of the whole study, those of earlier calls included; 20, and all of a grid, if left out."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe: Bayesian, where good trials lie close (Tree-structured Parzen Estimator). grid: every combination of values."""

    pruner: Literal["median", "asha", "none"] = "median"
    """Ends bad trials early: median, below the median of earlier ones at the same share of the run; asha, not in the
    better half at 20, 40, 80 % (asynchronous successive halving)."""

    seeds: int = 1
    """Runs of each trial, with seeds --seed, --seed + 1, …; their mean is what is maximised."""

    jobs: int = 1
    """Trials at a time, a process each."""

    study: str = ""
    """Folder of the study; runs/tune-<environment or algorithm> if empty."""

    def __post_init__(self) -> None:
        for name, value in (("trials", self.trials), ("seeds", self.seeds), ("jobs", self.jobs)):
            if value is not None and not 1 <= value <= 10**6:
                raise UserError(f"--{name}: expected an integer >= 1 and <= 1000000, got {value}")


@contextlib.contextmanager
def optuna_quietly() -> Iterator[Any]:
    """Optuna without its log and its warnings of experimental features; `UserError` where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UserError('optuna is not installed: pip install "ppo_fast[tune]"') from None
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield optuna
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distribution(optuna: Any, dim: Dimension) -> Any:
    if dim.choices:
        return optuna.distributions.CategoricalDistribution(dim.choices)
    kind = optuna.distributions.IntDistribution if dim.kind is int else optuna.distributions.FloatDistribution
    return kind(dim.low, dim.high, log=dim.log)


def _identity(base: RunFields, space: list[Dimension], seeds: int) -> dict[str, Any]:
    """What a study is about; one that goes on must not change it."""
    fields = {k: v for k, v in base.to_dict().items() if k not in base.FREE_ON_RESUME}
    search = {f"--search {d.name}": d.text for d in space}
    return {
        "trainer": base.kind,
        **{k: fields[k] for k in fields if f"--search {k}" not in search},
        **search,
        "seeds": seeds,
    }


def _check_file(path: Path) -> None:
    """`UserError` where a file is there that Optuna did not make, before Optuna changes it."""
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
    except sqlite3.Error as error:
        raise UserError(f"--study: expected a study in {path}, got another file ({one_line(error)})") from None
    if tables and "studies" not in tables:
        raise UserError(f"--study: expected a study in {path}, got a database of something else")


class Study:
    """Optuna's study in a folder, and what is written beside it."""

    def __init__(self, optuna: Any, config: TuneConfig, base: RunFields, space: list[Dimension], run: RunDir) -> None:
        self.optuna, self.config, self.base, self.space, self.run = optuna, config, base, space, run
        self.names = [d.name for d in space]
        self.distributions = {d.name: _distribution(optuna, d) for d in space}
        path = run.path / "study.db"
        _check_file(path)
        try:
            self.storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            self.study = optuna.create_study(
                study_name=NAME, storage=self.storage, direction="maximize", load_if_exists=True, pruner=self._pruner()
            )
            self._check_identity(path)
        except UserError:
            raise
        except Exception as error:  # whatever SQLAlchemy makes of a damaged file
            raise UserError(f"--study: expected a study in {path}, got a damaged one ({one_line(error)})") from None
        self.study.sampler = self._sampler()
        self._requeue([t for t in self.study.trials if t.state == optuna.trial.TrialState.RUNNING])
        if config.sampler == "grid":
            for values in itertools.product(*(d.choices for d in space)):
                self.study.enqueue_trial(dict(zip(self.names, values, strict=True)), skip_if_exists=True)

    def _sampler(self) -> Any:
        samplers, seed = self.optuna.samplers, self.base.seed + len(self.study.trials)  # type: ignore[attr-defined]
        seed %= 2**32  # with the trials that are there: else one that goes on would draw the first ones again
        if self.config.sampler == "tpe":
            return samplers.TPESampler(seed=seed, constant_liar=self.config.jobs > 1)
        return samplers.RandomSampler(seed=seed)

    def _pruner(self) -> Any:
        pruners = self.optuna.pruners
        if self.config.pruner == "median":
            return pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=worker.POINTS // 4)
        if self.config.pruner == "asha":
            return pruners.SuccessiveHalvingPruner(min_resource=worker.POINTS // 5, reduction_factor=2)
        return pruners.NopPruner()

    def _check_identity(self, path: Path) -> None:
        new = json.loads(json.dumps(_identity(self.base, self.space, self.config.seeds)))
        old = self.study.user_attrs.get(NAME)
        if old is None:
            if self.study.trials:
                raise UserError(f"--study: expected a study of ppo-fast tune in {path}, got one of something else")
            self.study.set_user_attr(NAME, new)
        elif old != new:
            keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            if "trainer" in keys:
                keys = ["trainer"]
            changed = "; ".join(f"{k}: {old.get(k, 'none')} -> {new.get(k, 'none')}" for k in keys)
            raise UserError(
                f"--study: {self.run.path} holds a study of something else ({changed}); give the flags that it was "
                "started with, or another --study"
            )

    # Trials.

    def _requeue(self, trials: list[Any]) -> None:
        """Ends trials that nobody runs any more, and has their values tried again before new ones."""
        for t in trials:
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(
                self.storage.get_study_id_from_name(NAME), t.number
            )
            self.storage.set_trial_user_attr(trial_id, "interrupted", True)
            self.study.tell(t.number, state=self.optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(t.params)

    def interrupt(self, numbers: list[int]) -> None:
        self._requeue([t for t in self.study.trials if t.number in numbers])

    @property
    def trials(self) -> list[Any]:
        """Those that came to an end of their own, best first; then pruned, then failed ones."""
        states = self.optuna.trial.TrialState
        order = {states.COMPLETE: 0, states.PRUNED: 1, states.FAIL: 2}
        ended = [t for t in self.study.trials if t.state in order and "interrupted" not in t.user_attrs]
        return sorted(ended, key=lambda t: (order[t.state], -value_of(t), t.number))

    @property
    def best(self) -> Any:
        """The best trial; None before one was completed."""
        trials = self.trials
        return trials[0] if trials and trials[0].state == self.optuna.trial.TrialState.COMPLETE else None

    @property
    def wanted(self) -> int:
        """Trials of the whole study."""
        if self.config.sampler != "grid":
            return self.config.trials or 20
        size = math.prod(len(d.choices) for d in self.space)
        return min(self.config.trials or size, size)

    def field_values(self, params: dict[str, Value]) -> dict[str, Any]:
        return {d.name: d.field_value(params[d.name]) for d in self.space}

    def configs(self, trial: Any) -> list[RunFields]:
        """What a trial trains; `UserError` where its values do not fit together."""
        base: Any = self.base
        quiet = {"tensorboard": False, "plot": False, "progress": False, "checkpoint_seconds": 1e9}
        folder = self.run.path / ".trials" / str(trial.number)
        return [
            dataclasses.replace(
                base, **{**quiet, **self.field_values(trial.params)}, seed=base.seed + i, run_dir=str(folder / str(i))
            )
            for i in range(self.config.seeds)
        ]

    # What people look at.

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "trial": t.number,
                "state": {"FAIL": "failed"}.get(t.state.name, t.state.name.lower()),
                worker.objective(self.base): value_of(t),
                **{name: t.params.get(name) for name in self.names},
                "seconds": t.user_attrs.get("seconds", math.nan),
                "error": t.user_attrs.get("error", ""),
            }
            for t in self.trials
        ]

    def write(self) -> None:
        """trials.csv and best.json, after every trial."""
        rows, out = self.rows(), io.StringIO()
        if rows:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
            self.run.write("trials.csv", out.getvalue().encode())
        if self.best is not None:
            base: Any = self.base
            best = dataclasses.replace(base, **self.field_values(self.best.params))
            self.run.write("best.json", best.dumps().encode())


def value_of(trial: Any) -> float:
    """The objective; of a pruned trial the last intermediate value."""
    if trial.value is not None:
        return float(trial.value)
    return float(trial.intermediate_values[max(trial.intermediate_values)]) if trial.intermediate_values else -math.inf
