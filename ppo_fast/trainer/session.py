"""A trainer in its folder: logs, checkpoints, resuming, and Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from . import checkpoint
from .distributed import ALONE, Ranks
from .errors import UserError, one_line
from .fields import RunFields
from .report import EPISODE_COLUMNS, TensorBoard, draw_curve, read_episodes, tensorboard_scalars
from .rundir import CHECKPOINT, CONFIG, CsvLog, GrowingLog, RunDir

#: Gets the row of progress.csv of an iteration; ends the run by what it raises.
OnIteration = Callable[[dict[str, Any]], None]


class Interrupt:
    """Ctrl-C asks for a stop at the end of the iteration, where a checkpoint is exact; a second one stops at once.

    With several `ranks` both Ctrl-C and the SIGTERM that torchrun or a cluster passes on ask for it, any number of them:
    one rank alone cannot stop at once, and who is not done in 30 s is killed by torchrun.
    """

    def __init__(self, console: Console, ranks: Ranks = ALONE) -> None:
        self.console, self.ranks, self.requested = console, ranks, False
        self._signals = [signal.SIGINT] if ranks.alone else [signal.SIGINT, signal.SIGTERM]
        self._previous: dict[Any, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        if self.requested:
            if self.ranks.alone:
                raise KeyboardInterrupt
            return
        self.requested = True
        again = "Ctrl-C again stops at once, at the last checkpoint" if self.ranks.alone else "all ranks together"
        self.console.print(f"stopping after this iteration; {again}")


def resume_command(path: Path, command: str = "control") -> str:
    return f"ppo-fast train {command} --run-dir {shlex.quote(str(path))} --resume"


def load_checkpoint(config: RunFields) -> dict[str, Any] | None:
    """The state to resume from, if there is one; `UserError` where it belongs to another configuration."""
    path = config.folder / CHECKPOINT
    if not config.resume or not path.exists():
        return None
    state = checkpoint.load(path, config.kind)
    if not isinstance(state.get("config"), dict):
        raise UserError(f"{path}: expected a checkpoint with its configuration, got none")
    changed = config.from_dict(state["config"], str(path)).differences(config)
    if changed:
        raise UserError(
            f"--resume: expected the configuration that {config.folder} was started with, got {'; '.join(changed)}"
        )
    return state


def iterations_of(state: dict[str, Any] | None) -> int | None:
    """How far a checkpoint is; None without one, or in one that will not load."""
    now = (state or {}).get("now")
    return now.get("iteration") if isinstance(now, dict) else None


def need_packages(config: RunFields, extra: str) -> None:
    """`UserError` where a package that the configuration asks for is not here."""
    for package, wanted, without in (
        ("tensorboard", config.tensorboard, "--no-tensorboard"),
        ("matplotlib", config.plot, "--no-plot"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f'{package} is not installed: pip install "ppo_fast[{extra}]", or go without by {without}')


def announce(
    run: RunDir, config: RunFields, state: dict[str, Any] | None, say: Callable[[str], None], command: str
) -> None:
    """What a person should know of the folder before anything happens in it."""
    if run.taken is not None:
        say(f"{run.taken} is taken and stays as it is; this run goes to {run.path}")
        if (run.taken / CHECKPOINT).exists():
            say(f"(the one in {run.taken} continues with: {resume_command(run.taken, command)})")
    if config.resume and state is None:
        say(f"no checkpoint in {run.path} yet: starting from the beginning")


class Session:
    """Everything a run writes. `state` is the checkpoint to go on from, `say` prints a line."""

    unit = "step"

    def __init__(self, trainer: Any, run: RunDir, state: dict[str, Any] | None, say: Callable[[str], None]) -> None:
        self.trainer, self.config, self.run, self.say = trainer, trainer.config, run, say
        if state is None:
            offsets: dict[str, int] = {}
            run.write(CONFIG, self.config.dumps().encode())  # first, as it marks the folder as ours
        else:
            offsets = self._restore(state)
        self._saved_at, self._saved_step = time.perf_counter(), self.step
        self.board: TensorBoard | None = None
        with contextlib.ExitStack() as logs:  # what is open when a later one fails gets closed
            self.logs = self._open(offsets, logs)
            if self.config.tensorboard:
                self.board = TensorBoard(run.path / "tensorboard", self._saved_step)
                logs.callback(self.board.close)
            self._logs = logs.pop_all()

    @property
    def step(self) -> int:
        return self.trainer.now.global_step

    def _open(self, offsets: dict[str, int], stack: contextlib.ExitStack) -> dict[str, GrowingLog]:
        """The logs by name, each at its offset; what a checkpoint does not know starts empty."""
        self.episodes = CsvLog(self.run.path / "episodes.csv", EPISODE_COLUMNS, offsets.get("episodes", 0))
        stack.callback(self.episodes.close)
        self.progress = CsvLog(self.run.path / "progress.csv", self.trainer.COLUMNS, offsets.get("progress", 0))
        stack.callback(self.progress.close)
        return {"episodes": self.episodes, "progress": self.progress}

    def _restore(self, state: dict[str, Any]) -> dict[str, int]:
        path = self.run.path / CHECKPOINT
        try:
            exact = self.trainer.load_state_dict(state)
            offsets = {name: int(offset) for name, offset in state["logs"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise UserError(
                f"{path}: expected a checkpoint of this run, got one that does not fit ({one_line(error)})"
            ) from error
        if not exact:
            self.say(
                f"warning: {self.config.env_id} is not deterministic: its episodes did not replay to the same "
                "observations; the run goes on from the replayed ones and is not an exact continuation"
            )
        self.say(f"resuming {self.run.path} at {self.unit} {self.step:,}")
        return offsets

    def log(self, episodes: Any, row: dict[str, Any]) -> None:
        self.episodes.rows(episodes)
        self.progress.rows([row.values()])
        if self.board is not None:
            self.board.scalars(tensorboard_scalars(row), row["global_step"])

    def save(self) -> None:
        """Logs first: the checkpoint points into them."""
        logs = {name: log.sync() for name, log in self.logs.items()}
        if self.board is not None:
            self.board.flush()
        state = {"config": self.config.to_dict(), "logs": logs, **self.trainer.state_dict()}
        checkpoint.save(self.run.path / CHECKPOINT, state, self.config.kind)
        self._saved_at, self._saved_step = time.perf_counter(), self.step

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.perf_counter() - self._saved_at >= self.config.checkpoint_seconds

    def finish(self) -> list[tuple[str, Path]]:
        """Last checkpoint and plot; the files that a summary names."""
        if self._saved_step != self.step:
            self.save()
        files = [("checkpoint", self.run.path / CHECKPOINT), ("episodes", self.episodes.path)]
        files.append(("progress", self.progress.path))
        if self.config.plot:
            steps, returns = read_episodes(self.episodes.path)
            title = f"{self.config.env_id}, seed {self.config.seed}"
            self.run.write("curve.png", draw_curve(steps, returns, title))
            files.append(("learning curve", self.run.path / "curve.png"))
        return files

    def close(self) -> None:
        self._logs.close()
