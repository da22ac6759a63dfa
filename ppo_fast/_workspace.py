"""Device memory for partial results and tickets. Bindings ask for it by size; torch's allocator gives it, on the current
stream, so that it may be given away again as soon as the launch is queued."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_of_stream: dict[tuple[str, int, int], Tensor] = {}


def allocate(size: int, device_type: str, index: int) -> Tensor:
    """`size` bytes on the device, uninitialised."""
    return torch.empty(size, dtype=torch.uint8, device=torch.device(device_type, index))


def ticket(device_type: str, index: int, stream: int, capturing: bool) -> Tensor:
    """A counter [1], int32, that is 0 whenever no kernel has it: kernels that count their blocks in it wrap it to 0.

    Kernels of one stream never run at once and share one, zeroed on that stream. A captured graph may be replayed beside
    anything, so each captured call has its own, which the graph zeroes first.
    """
    if capturing:
        return torch.zeros(1, dtype=torch.int32, device=torch.device(device_type, index))
    found = _of_stream.get((device_type, index, stream))
    if found is None:
        found = torch.zeros(1, dtype=torch.int32, device=torch.device(device_type, index))
        _of_stream[device_type, index, stream] = found
    return found


# --- labels that kernels refused --------------------------------------------------------------------------------------

_reports: dict[str, Tensor] = {}  # by the name of the module that writes there
_watched: dict[str, Any] = {}  # modules that know of labels, by name


def of(module):
    """This module, as the resources of a call of `module`, which is told where to note labels out of range: in memory
    that the GPU writes and the CPU reads, so that nobody waits."""
    if module.__name__ not in _reports:
        memory = torch.full((module.SLOTS, 2), -1, dtype=torch.int64, device="cpu", pin_memory=True)
        module.set_reports(memory.data_ptr())
        _reports[module.__name__] = memory
        watch(module)
    return sys.modules[__name__]


def watch(module: Any) -> None:
    """`raise_reported` asks this module too."""
    _watched[module.__name__] = module


def raise_reported() -> None:
    """ValueError for a label out of range that a kernel met, where that is known by now."""
    for module in _watched.values():
        module.raise_reported()


def stream(index: int) -> int:
    """The current stream, for tensors of libraries that do not tell."""
    return torch.cuda.current_stream(index).cuda_stream
