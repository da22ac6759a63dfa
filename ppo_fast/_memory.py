"""Large results in memory that earlier results have left. From some size on the system's allocator gives pages back when a
result is freed and maps fresh ones for the next: writing to those costs several times what the kernel does. So the last few
such blocks are kept, as the caching allocator of a GPU does, and used again once nothing refers to them any more. What lies
on another device is torch's own affair.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor

_LEAST = 1 << 17  # bytes; below, the allocator reuses memory by itself
_MOST = 1 << 30  # bytes of all kept blocks together
#: How many blocks are kept; 0 keeps none.
KEPT = 16
if _wanted := os.environ.get("PPO_FAST_KEPT_BLOCKS"):
    if not _wanted.isdecimal():
        raise ValueError(f"PPO_FAST_KEPT_BLOCKS must be a whole number >= 0, got {_wanted!r}")
    KEPT = int(_wanted)

_LARGE_PAGE, _MADV_HUGEPAGE = 1 << 21, 14
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
_blocks: list[tuple[int, torch.UntypedStorage]] = []  # size in bytes, block
_lock = threading.Lock()
# How many tensors have a block. Private to torch: where it is missing nothing is kept.
_references: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised and contiguous, in the shape and on the device of `x`."""
    if dtype is None:
        dtype = x.dtype
    if x.dtype is dtype and x.nbytes < _LEAST and x.is_contiguous():
        return torch.empty_like(x)
    return empty(x.shape, dtype, x.device)


def empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised and contiguous."""
    size = shape.numel() * dtype.itemsize
    if size < _LEAST or size > _MOST or KEPT == 0 or _references is None or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        block = _take(size, _references)
        return torch.empty(0, dtype=dtype, device="cpu").set_(block, 0, shape)  # type: ignore[call-overload]


def _take(size: int, references: Callable[[int], int]) -> torch.UntypedStorage:
    for i in range(len(_blocks)):
        if _blocks[i][0] == size:
            block = _blocks[i][1]
            # no tensor has it, and of Python nothing but the list, this variable and the count itself
            if references(block._cdata) == 1 and sys.getrefcount(block) == 3:
                _blocks.append(_blocks.pop(i))  # the block used longest ago is dropped first
                return block
    block = torch.UntypedStorage(size, device="cpu")
    _ask_for_large_pages(block.data_ptr(), size)
    _blocks.append((size, block))
    total = sum(size for size, _ in _blocks)
    while len(_blocks) > KEPT or total > _MOST:
        total -= _blocks.pop(0)[0]
    return block


def _ask_for_large_pages(address: int, size: int) -> None:
    """Linux maps the block two megabytes at a time where it may: fewer first touches, fewer pages to look up."""
    start = -(-address // _LARGE_PAGE) * _LARGE_PAGE
    length = (address + size - start) // _LARGE_PAGE * _LARGE_PAGE
    if length > 0 and _madvise is not None:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)  # a refusal changes nothing
