"""`train`: a run in its folder, from the start model to the last checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from .. import distributed, session
from ..device import find_device
from ..distributed import Ranks
from ..errors import UserError, one_line
from ..rundir import CsvLog, GrowingLog, RunDir
from ..session import OnIteration
from . import model, prompts, rewards
from .config import LanguageConfig
from .report import LiveProgress, draw_curve, summary
from .trainer import COLUMNS, Task, Trainer
from .warm_start import warm_start

START, RESULT = "start", "model"  # folders of models in that of a run


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    run_dir: Path
    finished: bool  # False: interrupted with Ctrl-C, after writing a checkpoint
    iteration: int
    first_eval: float  # mean greedy reward on the held-out prompts, before …
    last_eval: float  # … and after; NaN without held-out prompts
    seconds: float


class Session(session.Session):
    """Everything a run writes."""

    unit = "iteration"

    @property
    def step(self) -> int:
        return self.trainer.now.iteration

    def _open(self, offsets: dict[str, int], stack: contextlib.ExitStack) -> dict[str, GrowingLog]:
        self.progress = CsvLog(self.run.path / "progress.csv", COLUMNS, offsets.get("progress", 0))
        stack.callback(self.progress.close)
        self.rollouts = GrowingLog(self.run.path / "rollouts.jsonl", offsets.get("rollouts", 0))
        stack.callback(self.rollouts.close)
        return {"progress": self.progress, "rollouts": self.rollouts}

    def log(self, samples: Any, row: dict[str, Any]) -> None:
        self.rollouts.write("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples))
        self.progress.rows([row.values()])
        if self.board is not None:
            known = {f"language/{k}": v for k, v in row.items() if k != "iteration" and not math.isnan(v)}
            self.board.scalars(known, row["iteration"])

    def finish(self) -> list[tuple[str, Path]]:
        """Last checkpoint, model and plot; the files that a summary names."""
        self.save()
        trainer, path = self.trainer, self.run.path
        model.save(trainer.policy.causal, trainer.tokenizer, path / RESULT, trainer.weights())
        files = [("model", path / RESULT), ("checkpoint", path / "checkpoint.pt"), ("progress", self.progress.path)]
        files.append(("responses", self.rollouts.path))
        if self.config.plot:
            title = f"{self.config.algorithm}, seed {self.config.seed}"
            self.run.write("curve.png", draw_curve(self.progress.path, trainer.now.first_eval, title))
            files.append(("learning curve", path / "curve.png"))
        return files


class Follower(distributed.Follower):
    """The other ranks' part in it."""

    def finish(self) -> list[Any]:
        self.save()
        self.trainer.weights()
        return []


def train(
    config: LanguageConfig, *, console: Console | None = None, on_iteration: OnIteration | None = None
) -> TrainResult:
    """Trains as `config` says and leaves checkpoint, logs, plot and model in its folder.

    Raises `UserError` for wrong input, for a reward function that fails, and for a folder that cannot be written; what was
    written before stays whole and can be resumed. Seeds the global generators, for reward functions that draw from them.
    `on_iteration` gets the row of progress.csv of each iteration, and ends the run by what it raises.

    In a process group, of torchrun or made by the caller, every rank calls this alike: one run on all of them.
    """
    console = Console() if console is None else console
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    torch.set_num_threads(config.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with distributed.joined(config) as ranks:
            return _train(config, console if ranks.leads else Console(quiet=True), ranks, on_iteration)
    finally:
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()


def _task(config: LanguageConfig, tokenizer: Any) -> Task:
    if config.prompts:
        train = prompts.read(config.prompts, "--prompts")
        held_out = prompts.read(config.eval_prompts, "--eval-prompts") if config.eval_prompts else None
    else:
        train, held_out = prompts.additions()
        held_out = prompts.read(config.eval_prompts, "--eval-prompts") if config.eval_prompts else held_out
    longest = config.max_prompt_tokens
    return Task(
        prompts.tokenize(train, tokenizer, longest, config.prompts or "additions"),
        None
        if held_out is None
        else prompts.tokenize(held_out, tokenizer, longest, config.eval_prompts or "additions"),
        rewards.find(config.reward),
    )


def _train(config: LanguageConfig, console: Console, ranks: Ranks, on_iteration: OnIteration | None) -> TrainResult:
    session.need_packages(config, "language")
    state = session.load_checkpoint(config)
    ranks.agree("--resume: iterations in the checkpoint", session.iterations_of(state))
    device = find_device(ranks.local(config, "num_responses", config.group))
    built = not config.model or config.model.endswith(".json")

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    # before the folder, so that a mistake found here leaves no trace
    torch.manual_seed(config.seed)
    if state is not None and built:
        causal, tokenizer = model.load(config.folder / START)
    else:
        causal, tokenizer = model.build(config.model) if built else model.load(Path(config.model))
    task = _task(config, tokenizer)
    starts = state is None and built  # sharded only once it has learned to answer
    trainer = Trainer(config, causal, tokenizer, task, device, distributed.ALONE if starts else ranks)
    with ranks.claim(config) as run:
        try:
            session.announce(run, config, state, say, "language")
            if starts:
                trainer = _start(trainer, run, say, ranks)
            return _loop(trainer, run, state, console, say, on_iteration)
        except OSError as error:
            raise UserError(f"--run-dir: {run.path} cannot be written ({one_line(error)})") from error


def _start(trainer: Trainer, run: RunDir, say: Any, ranks: Ranks) -> Trainer:
    """A supervised start of a built model, without adapters, and the folder that a resumed run takes it from.

    Every rank does the same: none waits, and what is built here is small.
    """
    config = trainer.config
    if ranks.leads:
        run.write("config.json", config.dumps().encode())  # marks the folder as ours
    torch.manual_seed(config.seed)
    whole = dataclasses.replace(config, lora_rank=0, kl_coef=0.0, kl_target=None)
    first = Trainer(whole, *model.build(config.model), trainer.task, trainer.device)
    if config.warm_start_accuracy > 0:
        warm_start(first, say)
    if ranks.leads:
        model.save(first.policy.causal, first.tokenizer, run.path / START)
    ranks.gather(None)  # before it is there nobody can read it
    again = Trainer(config, *model.load(run.path / START), trainer.task, trainer.device, ranks)
    again.now.seconds["warm start"] = first.now.seconds["warm start"]
    return again


def _loop(
    trainer: Trainer,
    run: RunDir,
    state: dict[str, Any] | None,
    console: Console,
    say: Any,
    on_iteration: OnIteration | None,
) -> TrainResult:
    config, finished = trainer.config, True
    files: list[Any] = []
    ranks = trainer.ranks
    log = Session(trainer, run, state, say) if ranks.leads else Follower(trainer, state)
    with contextlib.closing(log):
        if state is None:
            log.save()  # whatever fails next, this is there to go on from
        live = LiveProgress(config, console)
        try:
            with session.Interrupt(console, ranks) as interrupt:
                while not trainer.finished:
                    samples, row = trainer.iterate()
                    log.log(samples, row)
                    live.update(trainer.now, row, samples)
                    if on_iteration is not None:
                        on_iteration(row)
                    if ranks.any(interrupt.requested):
                        log.save()
                        finished = trainer.finished
                        break
                    if ranks.any(log.due):
                        log.save()
        finally:
            live.close()
        if finished:
            files = log.finish()
    now = trainer.now
    if finished:
        console.print(summary(config, now, sum(p.numel() for p in trainer.learner.parameters), files))
    else:
        say(f"stopped at iteration {now.iteration:,}; continue with: {session.resume_command(run.path, 'language')}")
    return TrainResult(run.path, finished, now.iteration, now.first_eval, now.last_eval, now.total)
