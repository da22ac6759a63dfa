"""The CPU or one GPU. What the host gives a GPU lies in pinned memory and is copied there without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast import _backend

from .errors import UserError
from .fields import RunFields


def find_device(config: RunFields, cuda_graph: bool = False) -> torch.device:
    """The device of a run; `UserError` where it is not here, or has no kernels that a graph could hold."""
    device = torch.device(config.device)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"--device: expected cpu, as torch {torch.__version__} finds no GPU here, got {config.device}")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    count = torch.cuda.device_count()
    if device.index >= count:
        raise UserError(f"--device: expected a GPU below cuda:{count}, the number of those here, got {config.device}")
    try:
        backend = _backend.pick("ppo-fast train", torch.empty(0, device=device))
    except ValueError as error:  # PPO_FAST_BACKEND
        raise UserError(f"--device: {error}") from None
    if cuda_graph and backend is None:
        raise UserError("--cuda-graph: expected kernels for the GPU, got only the reference; ppo-fast doctor says why")
    return device


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` of the host on the device; on the CPU itself."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


class Twin:
    """A buffer of the host and its copy on the device; on the CPU one and the same, and `apart` is False."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=device.type != "cpu")
        self.device = self._on(device)
        self.apart = self.device is not self.host

    def _on(self, device: torch.device) -> Tensor:
        return self.host.to(device)

    def upload(self) -> None:
        if self.apart:
            self.device.copy_(self.host, non_blocking=True)
