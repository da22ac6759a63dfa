"""NeMo-RL's advantages and losses, as its PPO calls them. No step of its training: its workers need a GPU each.

On the path: a checkout of NeMo-RL, tests/peers/stubs/nemo_rl, and the packages that `python -m tests.peers nemo_rl` installs.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

PACKAGE, TASK = (
    "nemo-rl",
    "GAE and losses of 512 responses of up to 4,096 tokens; policy loss of 16 packed sequences of up to 128, vocabulary 32,000",
)


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import torch
    from nemo_rl.algorithms.advantage_estimator import GeneralizedAdvantageEstimator
    from nemo_rl.algorithms.loss import (
        ClippedPGLossConfig,
        ClippedPGLossFn,
        MseValueLossConfig,
        MseValueLossFn,
        SequencePackingLossWrapper,
        prepare_loss_input,
    )
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

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
    policy_loss = ClippedPGLossFn(ClippedPGLossConfig(ratio_clip_max=0.28, ratio_clip_c=10.0))
    streams = {"prev_logprobs": -torch.rand(rows, longest), "sample_mask": torch.ones(rows)}
    for name in ("generation_logprobs", "reference_policy_logprobs"):
        streams[name] = streams["prev_logprobs"] + 0.1 * torch.randn(rows, longest)
    log_probs = streams["prev_logprobs"][:, 1:] + 0.1 * torch.randn(rows, longest - 1)
    n, width, vocabulary = (4, 32, 512) if quick else (16, 128, 32_000)
    few = BatchedDataDict({name: x[:n, :width].contiguous() for name, x in streams.items() if x.ndim == 2})
    few |= {"sample_mask": torch.ones(n), "advantages": torch.randn(n, width), "token_mask": torch.ones(n, width),
            "input_ids": torch.randint(vocabulary, (n, width))}  # fmt: skip
    borders = torch.cat([torch.zeros(1), torch.randint(width // 2, width + 1, (n,)).cumsum(0)]).int()
    few["token_mask"] *= torch.arange(width) < borders.diff()[:, None]
    logits = torch.randn(1, int(borders[-1]), vocabulary)
    packing = SequencePackingLossWrapper(policy_loss, prepare_loss_input, borders)
    parts = dict.fromkeys(("advantages", "value_loss", "policy_loss", "packed_loss"), float("inf"))
    # theirs moves tokens to a GPU whatever the logits are on
    with nemo_rl.enabled() if enabled else nullcontext(), mock.patch.object(torch.Tensor, "cuda", lambda x: x):
        for _ in range(3):  # the first maps memory
            start = time.perf_counter()
            advantages, returns = estimator.compute_advantage(None, rewards, mask, values)
            parts["advantages"] = min(parts["advantages"], time.perf_counter() - start)
            data = {"token_mask": mask, "sample_mask": torch.ones(rows), "returns": returns, "values": old_values}
            predicted = values.clone().requires_grad_()
            start = time.perf_counter()
            value_loss(predicted, data, torch.tensor(float(rows)), mask.sum())[0].backward()
            parts["value_loss"] = min(parts["value_loss"], time.perf_counter() - start)
            data = {**streams, "advantages": advantages, "token_mask": mask}
            x = log_probs.clone().requires_grad_()
            start = time.perf_counter()
            policy_loss(x, data, torch.tensor(float(rows)), mask[:, 1:].sum())[0].backward()
            parts["policy_loss"] = min(parts["policy_loss"], time.perf_counter() - start)
            x = logits.clone().requires_grad_()
            start = time.perf_counter()
            packing(x, few, torch.tensor(float(n)), few["token_mask"][:, 1:].sum())[0].backward()
            parts["packed_loss"] = min(parts["packed_loss"], time.perf_counter() - start)
    return {"seconds": sum(parts.values()), "parts": parts, "curve": []}
