"""Heads to try linear_log_prob and linear_ppo_loss on, and what a call costs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

M, H, V = 37, 16, 101


def example(dtype=torch.float32, lead=(M,), bias=False, seed=0, vocabulary=V):
    g = torch.Generator().manual_seed(seed)
    x = {
        "hidden": torch.randn(*lead, H, generator=g).to(dtype).requires_grad_(),
        "weight": (torch.randn(vocabulary, H, generator=g) / 4).to(dtype).requires_grad_(),
        "targets": torch.randint(vocabulary, lead, generator=g),
    }
    if bias:
        x["bias"] = torch.randn(vocabulary, generator=g).to(dtype).requires_grad_()
    return x


class Cost(TorchDispatchMode):
    """FLOPs of all matrix products, and the most elements that any result had."""

    flops = elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name()
        if "mm" in name:
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out
