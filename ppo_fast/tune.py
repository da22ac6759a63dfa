"""`ppo-fast tune`: searches the fields of a trainer's configuration with Optuna.

This process alone writes the study: samplers and pruners run here, every trial trains in a process of its own
(`trainer.trial`) and reports through a pipe. A trial that fails is a row of the table; one that was interrupted, or whose
study was killed, is run again when the study goes on.
"""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import shutil
import time
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from .trainer import trial as worker
from .trainer.errors import UserError, one_line
from .trainer.rundir import LOCK, RunDir
from .trainer.search import parse
from .trainer.study import Study, TuneConfig, optuna_quietly, value_of

__all__ = ["TuneConfig", "run"]

SHOWN = 10  # trials in the closing table


@dataclass
class Running:
    trial: Any
    process: Any
    started: float
    report: tuple[int, float] = (0, float("nan"))  # the latest: point, value


class Pool:
    """Trials side by side."""

    def __init__(self, study: Study, say: Any, status: Any) -> None:
        self.study, self.say, self.status = study, say, status
        methods = multiprocessing.get_all_start_methods()
        # never fork: torch's threads do not survive it
        self.context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            language = study.base.kind == "ppo_fast.language"
            self.context.set_forkserver_preload([f"ppo_fast.trainer.{'language.run' if language else 'ddpg'}"])
        self.running: dict[Any, Running] = {}

    def run(self) -> bool:
        """Until the study has its trials; False if interrupted."""
        study = self.study
        try:
            while True:
                while len(self.running) < study.config.jobs and len(study.trials) + len(self.running) < study.wanted:
                    self._start()
                if not self.running:
                    return True
                for ready in connection.wait(list(self.running)):
                    self._hear(ready)
        except KeyboardInterrupt:
            study.interrupt([r.trial.number for r in self.running.values()])
            return False
        finally:
            self._stop()

    def _start(self) -> None:
        trial = self.study.study.ask(self.study.distributions)
        try:
            configs = self.study.configs(trial)
        except UserError as error:
            self._end(Running(trial, None, time.perf_counter()), error=str(error))
            return
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=worker.run, args=(theirs, configs))
        process.start()
        theirs.close()
        self.running[ours] = Running(trial, process, time.perf_counter())

    def _hear(self, ready: Any) -> None:
        """One message of a trial, or its end."""
        running = self.running[ready]
        trial = running.trial
        try:
            kind, *content = ready.recv()
            if kind == "report":
                running.report = step, value = content[0], content[1]
                trial.report(value, step)
                ready.send(not trial.should_prune())
                return self._show()
        except (EOFError, OSError):
            running.process.join()
            kind, content = "failed", [f"its process ended with exit code {running.process.exitcode}"]
        del self.running[ready]
        ready.close()
        running.process.join()
        if kind == "done":
            self._end(running, values=content[0])
        elif kind == "pruned":
            self._end(running)
        else:
            self._end(running, error=content[0])

    def _show(self) -> None:
        points = worker.POINTS * self.study.config.seeds
        reports = [(r.trial.number, *r.report) for r in self.running.values()]
        self.status.update(
            "  ".join(f"trial {n}: {100 * point // points} %, {value:.4g}" for n, point, value in reports)
        )

    def _end(self, running: Running, values: list[float] | None = None, error: str | None = None) -> None:
        study, trial, states = self.study, running.trial, self.study.optuna.trial.TrialState
        seconds = time.perf_counter() - running.started
        trial.set_user_attr("seconds", seconds)
        if values is not None:
            trial.set_user_attr("values", values)
            study.study.tell(trial, sum(values) / len(values))
        elif error is not None:
            trial.set_user_attr("error", error)
            study.study.tell(trial, state=states.FAIL)
        else:
            study.study.tell(trial, state=states.PRUNED)
        study.write()
        row = next(r for r in study.rows() if r["trial"] == trial.number)
        best = study.best
        what = f"{row[worker.objective(study.base)]:.4g}" if error is None else f"failed: {error}"
        parts = [f"trial {trial.number}, {len(study.trials)} of {study.wanted}: {what}"]
        parts += ["pruned"] if row["state"] == "pruned" else []
        parts += [f"{name} {_show(row[name])}" for name in study.names] + [f"{seconds:.0f} s"]
        parts += [] if best is None else [f"(best {value_of(best):.4g}, trial {best.number})"]
        self.say("  ".join(parts))

    def _stop(self) -> None:
        for running in self.running.values():
            running.process.terminate()
        for ready, running in self.running.items():
            running.process.join(10)
            if running.process.exitcode is None:
                running.process.kill()
                running.process.join()
            ready.close()
        self.running.clear()


def draw(study: Study) -> list[Path]:
    """Pictures: every completed trial as a line through its values, and how much each field matters."""
    if sum(r["state"] == "complete" for r in study.rows()) < 2:
        return []
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as pictures

    plt.switch_backend("Agg")  # no display
    files, target = [], worker.objective(study.base).replace("_", " ")
    drawings: dict[str, Any] = {
        "parallel.png": pictures.plot_parallel_coordinate, "importances.png": pictures.plot_param_importances
    }  # fmt: skip
    for name, plot in drawings.items():
        with plt.rc_context():  # Optuna sets a style
            try:
                axes = plot(study.study, target_name=target)
            except (ValueError, RuntimeError, ZeroDivisionError):  # no importances where all values are the same
                continue
            axes.figure.set_size_inches(2 + 2 * max(4, len(study.names)), 5)
            picture = io.BytesIO()
            axes.figure.savefig(picture, format="png", dpi=100, bbox_inches="tight")
            plt.close(axes.figure)
        study.run.write(name, picture.getvalue())
        files.append(study.run.path / name)
    return files


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(study: Study) -> Any:
    from rich.table import Table

    rows, name = study.rows(), worker.objective(study.base)
    counts = {s: sum(r["state"] == s for r in rows) for s in ("complete", "pruned", "failed")}
    title = f"{len(rows)} trials: " + ", ".join(f"{n} {s}" for s, n in counts.items())
    table = Table("trial", name.replace("_", " "), *study.names, "seconds", "state", title=title, title_justify="left")
    for row in rows[:SHOWN]:
        number = "–" if row["state"] == "failed" else _show(row[name])
        table.add_row(
            str(row["trial"]), number, *(_show(row[n]) for n in study.names), f"{row['seconds']:.1f}", row["state"]
        )
    return table


def run(config: TuneConfig, base: Any, console: Any = None) -> int:
    """Runs a study of `base`, the configuration of a trainer; 0 done, 130 interrupted. `UserError` for wrong input."""
    from rich.console import Console

    console = Console() if console is None else console

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    space = parse(config.search, base)
    if config.sampler == "grid":
        for dim in space:
            if not dim.choices:
                raise UserError(
                    f"--search {dim.name}={dim.text}: expected values a,b,c for --sampler grid, got a range"
                )
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('matplotlib is not installed: pip install "ppo_fast[tune]"')
    folder = Path(config.study) if config.study else Path("runs") / f"tune-{base.folder.name}"
    with optuna_quietly() as optuna:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "study.db").exists() and any(p.name != LOCK for p in folder.iterdir()):
                raise UserError(
                    f"--study: expected the folder of a study or a new one, got {folder}, which holds something else"
                )
            with RunDir(folder, flag="--study") as owned:
                return _run(Study(optuna, config, base, space, owned), console, say)
        except (OSError, optuna.exceptions.StorageInternalError) as error:
            raise UserError(
                f"--study: expected a folder that can be written, got {folder} ({one_line(error)})"
            ) from None


def _run(study: Study, console: Any, say: Any) -> int:
    folder, leftovers = study.run.path, study.run.path / ".trials"
    shutil.rmtree(leftovers, ignore_errors=True)  # of a study that was killed
    if study.trials:
        say(f"{folder} has {len(study.trials)} of {study.wanted} trials")
    try:
        with console.status("") as status:  # moves on a terminal only
            finished = Pool(study, say, status).run()
    finally:
        shutil.rmtree(leftovers, ignore_errors=True)
    study.write()
    pictures = draw(study)
    if study.trials:
        console.print(_table(study))
    if not finished:
        say(f"stopped after {len(study.trials)} of {study.wanted} trials; the same command goes on")
        return 130
    if study.best is None:
        errors = [r["error"] or r["state"] for r in study.rows()]
        raise UserError(
            f"--search: expected a trial that completes, got {len(study.trials)} without; the last: {errors[-1]}"
        )
    for path in (folder / "trials.csv", *pictures):
        say(str(path))
    trainer = "language" if study.base.kind == "ppo_fast.language" else "control"
    say(f"best: trial {study.best.number}; train it with: ppo-fast train {trainer} --config {folder / 'best.json'}")
    return 0
