"""How a Triton kernel is started: through its compiled object, found again by what Triton specialises on.

`kernel[grid](...)` binds, specialises and formats all arguments anew: for the two dozen of a loss that takes longer than
the kernel runs on a minibatch. Here the first call goes that way and what it compiled is kept; later calls with the same
types start that directly. The interpreter, a profiler's hooks and a launcher unlike the one expected take Triton's way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.runtime.jit import JITFunction

_ON_AMD = torch.version.hip is not None
_compiled: dict[tuple, _Compiled | None] = {}  # None: cannot be started directly
_specialised: dict[int, tuple[bool, ...]] = {}  # id of a kernel: which parameters Triton specialises on their value


class _Compiled:
    """A `triton.compiler.CompiledKernel` and what its launcher takes after the arguments: the constexprs, in order."""

    __slots__ = ("function", "kernel", "metadata", "run", "stream_of", "tail")

    def __init__(self, kernel: Any, compiled: Any, n_args: int, meta: dict[str, Any]) -> None:
        self.kernel = kernel  # kept alive: the key has its id
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.stream_of = triton.runtime.driver.active.get_current_stream
        self.tail = tuple(meta.get(p.name, p.default) for p in kernel.params[n_args:])


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta) on the current stream of the device that the first tensor is on.

    `args`: all that is not constexpr, in the order of the signature: tensors, None where absent, bools, ints, floats.
    `meta`: the constexprs, which come last in the signature, and options such as num_warps.
    """
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type != "cuda" or type(kernel) is not JITFunction:  # "cuda" is AMD's name too
        kernel[grid](*args, **meta)
    elif device.index == torch.cuda.current_device():
        start(kernel, grid, args, meta, device.index)
    else:
        with torch.cuda.device(device):
            start(kernel, grid, args, meta, device.index)


def start(kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any], device: int) -> None:
    """`launch` on the current device."""
    key, values = _key(kernel, args, meta, device)
    known = _compiled.get(key)
    if known is not None and not _hooked():
        x, y, z = (*grid, 1, 1)[:3]
        try:
            known.run(x, y, z, known.stream_of(device), known.function, known.metadata, None, None, None, *values,
                      *known.tail)  # fmt: skip
            return
        except TypeError:  # from unpacking the arguments: nothing has been started
            _compiled[key] = None
    compiled = kernel[grid](*args, **meta)
    if key not in _compiled:
        try:
            _compiled[key] = _Compiled(kernel, compiled, len(args), meta)
        except AttributeError:
            _compiled[key] = None


def _key(kernel: Any, args: tuple, meta: dict[str, Any], device: int) -> tuple[tuple, list[Any]]:
    """What decides which compiled kernel runs; and the arguments as a launcher takes them, tensors as their addresses."""
    specialised = _specialised.get(id(kernel))
    if specialised is None:
        specialised = _specialised[id(kernel)] = tuple(not p.do_not_specialize for p in kernel.params)
    key: list[Any] = [id(kernel), device, *meta, *meta.values()]
    values: list[Any] = []
    facts = 1  # a bit for each thing that is asked: whether an address is aligned, whether a number is small
    for x, on_value in zip(args, specialised, strict=False):
        kind = type(x)
        if kind is Tensor or kind is Parameter or isinstance(x, Tensor):
            x = x.data_ptr()
            facts = facts * 2 + (x % 16 == 0)
            tensor = args[len(values)]
            kind = tensor.dtype
            if _ON_AMD:  # where Triton addresses storages of up to 2 GiB with 32 bits
                facts = facts * 2 + (tensor.untyped_storage().nbytes() < 2**31)
        elif kind is int:
            facts = facts * 2 + (-(2**31) <= x < 2**31)
            if on_value:
                facts = facts * 4 + (x % 16 == 0) * 2 + (x == 1)
        key.append(kind)
        values.append(x)
    key.append(facts)
    return tuple(key), values


def _hooked() -> Any:
    """Whether a profiler wants to hear of launches."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
