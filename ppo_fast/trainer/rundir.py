"""The folder of a run: who owns it, and logs that a resumed run continues exactly where its checkpoint stood."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import UserError, one_line
from .fields import RunFields

CHECKPOINT = "checkpoint.pt"
CONFIG = "config.json"
LOCK = ".lock"


class RunDir:
    """A claimed folder. `taken` is the folder that was asked for where another one had to be used."""

    def __init__(self, path: Path, taken: Path | None = None, flag: str = "--run-dir") -> None:
        self.path, self.taken = path, taken
        self._lock = _lock(path, flag)

    def write(self, name: str, data: bytes) -> None:
        checkpoint.write_atomic(self.path / name, data)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)  # closing gives the lock back; the file stays, or two processes could lock two files


def _lock(path: Path, flag: str) -> int:
    """Two processes in one folder would mix their logs: the second one is refused."""
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks, no protection
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UserError(f"{flag}: {path} is in use by another running process") from None
    return handle


def _create(path: Path) -> bool:
    """Makes the folder ours; False where it already holds something."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True)
        return not any(path.iterdir())
    except OSError as error:
        raise UserError(f"--run-dir: expected a folder that can be written, got {path} ({one_line(error)})") from None


def claim(config: RunFields) -> RunDir:
    """The folder to work in: with `resume` the one that was named, else it or the first free path-2, path-3, …"""
    wanted = config.folder
    if config.resume:
        _create(wanted)
        with _writable(wanted):
            checkpoint.remove_leftovers(wanted)
            _check_resumable(wanted, config)
            return RunDir(wanted)
    path, number = wanted, 1
    while not _create(path):
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    with _writable(path):
        return RunDir(path, None if number == 1 else wanted)


def _check_resumable(path: Path, config: RunFields) -> None:
    """Without a checkpoint a resumed run starts over: only where that overwrites nothing but an earlier start of ours."""
    names = {p.name for p in path.iterdir()} - {LOCK}
    if not names or CHECKPOINT in names:
        return
    if CONFIG not in names:
        raise UserError(f"--resume: expected the folder of a run, got {path}, which holds something else")
    config.load_fields(path / CONFIG)


@contextlib.contextmanager
def _writable(path: Path):
    try:
        yield
    except OSError as error:
        raise UserError(f"--run-dir: {path} cannot be written ({one_line(error)})") from None


class GrowingLog:
    """A file of lines that grows. `offset` goes into the checkpoint; reopening at it drops what was written after."""

    def __init__(self, path: Path, offset: int = 0, head: str = "") -> None:
        self.path = path
        if offset:
            size = path.stat().st_size if path.exists() else 0
            if size < offset:
                raise UserError(f"{path}: expected the {offset} bytes that the checkpoint counts on, got {size}")
        self._file = open(path, "r+b" if offset else "wb")  # noqa: SIM115  (closed by `close`)
        self._file.truncate(offset)
        self._file.seek(offset)
        if not offset:
            self.write(head)

    def write(self, text: str) -> None:
        self._file.write(text.encode())

    def sync(self) -> int:
        """Everything on disk; the offset that a checkpoint may refer to."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


class CsvLog(GrowingLog):
    """Rows of numbers and words."""

    def __init__(self, path: Path, columns: Iterable[str], offset: int = 0) -> None:
        super().__init__(path, offset, ",".join(columns) + "\n")

    def rows(self, rows: Iterable[Iterable[Any]]) -> None:
        self.write("".join(",".join(map(_cell, row)) + "\n" for row in rows))


def _cell(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else str(value)
