"""TorchRL's PPO, put together as its tutorials do, on 8 CartPole-v1 at once."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch

PACKAGE, TASK = "torchrl", "GAE and ClipPPOLoss, 8 CartPole-v1, 256 steps each"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import gymnasium
    from tensordict import TensorDict
    from tensordict.nn import (
        InteractionType,
        ProbabilisticTensorDictModule,
        ProbabilisticTensorDictSequential,
        TensorDictModule,
    )
    from torchrl.modules import OneHotCategorical
    from torchrl.objectives import ClipPPOLoss
    from torchrl.objectives.value import GAE

    from ppo_fast.integrations import torchrl

    torch.manual_seed(seed)
    envs, steps, minibatch = 8, 256, 256
    env = gymnasium.make_vec(
        "CartPole-v1", num_envs=envs, vectorization_mode="sync", vector_kwargs={"autoreset_mode": "SameStep"}
    )

    def layers(outputs: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(),
                                   torch.nn.Linear(64, outputs))  # fmt: skip

    head = ProbabilisticTensorDictModule(
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )
    actor = ProbabilisticTensorDictSequential(TensorDictModule(layers(2), in_keys=["obs"], out_keys=["logits"]), head)
    critic = TensorDictModule(layers(1), in_keys=["obs"], out_keys=["state_value"])
    advantages = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    loss_of = ClipPPOLoss(actor, critic, entropy_coeff=0.01)
    optimizer = torch.optim.Adam(loss_of.parameters(), 1e-3)
    seconds = {"rollout": 0.0, "advantages": 0.0, "update": 0.0}
    curve: list[tuple[int, float]] = []
    finished: list[float] = []
    length = torch.zeros(envs)
    seen, _ = env.reset(seed=seed)
    with torchrl.enabled() if enabled else nullcontext():
        for i in range(2 if quick else 25):
            marks = [time.perf_counter()]
            rows = []
            for _ in range(steps):
                row = TensorDict({"obs": torch.as_tensor(seen, dtype=torch.float32)}, [envs])
                with torch.no_grad():
                    actor(row)
                seen, rewards, ends, cuts, infos = env.step(row["action"].argmax(-1).numpy())
                after = torch.as_tensor(seen, dtype=torch.float32).clone()
                terminated, truncated = torch.from_numpy(ends), torch.from_numpy(cuts)
                done = terminated | truncated
                for j in done.nonzero().flatten().tolist():  # the observation that ended the episode
                    after[j] = torch.as_tensor(infos["final_obs"][j])
                flags = {
                    "done": done,
                    "terminated": terminated,
                    "reward": torch.as_tensor(rewards, dtype=torch.float32),
                }
                row["next"] = TensorDict({"obs": after, **{k: x.unsqueeze(-1) for k, x in flags.items()}}, [envs])
                rows.append(row)
                length += 1
                finished += length[done].tolist()
                length[done] = 0
            batch = torch.stack(rows, 1)
            marks.append(time.perf_counter())
            advantages(batch)
            marks.append(time.perf_counter())
            flat = batch.reshape(-1)
            for _ in range(4):
                for index in torch.randperm(len(flat)).split(minibatch):
                    losses = loss_of(flat[index])
                    loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                    optimizer.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(loss_of.parameters(), 0.5)
                    optimizer.step()
            marks.append(time.perf_counter())
            for part, start, end in zip(seconds, marks, marks[1:], strict=False):
                seconds[part] += end - start
            if finished:
                curve.append(((i + 1) * steps * envs, sum(finished[-50:]) / len(finished[-50:])))
    return {"seconds": sum(seconds.values()), "parts": seconds, "curve": curve}
