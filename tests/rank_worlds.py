"""What a rank of tests/test_torchrun.py does: `python rank_worlds.py FOLDER`, with torchrun's variables set.

Everything in float64, once alone and once as one of the ranks, on the same data; the first rank writes both results.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import gymnasium as gym
import language_worlds
import torch
import torch.distributed as dist
import trainer_worlds  # registers its environments  # noqa: F401
from trainer_worlds import Guess, Push, Walk

from ppo_fast.trainer import device, distributed, rollout
from ppo_fast.trainer.control import ControlConfig, Trainer
from ppo_fast.trainer.sharding import full, like

QUIET = {"tensorboard": False, "plot": False, "progress": False}
SMALL = {
    "num_envs": 4, "num_steps": 8, "total_timesteps": 4 * 32, "hidden_sizes": (8,), "learning_rate": 1e-2, "clip_coef": 0.05,
    **QUIET,
}  # fmt: skip


class Deadly(Walk):
    """In its 40th step the rank that DEADLY_RANK names dies, or as DEADLY_HOW says."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 40 and os.environ.get("DEADLY_RANK", "none") == os.environ.get("RANK"):
            if os.environ.get("DEADLY_HOW") == "raise":
                raise RuntimeError("the motor is on fire")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


gym.register("Deadly-v0", entry_point=Deadly)


def masked_guess() -> gym.Env:
    return Guess((3, 2), masked=True)


CONTROL = {
    "same_step": (Walk, {}),
    "next_step": (Walk, {"autoreset": "next_step", "target_kl": 1e-3}),
    "uneven": (Walk, {"num_minibatches": 7, "anneal_clip": True}),
    "smaller_than_the_ranks": (Walk, {"num_minibatches": 32, "update_epochs": 1}),
    "not_normalized": (Walk, {"normalize_advantages": False, "value_coef": 0.0}),
    "normal": (Push, {"normalize_rewards": True}),
    "masked": (masked_guess, {"autoreset": "next_step", "normalize_rewards": True}),
    "async": (Walk, {"vectorization": "async"}),
}
LANGUAGE = {
    "ppo": {"kl_target": 0.22, "kl_horizon": 100.0, "micro_batch": 3, "entropy_coef": 0.01},
    "grpo_of_sequences": {"algorithm": "grpo", "policy": "gspo", "reduction": "seq-mean-token-mean", "kl_in": "loss",
                          "kl_estimator": "k3", "micro_batch": 2},
    "whitened_groups": {"algorithm": "reinforce_plus_plus_baseline", "reduction": "token-sum-norm"},
    "whitened_tokens": {"algorithm": "reinforce_plus_plus", "group_size": 1, "reduction": "seq-mean-token-sum"},
    "smaller_than_the_ranks": {"algorithm": "rloo", "num_minibatches": 12, "micro_batch": 1},
    "adapters": {"lora_rank": 2, "gradient_checkpointing": True},
}  # fmt: skip


def control(ranks: distributed.Ranks, make_env, changes, iterations=4, state=None):
    """Parameters and rows of a run, and its state."""
    trainer = Trainer(ControlConfig(**{**SMALL, **changes}), make_env, ranks)
    try:
        if state is not None:
            assert trainer.load_state_dict(state)
        rows = [trainer.iterate() for _ in range(trainer.now.iteration, iterations)]
        for _, row in rows:
            row.pop("steps_per_second")
        return trainer.net.state_dict(), rows, trainer.state_dict()
    finally:
        trainer.close()


def language(ranks: distributed.Ranks, folder: Path, changes, state=None):
    """Two updates on one rollout: statistics, parameters before and after the second, and the state."""
    trainer = language_worlds.trainer_in(folder, language_worlds.GPT2, ranks=ranks, **changes)
    alone = (
        trainer
        if ranks.alone
        else language_worlds.trainer_in(folder, language_worlds.GPT2, ranks=distributed.ALONE, **changes)
    )
    for t in (trainer, alone):
        if t.policy.value_head is not None:  # not all 0, so that values matter
            weight = t.policy.value_head.weight
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
            with torch.no_grad():
                weight.copy_(like(drawn, weight))
    index = [
        i for i in range(trainer.config.num_responses // trainer.config.group) for _ in range(trainer.config.group)
    ]
    index = [i % len(alone.task.train) for i in index]
    responses = alone.respond(alone.task.train, index)
    scores = alone.score(alone.task.train, index, responses)[0].double()
    block = ranks.block(len(index))
    for name in ("tokens", "attention", "log_prob", "finished"):
        setattr(responses, name, getattr(responses, name)[block])
    if state is not None:
        trainer.load_state_dict(state)
    rows = []
    for _ in range(2 if state is None else 1):
        experience = trainer.learner.experience(responses, scores[block], None)
        rows.append(trainer.learner.update(experience, 1e-2))
        rows[-1]["kl_coef"] = trainer.learner.kl.coef
        trainer.now.iteration += 1
    learned = {name: full(p).detach().clone() for name, p in trainer.policy.learned().items()}
    return learned, rows, trainer.state_dict()


def cases(ranks: distributed.Ranks, folder: Path):
    """Names, and what one rank and all come to."""
    for name, (make_env, changes) in CONTROL.items():
        yield f"control {name}", lambda r, m=make_env, c=changes: control(r, m, c)[:2]
    for name, changes in LANGUAGE.items():
        yield f"language {name}", lambda r, c=changes: language(r, folder, c)[:2]

    def resumed_alone(r):
        """The first half by `r`, the second by one rank."""
        held = r.gather(control(r, Push, {"normalize_rewards": True}, iterations=2)[2])
        return control(distributed.ALONE, Push, {"normalize_rewards": True}, state=held[0])[:2]

    def resumed_together(r):
        state = control(distributed.ALONE, Push, {"normalize_rewards": True}, iterations=2)[2]
        return control(r, Push, {"normalize_rewards": True}, state=state)[:2]

    def language_resumed_alone(r):
        state = r.gather(language(r, folder, LANGUAGE["ppo"])[2])[0]
        return language(distributed.ALONE, folder, LANGUAGE["ppo"], state=state)[:2]

    def language_resumed_together(r):
        state = language(distributed.ALONE, folder, LANGUAGE["ppo"])[2]
        return language(r, folder, LANGUAGE["ppo"], state=state)[:2]

    yield "control resumed alone", resumed_alone
    yield "control resumed together", resumed_together
    yield "language resumed alone", language_resumed_alone
    yield "language resumed together", language_resumed_together
    yield "observation statistics", lambda r: observation_statistics(r)


def observation_statistics(ranks: distributed.Ranks):
    """After one rollout, in which nothing was learned yet, those of the same observations; later they stay alike."""
    config = ControlConfig(**{**SMALL, "env_id": "Walk-v0", "normalize_observations": True, "autoreset": "next_step"})
    trainer = Trainer(config, None, ranks)
    try:
        trainer.net.actor[-1].weight.data.zero_()  # the actions do not depend on what is seen
        trainer._collect()
        moments = trainer.obs_normalizer.moments.state_dict()
        everywhere = ranks.gather(moments)
        return moments, [[bool((m["m2"] == moments["m2"]).all()) for m in everywhere] == [True] * ranks.size]
    finally:
        trainer.close()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    device.Twin.__init__.__defaults__ = (torch.float64,)
    rollout.upload = lambda x, _: x.double() if x.is_floating_point() else x
    own = folder / f"rank{os.environ['RANK']}"
    own.mkdir()
    found = {}
    with distributed.joined(ControlConfig(**SMALL)) as ranks:
        for name, run in cases(ranks, own):
            try:
                found[name] = run(distributed.ALONE), run(ranks)
            except Exception:
                if ranks.leads:
                    print(f"{name} failed", flush=True)
                traceback.print_exc()
                raise
    assert not dist.is_initialized()
    if ranks.leads:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
