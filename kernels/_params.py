"""What a loss is told apart from tensors of tokens: a LossConfig as kernels take it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.runtime import driver

from ..config import CHOICES, NUMBERS
from ._formulas import Switches

_OPTIONAL = ("dual_clip", "ratio_cap", "log_ratio_clamp", "value_clip", "kl_clamp", "kl_value_clamp")


class LossParams:
    """`numbers` in the order of config.NUMBERS, NaN where off; `choices` as indices in the order of config.CHOICES."""

    def __init__(self, numbers: Sequence[float], choices: Sequence[int], device_numbers: Tensor | None = None) -> None:
        if len(numbers) != len(NUMBERS) or len(choices) != len(CHOICES):
            raise ValueError("LossParams: the package's Python and Triton halves differ; reinstall it")
        self.numbers = tuple(numbers)
        #: float64 [18] on the device, read instead of `numbers`, which still say what is off.
        self.device_numbers = device_numbers
        on = {name: not math.isnan(numbers[NUMBERS.index(name)]) for name in _OPTIONAL}
        chosen = {name: allowed[i] for (name, allowed), i in zip(CHOICES.items(), choices, strict=True)}
        self.switches = Switches(**on, **chosen)
        self._made: dict[tuple[torch.device, int], Tensor] = {}
        self._pinned: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """The numbers as float64 [18] on `device`, copied there once a stream and without waiting for it."""
        if self.device_numbers is not None:
            return self.device_numbers
        stream = 0 if device.type == "cpu" else driver.active.get_current_stream(device.index)
        key = (device, stream)
        found = self._made.get(key)
        if found is not None:
            return found
        if device.type == "cpu":
            there = torch.tensor(self.numbers, dtype=torch.float64, device="cpu")
        else:
            if self._pinned is None:  # kept: a captured graph copies it again at every replay
                self._pinned = torch.tensor(self.numbers, dtype=torch.float64, device="cpu", pin_memory=True)
            there = self._pinned.to(device, non_blocking=True)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self._made[key] = there  # one made under capture holds numbers only once the graph has run
        return there


def has_overlap(x: Tensor) -> bool:
    """Whether elements of a tensor may share memory."""
    reach = 0
    for stride, size in sorted(
        (abs(stride), size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1
    ):
        if x.numel() > 0 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
