"""Which backend runs a call: decided once per call, from the tensor's device, what is installed, and the user's word.

A backend is a module of raw calls. All have the same names and arguments, those of `_C.pyi`, but for the last argument,
the call's resources: threads on the CPU, memory for partial results on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _workspace


class Backend:
    """`ops`: the raw calls. `resources()`: their last argument. `checks`: whether they check their inputs themselves."""

    __slots__ = ("checks", "name", "ops", "resources")

    def __init__(self, name: str, ops: Any, resources: Callable[[], Any], checks: bool) -> None:
        self.name, self.ops, self.resources, self.checks = name, ops, resources, checks


BACKENDS = ("cpu", "cuda", "triton", "reference")
_WHY_NOT = dict.fromkeys(BACKENDS, "")
_forced: str | None = None  # a plain global: torch.compile can guard on it, as on torch.backends' flags
_peek_functorch = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
_PLAIN = (Tensor, torch.nn.Parameter)


def _load_cpu() -> Backend | None:
    try:
        from . import _C
    except ImportError as error:  # a source tree without a build: the reference works, and doctor says why it is slow
        _WHY_NOT["cpu"] = f"ppo_fast._C cannot be imported: {error}"
        return None
    return Backend("cpu", _C, torch.get_num_threads, True)


def _load_cuda() -> Backend | None:
    """The CUDA kernels, where they are built and torch can give them tensors. Nothing of the driver is asked here."""
    why = ""
    if importlib.util.find_spec("ppo_fast._C_cuda") is None:
        why = "ppo_fast._C_cuda is not built (it needs nvcc; PPO_FAST_CUDA=1 makes a build without it fail)"
    elif torch.version.cuda is None:
        why = "this torch is built without CUDA"
    else:
        try:
            module = importlib.import_module("ppo_fast._C_cuda")
        except ImportError as error:
            why = f"ppo_fast._C_cuda cannot be imported: {error}"
        else:
            return Backend("cuda", module, lambda: _workspace.of(module), True)
    _WHY_NOT["cuda"] = why
    return None


def _why_no_triton() -> str:
    for module in ("triton", "ppo_fast.kernels"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return ""


_cpu, _cuda = _load_cpu(), _load_cuda()
_triton: Backend | None = None  # imported when it is first needed: triton takes a second
_WHY_NOT["triton"] = _why_no_triton()


def interprets_triton() -> bool:
    """Whether Triton kernels run in its interpreter, on tensors of any device: for debugging and tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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


def pick(op: str, x: Tensor) -> Backend | None:
    """The backend whose kernels run this call; None: the reference does (subclasses, functorch levels, other devices)."""
    if not is_plain(op, x) or _peek_functorch() is not None:
        return None
    if x.is_cpu and _forced is None:
        return _cpu
    return _for_device(op, x.device)


def is_plain(op: str, x: Tensor) -> bool:
    if type(x) in _PLAIN:
        return True
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected a torch.Tensor, got {type(x).__name__}")
    return False


def _for_device(op: str, device: torch.device) -> Backend | None:
    """By device and the user's word; a word that does not fit the device is an error, not a silent other path."""
    kind, forced = device.type, _forced
    if forced == "reference":
        return None
    if kind == "cpu":
        if forced in (None, "cpu"):
            return _cpu
        if forced == "triton" and interprets_triton():
            return triton()
    elif kind == "cuda":
        if forced in (None, "cuda") and _cuda is not None:
            return _cuda
        if forced in (None, "triton") and not _WHY_NOT["triton"]:
            return triton()
    elif kind == "xpu" and forced in (None, "triton") and not _WHY_NOT["triton"]:
        return triton()
    if forced is None:
        return None
    takes = {"cpu": "tensors on the CPU", "cuda": "tensors on an NVIDIA GPU", "triton": "tensors on a GPU"}[forced]
    raise ValueError(f"{op}: backend {forced!r} takes {takes}, got one on {device}")


def triton() -> Backend | None:
    global _triton
    if _triton is None:
        _triton = Backend("triton", importlib.import_module("ppo_fast.kernels.raw"), _workspace.raise_reported, False)
    return _triton


def compiles_kernel(x: Tensor) -> bool:
    """Under torch.compile. True: the registered op (kernels) becomes a node of the graph. False: the reference is
    traced, and the compiler fuses it as it can."""
    return _for_device("torch.compile", x.device) is not None


class Explanation(str):
    """Printable as it is; shows itself without quotes at the prompt."""

    def __repr__(self) -> str:
        return str(self)


def _gpu_takes() -> str:
    return "cuda" if _cuda is not None else "reference" if _WHY_NOT["triton"] else "triton"


def explain() -> Explanation:
    """Says which backends exist here, which one an op takes for a CPU and for a GPU tensor, and why not the others."""
    details = {
        "cuda": "CUDA kernels, for NVIDIA GPUs{}",
        "triton": "Triton kernels, for NVIDIA, AMD and Intel GPUs" + (" (interpreted)" if interprets_triton() else ""),
        "reference": "plain torch: any device, any float dtype",
    }
    if _cpu is not None:
        details["cpu"] = (
            f"C++ kernels, instruction set {_cpu.ops.isa()} (PPO_FAST_CPU=base|v3|v4 forces one), "
            f"{torch.get_num_threads()} threads (torch.set_num_threads)"
        )
    if _cuda is not None:
        details["cuda"] = details["cuda"].format(f" of {_cuda.ops.ARCHITECTURES}")
    lines = ["ppo_fast backends"]
    for name in BACKENDS:
        why = _WHY_NOT[name]
        lines.append(f"  {name:<10} no   {why}" if why else f"  {name:<10} yes  {details[name]}")
    if (_cuda is not None or not _WHY_NOT["triton"]) and not torch.cuda.is_available():
        lines.append("  no GPU here: torch.cuda.is_available() is False")
    forced = _forced
    lines.append(f"  a CPU tensor takes:  {forced or ('reference' if _cpu is None else 'cpu')}")
    lines.append(f"  a GPU tensor takes:  {forced or _gpu_takes()}")
    if forced:
        lines.append(f"  forced to {forced!r} by use_backend or PPO_FAST_BACKEND")
    return Explanation("\n".join(lines))
