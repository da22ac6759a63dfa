"""Labels out of range: a kernel that meets one notes it in memory of the CPU, and a later call raises. Nobody waits.

csrc/cuda/memory.cuh and csrc/bind/call.h are the same for CUDA. Good labels cost a program one reduction and a branch.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _workspace

#: Arguments that hold labels, in the order of an op's slots.
_LABELS = {
    "categorical_log_prob": ("actions",),
    "multi_categorical_log_prob": ("actions",),
    "categorical_ppo_loss": ("index", "actions"),
    "normal_ppo_loss": ("index",),
}
_SLOTS = [(op, argument) for op, arguments in _LABELS.items() for argument in arguments]

#: By kind of device: int64 [slots, 2], where (-1: nothing) and the value; and, to look there quickly, where by numpy.
_memory: dict[str, tuple[Tensor, Any]] = {}
_of_op: dict[tuple[str, str], Tensor | None] = {}  # by kind of device


# --- on the host ------------------------------------------------------------------------------------------------------


def of(op: str, device: torch.device) -> Tensor | None:
    """The slots of `op`, for kernels on `device`; None where a kernel cannot write what the CPU reads."""
    key = (op, device.type)
    if key not in _of_op:
        _of_op[key] = _slots(*key)
    return _of_op[key]


def _slots(op: str, kind: str) -> Tensor | None:
    if kind not in ("cpu", "cuda"):  # "cuda" is AMD's name too; "cpu": in Triton's interpreter
        return None
    if kind not in _memory:
        slots = torch.full((len(_SLOTS), 2), -1, dtype=torch.int64, device="cpu", pin_memory=kind != "cpu")
        _memory[kind] = slots, slots.numpy()[:, 0]
    first = _SLOTS.index((op, _LABELS[op][0]))
    return _memory[kind][0][first : first + len(_LABELS[op])]


def raise_reported() -> None:
    """ValueError for a label that was noted, which is forgotten then."""
    for kind, (slots, places) in _memory.items():
        noted = places.tolist()
        if max(noted) < 0:
            continue
        slot = next(k for k, where in enumerate(noted) if where >= 0)
        (op, argument), value = _SLOTS[slot], int(slots[slot, 1])
        places[slot] = -1
        late = "" if kind == "cpu" else " in an earlier call: a GPU says so late"
        raise ValueError(f"{op}: {argument} must be in range, got {value} at {noted[slot]}{late}")


def raise_early(device: torch.device) -> None:
    """After the launches of an op: in the interpreter they are done, and leave nothing for the next call to say."""
    if device.type == "cpu" and device.type in _memory:
        try:
            raise_reported()
        finally:
            _memory[device.type][1].fill(-1)


_workspace.watch(sys.modules[__name__])


# --- in kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def refuse(report, where, value, bad):
    """Notes the first label of a block that is `bad`, and of a launch's blocks the first to come. None: says nothing."""
    if report is not None:
        some = tl.max(bad.to(tl.int32), 0)
        if some != 0:
            first = tl.min(tl.where(bad, where, 0x7FFFFFFFFFFFFFFF), 0)
            its = tl.sum(tl.where(bad & (where == first), value, 0), 0)
            nothing = tl.full((), -1, tl.int64)
            # -2: taken, and not to be read before the value is there
            if tl.atomic_cas(report, nothing, nothing - 1, sem="relaxed", scope="sys") == -1:
                tl.store(report + 1, its)
                tl.atomic_xchg(report, first, sem="release", scope="sys")
