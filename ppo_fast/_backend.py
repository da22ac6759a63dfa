"""Which backend runs a call: decided once per call, from the tensor's device, what is installed, and the user's word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:  # a source tree without a build: the reference still works, and doctor says why it is slow
    _C = None  # type: ignore[assignment]
    WHY_NO_CPU = f"ppo_fast._C cannot be imported: {error}"
else:
    WHY_NO_CPU = ""

BACKENDS = ("cpu", "cuda", "triton", "reference")
_WHY_NOT = {
    "cpu": WHY_NO_CPU,
    "cuda": "ppo_fast._C_cuda is not built",
    "triton": "ppo_fast.kernels is not installed",
    "reference": "",
}
_forced: str | None = None  # a plain global: torch.compile can guard on it, as on torch.backends' flags
_peek_functorch = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
_PLAIN = (Tensor, torch.nn.Parameter)


def _check(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {BACKENDS}, got {name!r}")
    if _WHY_NOT[name]:
        raise ValueError(f"{argument}: {name!r} is not available here: {_WHY_NOT[name]}")
    return name


if os.environ.get("PPO_FAST_BACKEND"):
    _forced = _check(os.environ["PPO_FAST_BACKEND"], "PPO_FAST_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside on the named backend: "cpu", "cuda", "triton" or "reference".

    Raises ValueError where that backend does not exist here, before anything runs. The environment variable
    PPO_FAST_BACKEND does the same from outside. Process-wide, like torch's own backend flags.
    """
    global _forced
    before, _forced = _forced, _check(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def takes_kernel(op: str, x: Tensor) -> bool:
    """True: the CPU kernels run this call. False: the reference does (other devices, subclasses, functorch levels)."""
    if type(x) not in _PLAIN:
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: expected a torch.Tensor, got {type(x).__name__}")
        return False
    if _forced == "reference" or _C is None or _peek_functorch() is not None:
        return False
    if not x.is_cpu:
        if _forced == "cpu":
            raise ValueError(f"{op}: backend 'cpu' takes tensors on the CPU, got one on {x.device}")
        return False
    return True


def compiles_kernel(x: Tensor) -> bool:
    """Under torch.compile. True: the registered op (the CPU kernels) becomes a node of the graph. False: the reference is
    traced, and the compiler fuses it as it can."""
    return x.device.type == "cpu" and _C is not None and _forced != "reference"


class Explanation(str):
    """Printable as it is; shows itself without quotes at the prompt."""

    def __repr__(self) -> str:
        return str(self)


def explain() -> Explanation:
    """Says which backends exist here, which one an op takes for a CPU and for a GPU tensor, and why not the others."""
    lines = ["ppo_fast backends"]
    for name in BACKENDS:
        why = _WHY_NOT[name]
        if why:
            lines.append(f"  {name:<10} no   {why}")
        elif name == "cpu":
            lines.append(
                f"  {name:<10} yes  C++ kernels, instruction set {_C.isa()} (PPO_FAST_CPU=base|v3|v4 forces one), "
                f"{torch.get_num_threads()} threads (torch.set_num_threads)"
            )
        else:
            lines.append(f"  {name:<10} yes  plain torch: any device, any float dtype")
    forced = _forced
    lines.append(f"  a CPU tensor takes:  {forced or ('reference' if WHY_NO_CPU else 'cpu')}")
    lines.append(f"  a GPU tensor takes:  {forced or 'reference'}")
    if forced:
        lines.append(f"  forced to {forced!r} by use_backend or PPO_FAST_BACKEND")
    return Explanation("\n".join(lines))
