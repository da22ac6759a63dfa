"""The command line: `ppo-fast train control`, `ppo-fast train language`, the same with `ppo-fast ray`, `ppo-fast bench`,
`ppo-fast doctor`.

Each command imports what it needs when it runs, so that help comes at once. Exit codes: 0 done, 2 wrong input (one line
says what was expected and what came; PPO_FAST_DEBUG=1 shows where, for those who debug their own environment), 130
interrupted.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PROG = "ppo-fast"
Command = Callable[[Sequence[str]], int]


class UsageError(Exception):
    """A command line that cannot be understood."""


def _option(args: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, the last one; where defaults depend on it, before real parsing."""
    value = None
    for i, arg in enumerate(args):
        head, equals, tail = arg.partition("=")
        if head.replace("_", "-") != name:
            continue
        if equals:
            value = tail
        elif i + 1 < len(args):
            value = args[i + 1]
    return value


def _parse(kind: Any, args: Sequence[str], prog: str, default: Any, **options: Any) -> Any:
    """The dataclass `kind` from flags; tyro's boxed complaint becomes one line."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, prog=prog, args=list(args), default=default, **options)
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        lines = [line.strip("│ ") for line in complaint.getvalue().splitlines()]
        said = [line for line in lines if any(map(str.isalnum, line))]
        for end, line in enumerate(said):
            if line.startswith(("Argument helptext", "For full helptext")):
                said = said[:end]
                break
        raise UsageError(f"{' '.join(said)} ({prog} --help explains every flag)") from None


def _parse_groups(args: Sequence[str], prog: str, doc: str | None, groups: dict[str, Any]) -> dict[str, Any]:
    """Several dataclasses, each by its default, from one set of flags; each is a group of the help."""
    import dataclasses

    import tyro

    fields: list[Any] = [(name, type(value), dataclasses.field(default=value)) for name, value in groups.items()]
    kind: Any = dataclasses.make_dataclass("groups", fields, frozen=True)
    kind.__doc__ = doc
    flat: Any = tyro.conf.OmitArgPrefixes
    parsed = _parse(flat[kind], _without_config(args), prog, kind())
    return {name: getattr(parsed, name) for name in groups}


def _file(args: Sequence[str]) -> Path | None:
    """The config file to start from: --config FILE, else that of the run to resume."""
    run_dir, file = _option(args, "--run-dir"), _option(args, "--config")
    if file is None and "--resume" in args and run_dir is not None and (Path(run_dir) / "config.json").exists():
        file = str(Path(run_dir) / "config.json")
    return None if file is None else Path(file)


def _algorithms() -> dict[str, tuple[Any, dict[str, dict[str, Any]]]]:
    """What --algorithm of `train control` stands for: configuration and presets."""
    from .trainer import ddpg_config, presets
    from .trainer.config import ControlConfig

    return {"ppo": (ControlConfig, presets.PRESETS), "ddpg": (ddpg_config.DDPGConfig, ddpg_config.PRESETS)}


def _defaults(args: Sequence[str]) -> Any:
    """What flags are laid over: preset, then --config FILE or the config of the run to resume."""
    from .trainer.fields import read_json

    file, algorithms = _file(args), _algorithms()
    algorithm = (
        _option(args, "--algorithm") or (read_json(file).get("algorithm") if file is not None else None) or "ppo"
    )
    if algorithm not in algorithms:
        raise UsageError(f"--algorithm: expected one of {', '.join(algorithms)}, got {algorithm}")
    kind, presets = algorithms[algorithm]
    fields = kind.load_fields(file) if file is not None else {}
    env_id = _option(args, "--env-id") or fields.get("env_id", kind.env_id)
    if not isinstance(env_id, str):
        raise UsageError(f"{file}: expected env_id to be text, got {env_id!r}")
    if env_id != fields.get("env_id", env_id):
        raise UsageError(f"--env-id: expected {fields['env_id']} as in {file}, got {env_id}")
    return kind.from_dict({**presets.get(env_id, {}), **fields, "env_id": env_id}, str(file or "preset"))


def _without_config(args: Sequence[str]) -> list[str]:
    """The arguments less `--config FILE`, which is not a field of the configuration."""
    kept, skip = [], False
    for arg in args:
        if skip:
            skip = False
        elif arg == "--config":
            skip = True
        elif not arg.startswith("--config="):
            kept.append(arg)
    return kept


def _control_config(args: Sequence[str]) -> Any:
    default = _defaults(args)
    return _parse(type(default), _without_config(args), f"{PROG} train control", default)


def train_control(args: Sequence[str]) -> int:
    """Train PPO, or DDPG, on a gymnasium environment."""
    config = _control_config(args)
    from .trainer import control, ddpg

    train = control.train if config.algorithm == "ppo" else ddpg.train
    return 0 if train(config).finished else 130


def _language(args: Sequence[str], prog: str, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration, and what `more` groups of flags say."""
    import dataclasses

    from .trainer.language.config import GROUPS, LanguageConfig

    file = _file(args)
    default = LanguageConfig.from_dict({} if file is None else LanguageConfig.load_fields(file), str(file))
    # one flat configuration, whose help comes in the groups that it is made of
    groups = {}
    for group in GROUPS:
        values = {field.name: getattr(default, field.name) for field in dataclasses.fields(group)}
        groups[group.__name__.removesuffix("Fields").lower()] = group(**values)
    parsed = _parse_groups(args, prog, LanguageConfig.__doc__, {**groups, **more})
    fields = {k: v for name in groups for k, v in vars(parsed[name]).items()}
    return LanguageConfig(**fields), {name: parsed[name] for name in more}


def _language_config(args: Sequence[str]) -> Any:
    return _language(args, f"{PROG} train language", {})[0]


def train_language(args: Sequence[str]) -> int:
    """Train a causal language model with PPO, GRPO and their kin."""
    config = _language_config(args)
    from .trainer.language.run import train

    return 0 if train(config).finished else 130


def _tune(args: Sequence[str], trainer: str, parse: Callable[[Sequence[str]], Any]) -> int:
    from .tune import TuneConfig, run

    prog = f"{PROG} tune {trainer}"
    config, rest = _parse(TuneConfig, args, prog, TuneConfig(), return_unknown_args=True)
    for name in ("--run-dir", "--resume"):
        if any(arg.partition("=")[0].replace("_", "-") == name for arg in rest):
            raise UsageError(f"{name}: expected --study FOLDER, where a study goes on by itself, got {name}")
    return run(config, parse(rest))


def tune_control(args: Sequence[str]) -> int:
    """Search hyperparameters of train control."""
    return _tune(args, "control", _control_config)


def tune_language(args: Sequence[str]) -> int:
    """Search hyperparameters of train language."""
    return _tune(args, "language", _language_config)


def plot(args: Sequence[str]) -> int:
    """Draw the learning curves of several runs in one picture."""
    from .trainer.plot import PlotConfig, run

    return run(_parse(PlotConfig, args, f"{PROG} plot", PlotConfig()))


def ray_control(args: Sequence[str]) -> int:
    """Train on a gymnasium environment with a Ray cluster: rollout workers for one learner, or several ranks."""
    from .trainer import ray
    from .trainer.config import ControlConfig

    groups = {"ray": ray.RayOptions(), "control": _defaults(args)}
    parsed = _parse_groups(args, f"{PROG} ray control", ControlConfig.__doc__, groups)
    return ray.run(parsed["control"], parsed["ray"])


def ray_language(args: Sequence[str]) -> int:
    """Train a causal language model on the ranks of a Ray cluster."""
    from .trainer import ray

    config, parsed = _language(args, f"{PROG} ray language", {"ray": ray.RayOptions()})
    return ray.run(config, parsed["ray"])


def bench(args: Sequence[str]) -> int:
    """Measure ops and trainers against their peers."""
    try:
        from .bench.main import BenchConfig, run
    except ImportError as error:
        raise UsageError(
            f'bench: expected the benchmark and its packages, pip install "ppo_fast[bench]" ({error})'
        ) from None
    try:
        config = _parse(BenchConfig, args, f"{PROG} bench", BenchConfig())
    except ValueError as error:  # what its __post_init__ says
        raise UsageError(f"bench: {error}") from None
    return int(run(config) or 0)


def doctor(args: Sequence[str]) -> int:
    """Say what works on this machine, and why something does not."""
    if any(arg in ("-h", "--help") for arg in args):
        print(f"usage: {PROG} doctor\n\n{doctor.__doc__}")
        return 0
    if args:
        raise UsageError(f"doctor: expected no arguments, got {' '.join(args)}")
    import platform

    import torch

    import ppo_fast

    print(f"python     {platform.python_version()} on {platform.platform()}")
    for package in ("ppo_fast", "torch", "numpy", "gymnasium", "mujoco", "triton", "jax", "optuna", "ray"):
        try:
            print(f"{package:<10} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:<10} not installed")
    print(f"threads    {torch.get_num_threads()} of torch")
    print(f"device     {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU only'}\n")
    print(ppo_fast.explain())
    return 0


COMMANDS: dict[tuple[str, ...], Command] = {
    ("train", "control"): train_control,
    ("train", "language"): train_language,
    ("tune", "control"): tune_control,
    ("tune", "language"): tune_language,
    ("plot",): plot,
    ("ray", "control"): ray_control,
    ("ray", "language"): ray_language,
    ("bench",): bench,
    ("doctor",): doctor,
}


def _usage(prefix: tuple[str, ...] = ()) -> str:
    rows = [(" ".join(words), command.__doc__) for words, command in COMMANDS.items() if words[: len(prefix)] == prefix]
    width = max(len(name) for name, _ in rows)
    lines = [f"usage: {' '.join((PROG, *prefix))} COMMAND [--flags]", ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in rows]
    return "\n".join([*lines, "", f"{PROG} COMMAND --help explains every flag."])


def _dispatch(args: Sequence[str]) -> int:
    for words, command in COMMANDS.items():
        if tuple(args[: len(words)]) == words:
            return command(args[len(words) :])
    words = tuple(arg for arg in args if not arg.startswith("-"))
    asks_help = not args or args[-1] in ("-h", "--help")
    prefix = words if any(known[: len(words)] == words for known in COMMANDS) else None
    if prefix is not None and asks_help:
        print(_usage(prefix))
        return 0
    expected = ", ".join(" ".join(known) for known in COMMANDS)
    raise UsageError(f"COMMAND: expected one of {expected}; got {' '.join(args)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    from .trainer.errors import UserError

    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except (UserError, UsageError) as error:
        if os.environ.get("PPO_FAST_DEBUG"):
            raise
        speaks = getattr(error, "speaks", None)
        if os.environ.get("RANK", "0") == "0" if speaks is None else speaks:
            print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in ("gymnasium", "rich", "tyro", "transformers", "tokenizers"):
            raise
        extra = "language" if list(argv or sys.argv[1:])[1:2] == ["language"] else "control"
        print(f'{PROG}: error: {error.name} is not installed: pip install "ppo_fast[{extra}]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output, `head` for one, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
        return 141


if __name__ == "__main__":
    sys.exit(main())
