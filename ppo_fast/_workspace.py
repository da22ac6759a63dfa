"""Device memory for partial results and tickets. Bindings ask for it by size; torch's allocator gives it, on the current
stream, so that it may be given away again as soon as the launch is queued."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_TICKETS = 4096  # of one batch
_free: dict[
    tuple[str, int], tuple[Tensor, int]
] = {}  # of each device: tickets that no captured graph has, and the next
_of_stream: dict[tuple[str, int, int], Tensor] = {}


def allocate(size: int, device_type: str, index: int) -> Tensor:
    """`size` bytes on the device, uninitialised."""
    return torch.empty(size, dtype=torch.uint8, device=torch.device(device_type, index))


def ticket(device_type: str, index: int, stream: int, capturing: bool) -> Tensor:
    """A counter [1], int32, that is 0 whenever no kernel has it: kernels that count their blocks in it wrap it to 0.

    Kernels of one stream never run at once and share one. A captured graph may be replayed beside anything, so each
    captured call gets one of its own.
    """
    if not capturing:
        found = _of_stream.get((device_type, index, stream))
        if found is None:
            found = _of_stream[device_type, index, stream] = _next(device_type, index)
        return found
    return _next(device_type, index)


def _next(device_type: str, index: int) -> Tensor:
    batch, used = _free.get((device_type, index), (None, _TICKETS))
    if batch is None or used == _TICKETS:
        batch = torch.zeros(_TICKETS, dtype=torch.int32, device=torch.device(device_type, index))
        used = 0
    _free[device_type, index] = batch, used + 1
    return batch[used : used + 1]


# --- labels that kernels refused --------------------------------------------------------------------------------------

_reports: dict[str, tuple[Tensor, Any]] = {}  # by the module that has them


def of(module):
    """This module, as the resources of a call of `module`, which is told where to note labels out of range: in memory
    that the GPU writes and the CPU reads, so that nobody waits."""
    if module.__name__ not in _reports:
        memory = torch.full((module.SLOTS, 2), -1, dtype=torch.int64).pin_memory()
        module.set_reports(memory.data_ptr())
        _reports[module.__name__] = memory, module
    return sys.modules[__name__]


def raise_reported() -> None:
    """ValueError for a label out of range that a kernel met, where that is known by now."""
    for _, module in _reports.values():
        module.raise_reported()


def stream(index: int) -> int:
    """The current stream, for tensors of libraries that do not tell."""
    return torch.cuda.current_stream(index).cuda_stream
