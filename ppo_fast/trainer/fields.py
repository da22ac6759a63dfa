"""Configurations of runs: frozen dataclasses whose fields are checked, and their JSON files."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import UserError, one_line

C = TypeVar("C", bound="RunFields")

#: field -> (lowest, highest, lowest is allowed)
Bounds = dict[str, tuple[float, float, bool]]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@functools.cache
def _hints(config: Any) -> dict[str, Any]:
    return get_type_hints(config)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` for anything else."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected a readable config file, got {one_line(error)}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: expected JSON, got {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


class RunFields:
    """What the configurations of all trainers share; a subclass is a frozen dataclass with at least these fields."""

    FORMAT: ClassVar[str]
    BOUNDS: ClassVar[Bounds]
    #: Fields that change what is shown or where it is kept, never what is learned: free to differ on `--resume`.
    FREE_ON_RESUME: ClassVar = frozenset({"run_dir", "resume", "checkpoint_seconds", "tensorboard", "plot", "progress"})

    run_dir: str
    resume: bool
    device: str
    checkpoint_seconds: float
    tensorboard: bool
    plot: bool
    progress: bool

    @property
    def folder(self) -> Path:
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """What a checkpoint says it is of."""
        return self.FORMAT.partition("/")[0]

    def check_fields(self) -> None:
        """Raises `UserError` for the first field that is out of range."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            self.check_field(field.name, getattr(self, field.name))

    @classmethod
    def hint(cls, name: str) -> Any:
        """The type of a field."""
        config: Any = cls
        return _hints(config)[name]

    @classmethod
    def check_field(cls, name: str, value: Any) -> None:
        """Raises `UserError` where the field may not have this value."""
        hint = cls.hint(name)
        if name in cls.BOUNDS:
            if value is not None or type(None) not in get_args(hint):
                cls._check_number(name, value, int if hint is int or int in get_args(hint) else float)
        else:
            _check_choice(name, value, hint)

    @classmethod
    def _check_number(cls, name: str, value: Any, kind: type) -> None:
        low, high, closed = cls.BOUNDS[name]
        expected = _range(low, high, closed, "integer" if kind is int else "number")
        right_type = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not right_type or not math.isfinite(value):
            raise UserError(f"{flag(name)}: expected {expected}, got {value!r}")
        if value < low or value > high or (value == low and not closed):
            raise UserError(f"{flag(name)}: expected {expected}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and for checkpoints."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls: type[C], fields: dict[str, Any], source: str) -> C:
        """The inverse of `to_dict`; `source` names the file in messages."""
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(fields) - known)
        if unknown:
            raise UserError(f"{source}: expected fields of {cls.__name__}, got {', '.join(map(repr, unknown))}")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def dumps(self) -> str:
        """The config file of a run: everything but where it was kept."""
        fields = {name: value for name, value in self.to_dict().items() if name not in ("run_dir", "resume")}
        return json.dumps({"format": self.FORMAT, **fields}, indent=2) + "\n"

    @classmethod
    def load_fields(cls, path: Path) -> dict[str, Any]:
        """The fields that a config file sets; it may leave out any."""
        fields = read_json(path)
        written = fields.pop("format", cls.FORMAT)
        if written != cls.FORMAT:
            raise UserError(f"{path}: expected format {cls.FORMAT!r}, got {written!r}")
        return fields

    def differences(self: C, new: C) -> list[str]:
        """What a resumed run may not change, as "--flag: before -> now"."""
        return [
            f"{flag(f.name)}: {getattr(self, f.name)} -> {getattr(new, f.name)}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.name not in self.FREE_ON_RESUME and getattr(self, f.name) != getattr(new, f.name)
        ]


def _range(low: float, high: float, closed: bool, kind: str) -> str:
    if low == -math.inf:
        return f"a finite {kind}"
    lower = f"{'>=' if closed else '>'} {low:g}"
    article = "an" if kind == "integer" else "a finite"
    return f"{article} {kind} {lower}" + (f" and <= {high:g}" if math.isfinite(high) else "")


def _check_choice(name: str, value: Any, hint: Any) -> None:
    """Everything that is not a number: text, switches, choices, layer widths."""
    if get_origin(hint) is tuple:
        ok = isinstance(value, tuple) and len(value) <= 16
        ok = ok and all(isinstance(v, int) and not isinstance(v, bool) and 1 <= v <= 2**16 for v in value)
        expected = "at most 16 integers in [1, 65536]"
    elif hint is bool:
        ok, expected = isinstance(value, bool), "true or false"
    elif hint is str:
        ok, expected = isinstance(value, str), "text"
    else:
        assert get_origin(hint) is Literal, f"{name} has no bounds"
        ok, expected = value in get_args(hint), "one of " + ", ".join(map(str, get_args(hint)))
    if not ok:
        raise UserError(f"{flag(name)}: expected {expected}, got {value!r}")
