"""Parameters that FSDP2 keeps in pieces, a piece on each rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor


def full(x: Tensor) -> Tensor:
    """`x`, gathered where it is sharded; then every rank calls this."""
    return x.full_tensor() if dist.is_available() and isinstance(x, DTensor) else x


def like(x: Tensor, parameter: Tensor) -> Tensor:
    """`x`, of which every rank has the whole, sharded as `parameter` is."""
    if not (dist.is_available() and isinstance(parameter, DTensor)):
        return x
    x = x.to(parameter.device)
    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)


def shard(root: nn.Module, causal: Any, device: str, size: int) -> None:
    """Shards `root`, which computes in its `forward`, and each layer of the `causal` model in it.

    The hooks around a layer gather its parameters for its forward and backward; those around `root` gather embeddings,
    heads and norms, and scatter the gradients that the loss leaves at them.
    """
    mesh = init_device_mesh(device, (size,))
    for module in list(causal.modules()):
        if type(module).__name__ in (getattr(causal, "_no_split_modules", None) or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(root, mesh=mesh)
    root(lambda: None)  # FSDP learns what its root is from the first forward
    root.reshard()  # type: ignore[operator]


@contextlib.contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Within, all parameters are whole on every rank, and running the model waits for none.

    Sampling needs this: how many tokens a rank draws is its own affair.
    """
    modules: list[Any] = [m for m in root.modules() if isinstance(m, FSDPModule)] if dist.is_available() else []
    layers = [m for m in modules if m is not root]
    for module in layers:
        module.set_reshard_after_forward(False, recurse=False)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()
        for module in layers:
            module.set_reshard_after_forward(True, recurse=False)
