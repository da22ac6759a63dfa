"""slime's advantages of a batch of responses, as its trainer calls them. No step of its training: that needs Megatron.

On the path: a checkout of slime, and tests/peers/stubs/slime.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

PACKAGE, TASK = "slime", "GAE of 512 responses of 200 to 8,192 tokens"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import torch
    from slime.utils import ppo_utils

    from ppo_fast.integrations import slime

    torch.manual_seed(seed)
    responses, longest = (16, 1024) if quick else (512, 8192)
    lengths = torch.randint(200, longest + 1, (responses,)).tolist()
    values, rewards = ([torch.randn(n) for n in lengths] for _ in range(2))
    with slime.enabled() if enabled else nullcontext():
        times = []
        for _ in range(3):  # the first maps memory
            start = time.perf_counter()
            ppo_utils.get_advantages_and_returns_batch(lengths, lengths, values, rewards, 1.0, 0.95)
            times.append(time.perf_counter() - start)
    return {"seconds": min(times), "parts": {"advantages": min(times)}, "curve": []}
