"""What integrations are made of: attributes of a trainer, each replaced by ours, checked before and restored after."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

#: The integration that replaced (owner, attribute); an attribute has one at a time.
_taken: dict[tuple[int, str], str] = {}


@dataclass(frozen=True)
class Seam:
    """One attribute of a trainer and what stands there while its integration is enabled."""

    #: "package.module:attribute", "package.module:Class.method", or "package.module:REGISTRY[key]", an item of a dict
    where: str
    ours: Any
    #: Parameters that theirs must have, "self, x, *, y"; several where versions differ in ways that ours follows. Defaults
    #: are theirs and are not compared. Empty: the seam is not a function.
    parameters: str | tuple[str, ...] = ()
    #: Modules that take a function by name, `from module import function`: theirs is replaced too where they are loaded.
    importers: tuple[str, ...] = ()
    #: The attribute beside it that has those parameters, where it has none of its own: "forward" for an autograd function's
    #: `apply`.
    parameters_in: str = ""

    def owner(self) -> Any:
        module, _, path = self.where.partition(":")
        owner: Any = importlib.import_module(module)
        for name in _names(path)[:-1]:
            owner = getattr(owner, name)
        return owner

    @property
    def name(self) -> str:
        return _names(self.where.rpartition(":")[2])[-1]


def _names(path: str) -> list[str]:
    return path.removesuffix("]").replace("[", ".").split(".")


def attributes_of(owner: Any) -> Any:
    """What stands in the owner itself, by name; `get` sees what is inherited too."""
    return owner if isinstance(owner, dict) else vars(owner)


def get(owner: Any, name: str) -> Any:
    return owner[name] if isinstance(owner, dict) else getattr(owner, name)


def put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def require(package: str, at_least: str, below: str, extra: str = "") -> str:
    """The installed version of `package`, where it is at least `at_least` and below `below`; ImportError otherwise."""
    supported = f"{package}>={at_least},<{below}"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        hint = extra or f"pip install '{supported}'"
        raise ImportError(f"ppo_fast.integrations: {package} is not installed; {hint}") from None
    if not _release(at_least) <= _release(version) < _release(below):
        raise ImportError(
            f"ppo_fast.integrations: {supported} is supported, {version} is installed; nothing was changed"
        )
    return version


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 9, 2) of "2.9.2rc1+cpu"."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def parameters_of(function: Any) -> str:
    """Names and kinds of a function's parameters, without defaults and annotations: "self, x, *, y"."""
    signature = inspect.signature(function)
    bare = [p.replace(default=p.empty, annotation=p.empty) for p in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return text[1:-1]


class Integration:
    """`enable()`, `disable()` and `enabled()` of one trainer."""

    def __init__(self, name: str, package: str, at_least: str, below: str, seams: Sequence[Seam]) -> None:
        self.name, self.package, self.at_least, self.below = name, package, at_least, below
        self.seams = tuple(seams)
        #: (owner, attribute, what stood there in the owner itself or None where it was inherited, what stands there now)
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def __repr__(self) -> str:
        state = "enabled" if self.is_enabled else "disabled"
        return f"<integration {self.name} of {self.package}>={self.at_least},<{self.below}: {state}>"

    @property
    def is_enabled(self) -> bool:
        return bool(self._replaced)

    def check(self) -> str:
        """The installed version, after every seam was found as expected. ImportError otherwise, RuntimeError where
        another integration holds one; nothing is changed."""
        version = require(self.package, self.at_least, self.below)
        for seam in self.seams:
            try:
                owner = seam.owner()
                theirs = get(owner, seam.name)
            except (ImportError, AttributeError, KeyError) as error:
                raise ImportError(
                    f"ppo_fast.integrations.{self.name}: {self.package} {version} has no {seam.where} ({error}); "
                    "nothing was changed"
                ) from error
            other = _taken.get((id(owner), seam.name))
            if other is not None:
                raise RuntimeError(
                    f"ppo_fast.integrations.{self.name}: {seam.where} is held by ppo_fast.integrations.{other}; call its "
                    "disable() first; nothing was changed"
                )
            known = (seam.parameters,) if isinstance(seam.parameters, str) else seam.parameters
            if seam.parameters_in:
                theirs = getattr(owner, seam.parameters_in, theirs)
            if known and (found := parameters_of(theirs)) not in known:
                raise ImportError(
                    f"ppo_fast.integrations.{self.name}: {seam.where} must take ({') or ('.join(known)}), in {self.package} "
                    f"{version} it takes ({found}); nothing was changed"
                )
        return version

    def enable(self) -> None:
        """Puts our ops in place, for the whole process. A second call warns and changes nothing."""
        if self.is_enabled:
            warnings.warn(f"ppo_fast.integrations.{self.name} is enabled already; nothing was changed", stacklevel=2)
            return
        self.check()
        places = [(place, seam) for seam in self.seams for place in self._places(seam)]
        for owner, seam in places:
            self._replaced.append((owner, seam.name, attributes_of(owner).get(seam.name), seam.ours))
            _taken[id(owner), seam.name] = self.name
            put(owner, seam.name, seam.ours)
        for owner, seam in places:
            for subclass in _overriding(owner, seam):
                warnings.warn(
                    f"ppo_fast.integrations.{self.name}: {subclass.__module__}.{subclass.__qualname__} has a {seam.name} of "
                    "its own, which stays as it is",
                    stacklevel=2,
                )

    def disable(self) -> None:
        """Restores what `enable` replaced. Without it, warns."""
        if not self.is_enabled:
            warnings.warn(f"ppo_fast.integrations.{self.name} is not enabled; nothing was changed", stacklevel=2)
            return
        for seam in self.seams:  # a module that was loaded since has ours by name
            for importer in seam.importers:
                module = sys.modules.get(importer)
                if module is not None and vars(module).get(seam.name) is seam.ours:
                    known = any(owner is module and name == seam.name for owner, name, *_ in self._replaced)
                    if not known:
                        theirs = next(
                            x for owner, name, x, _ in self._replaced if owner is seam.owner() and name == seam.name
                        )
                        self._replaced.append((module, seam.name, theirs, seam.ours))
        left = []
        for owner, name, theirs, ours in reversed(self._replaced):
            _taken.pop((id(owner), name), None)
            if attributes_of(owner).get(name) is not ours:
                left.append(f"{getattr(owner, '__qualname__', getattr(owner, '__name__', 'a registry'))}.{name}")
            elif theirs is None:
                delattr(owner, name)
            else:
                put(owner, name, theirs)
        self._replaced = []
        if left:
            warnings.warn(
                f"ppo_fast.integrations.{self.name}: {', '.join(left)} was replaced by others since enable(); left as it is",
                stacklevel=2,
            )

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Enabled inside the block, and after it as before it."""
        if self.is_enabled:
            yield
            return
        self.enable()
        try:
            yield
        finally:
            if self.is_enabled:
                self.disable()

    def _places(self, seam: Seam) -> list[Any]:
        owner = seam.owner()
        theirs = get(owner, seam.name)
        importers = [sys.modules[name] for name in seam.importers if name in sys.modules]
        return [owner, *(module for module in importers if vars(module).get(seam.name) is theirs)]


def _overriding(owner: Any, seam: Seam) -> list[type]:
    """Loaded subclasses of a class whose method is a seam that define it themselves. Ours call it through `super` or not."""
    if not isinstance(owner, type):
        return []
    found: list[type] = []
    pending: list[type] = list(owner.__subclasses__())
    while pending:
        subclass = pending.pop()
        pending += subclass.__subclasses__()
        method = vars(subclass).get(seam.name)
        if method is not None and method is not seam.ours and subclass not in found:
            found.append(subclass)
    return found
