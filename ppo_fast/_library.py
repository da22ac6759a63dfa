"""The third door: ops registered with torch.library, taken only while torch.compile traces (a registered call costs
several times a raw one). Each op file defines its own; here is the one way to do it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .config import CHOICES

_library = torch.library.Library("ppo_fast", "DEF")

#: Schema of a LossConfig: its numbers as one tensor, which a schedule over compiled calls may change freely.
CONFIG_SCHEMA = ", ".join(["Tensor numbers", *(f"int {name}" for name in CHOICES)])


def define(
    name: str,
    schema: str,
    kernel: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Registers ppo_fast::<name> for every device (`kernel` picks the backend itself) and returns the callable op."""
    _library.define(f"{name}{schema}")
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ppo_fast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"ppo_fast::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.ppo_fast, name).default


def placeholder(like: Tensor) -> Tensor:
    """Stands for an absent gradient among an op's outputs."""
    return like.new_empty(0)


def autograd_again():
    """For a registered kernel that differentiates something itself: the dispatcher has left autograd out by then."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA, torch._C.DispatchKey.AutogradXPU):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
