"""Search spaces from the command line: `field=a,b,c`, `field=low:high`, `field=log:low:high`, checked against a trainer's
configuration."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from .errors import UserError
from .fields import RunFields

Value = bool | int | float | str | None


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One field: either `choices`, or a range from `low` to `high`, both included."""

    name: str
    text: str  # as it was given
    kind: type = float  # of the numbers of a range
    choices: tuple[Value, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    def field_value(self, chosen: Value) -> Any:
        """What the field gets: layer widths are chosen as text, "64x64"."""
        return widths(chosen) if isinstance(chosen, str) and self.kind is tuple else chosen


def widths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def parse(specs: Sequence[str], config: RunFields) -> list[Dimension]:
    """The space that `specs` describe; `UserError` for a field that there is not, or a value that it cannot have."""
    space: list[Dimension] = []
    for spec in specs:
        head, equals, text = spec.partition("=")
        if not equals or not text:
            raise UserError(f"--search: expected field=a,b,c, field=low:high or field=log:low:high, got {spec!r}")
        name = _field(head, config)
        if name in (d.name for d in space):
            raise UserError(f"--search: expected every field once, got {name} twice")
        try:
            space.append(_dimension(name, text, type(config)))
        except UserError as error:
            raise UserError(f"--search {spec}: {error}") from None
    if not space:
        raise UserError("--search: expected at least one field, e.g. --search learning_rate=log:1e-4:1e-2, got none")
    return space


def _field(head: str, config: RunFields) -> str:
    name = head.strip().lstrip("-").replace("-", "_")
    fixed = {*config.FREE_ON_RESUME, "seed"}
    known = [f.name for f in dataclasses.fields(config) if f.name not in fixed]  # type: ignore[arg-type]
    if name in fixed:
        raise UserError(f"--search: expected a field that changes what is learned, got {name}")
    if name not in known:
        near = difflib.get_close_matches(name.rpartition(".")[2], known, 1, 0.0)
        kind = type(config).__name__
        raise UserError(f"--search: expected a field of {kind}, got {head!r}; the nearest is {near[0]}")
    return name


def _dimension(name: str, text: str, config: type[RunFields]) -> Dimension:
    hint = config.hint(name)
    kinds = {k for k in (get_args(hint) or (hint,)) if k is not type(None)}
    log = text.startswith("log:")
    if log or (":" in text and kinds <= {int, float}):
        if not kinds <= {int, float} or get_origin(hint) is tuple:
            raise UserError(f"expected values a,b,c, as {name} is not a number")
        kind, ends = (int if kinds == {int} else float), text.removeprefix("log:").split(":")
        if len(ends) != 2:
            raise UserError("expected a range low:high or log:low:high")
        low, high = (_number(end, kind) for end in ends)
        for end in (low, high):
            config.check_field(name, end)
        if not low < high:
            raise UserError("expected low < high")
        if log and low <= 0:
            raise UserError("expected low > 0 for a logarithmic range")
        return Dimension(name, text, kind, low=low, high=high, log=log)
    choices = [_value(part.strip(), hint) for part in text.split(",")]
    for choice in choices:
        config.check_field(name, widths(choice) if get_origin(hint) is tuple else choice)
    if len(set(choices)) < len(choices) or len(choices) == 1:
        raise UserError("expected two or more different values")
    return Dimension(name, text, tuple if get_origin(hint) is tuple else type(choices[0]), tuple(choices))


def _number(text: str, kind: type) -> Any:
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"expected {'an integer' if kind is int else 'a number'}, got {text!r}") from None
    if kind is float:
        return number
    if not number.is_integer():  # also 1e5 is one
        raise UserError(f"expected an integer, got {text!r}")
    return int(number)


def _value(text: str, hint: Any) -> Any:
    """One value of a list as the field's type; layer widths stay text."""
    if get_origin(hint) is tuple:
        if not all(part.isdigit() for part in text.split("x")):
            raise UserError(f"expected layer widths such as 64x64, got {text!r}")
        return text
    if get_origin(hint) is Literal or hint is str:
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"expected true or false, got {text!r}")
        return text.lower() == "true"
    if type(None) in get_args(hint) and text.lower() == "none":
        return None
    return _number(text, int if hint is int or int in get_args(hint) else float)
