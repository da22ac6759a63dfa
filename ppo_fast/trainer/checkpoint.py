"""Files that are whole or absent, and checkpoints that hold nothing but data.

A file is written beside its place, flushed to disk, and renamed over the old one, so a kill at any moment leaves either
the old file or the new one. Checkpoints load with `torch.load(weights_only=True)`: tensors, numbers, text and
containers of them; nothing in a checkpoint can run.
"""

from __future__ import annotations

import io
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import UserError, one_line
from .sharding import full

FORMAT = "ppo_fast.control"
VERSION = 2


def write_atomic(path: Path, data: bytes) -> None:
    """`data` as the whole content of `path`, on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is a change of the folder; Windows cannot open one
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Temporary files of a process that was killed while writing."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def on_host(state: Any, keep: bool = True) -> Any:
    """A copy of plain data whose tensors lie in host memory, so that any machine can load it.

    Sharded tensors are gathered, one after the other, in which all ranks take part; who does not `keep` them gets None.
    """
    if isinstance(state, dict):
        return {key: on_host(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(on_host(value, keep) for value in state)
    if not isinstance(state, torch.Tensor):
        return state
    whole = full(state)
    return whole.detach().to("cpu", copy=True) if keep else None


def save(path: Path, state: dict[str, Any], kind: str = FORMAT) -> None:
    buffer = io.BytesIO()  # torch's own file writer turns a full disk into an obscure RuntimeError
    torch.save({"format": kind, "version": VERSION, **state}, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path, kind: str = FORMAT) -> dict[str, Any]:
    """The state that `save` wrote, of the same kind; `UserError` for anything else."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected a readable checkpoint, got {one_line(error)}") from None
    try:
        # weights are stored uncompressed: only the checksums of the archive notice a flipped bit
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # whatever a damaged or foreign file provokes in zipfile, pickle or torch means the same to the user
        what = one_line(error)
        raise UserError(f"{path}: expected a checkpoint of ppo_fast, got a damaged or foreign file ({what})") from None
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != kind:
        raise UserError(f"{path}: expected a checkpoint of format {kind!r}, got {found!r}")
    if state.get("version") != VERSION:
        raise UserError(f"{path}: expected checkpoint version {VERSION}, got {state.get('version')!r}")
    return state


def global_rng_state() -> dict[str, Any]:
    """Python's, numpy's and torch's global generators: the trainer has its own, but an environment may use these."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }


def set_global_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
