"""NeMo-RL's advantages and value loss, as its PPO calls them. No step of its training: its workers need a GPU each.

On the path: a checkout of NeMo-RL, tests/peers/stubs/nemo_rl, and the packages that `python -m tests.peers nemo_rl` installs.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

PACKAGE, TASK = "nemo-rl", "GAE and value loss of 512 responses of up to 4,096 tokens"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import torch
    from nemo_rl.algorithms.advantage_estimator import GeneralizedAdvantageEstimator
    from nemo_rl.algorithms.loss.loss_functions import MseValueLossConfig, MseValueLossFn

    from ppo_fast.integrations import nemo_rl

    torch.manual_seed(seed)
    rows, longest = (16, 256) if quick else (512, 4096)
    mask = (torch.arange(longest) < torch.randint(longest // 2, longest + 1, (rows, 1))).float()
    rewards, values, old_values = torch.randn(rows), torch.randn(rows, longest), torch.randn(rows, longest)
    config = {"gae_lambda": 0.95, "gae_gamma": 1.0, "normalize_advantages": True, "length_adaptive_alpha": 0.0,
              "gae_lambda_value": None, "gae_lambda_policy": None}  # fmt: skip
    loss_config = SimpleNamespace(
        use_kl_in_reward=False, reference_policy_kl_penalty=0.0, reference_policy_kl_type="k3"
    )
    estimator = GeneralizedAdvantageEstimator(config, loss_config)
    value_loss = MseValueLossFn(MseValueLossConfig(scale=0.4, cliprange=0.2))
    parts = {"advantages": float("inf"), "value_loss": float("inf")}
    with nemo_rl.enabled() if enabled else nullcontext():
        for _ in range(3):  # the first maps memory
            start = time.perf_counter()
            _, returns = estimator.compute_advantage(None, rewards, mask, values)
            parts["advantages"] = min(parts["advantages"], time.perf_counter() - start)
            data = {"token_mask": mask, "sample_mask": torch.ones(rows), "returns": returns, "values": old_values}
            predicted = values.clone().requires_grad_()
            start = time.perf_counter()
            value_loss(predicted, data, torch.tensor(float(rows)), mask.sum())[0].backward()
            parts["value_loss"] = min(parts["value_loss"], time.perf_counter() - start)
    return {"seconds": sum(parts.values()), "parts": parts, "curve": []}
