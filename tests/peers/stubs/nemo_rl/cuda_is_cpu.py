"""A plugin of pytest: what NeMo-RL's tests make on "cuda" is made on the CPU, so that they run where there is no GPU."""

import pytest
import torch
from torch.overrides import TorchFunctionMode


def _here(x):
    return "cpu" if isinstance(x, (str, torch.device)) and str(x).startswith("cuda") else x


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*map(_here, args), **{name: _here(x) for name, x in (kwargs or {}).items()})


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    with OnCpu():
        yield
