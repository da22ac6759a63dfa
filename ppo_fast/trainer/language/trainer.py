"""The state of a run and one iteration of it; no files, no output.

An iteration samples num-responses responses, group-size to a prompt, scores them, and updates. Between two iterations the
whole state is plain data: parameters, optimiser, KL coefficient, generators, the order of prompts, counters.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import checkpoint
from ..compress import MISMATCH, check, compressed, mismatch
from ..distributed import ALONE, Ranks
from ..errors import UserError
from ..sharding import gathered, like
from .config import LanguageConfig
from .learner import Experience, Learner
from .model import Policy
from .prompts import Prompts
from .rewards import Reward, score
from .sampling import Responses, joined, sample

COLUMNS = (
    "iteration", "responses", "tokens", "reward", "reward_std", "eval_reward", "length", "finished", "entropy", "kl", "kl_coef",
    "learning_rate", "policy_loss", "value_loss", "approx_kl", "clip_fraction", "explained_variance", "grad_norm",
    "log_prob_error", *MISMATCH, "seconds",
)  # fmt: skip


@dataclass
class Now:
    """Where a run stands."""

    iteration: int = 0
    responses: int = 0
    tokens: int = 0
    first_eval: float = float("nan")  # mean greedy reward on held-out prompts: before training …
    last_eval: float = float("nan")  # … and when last measured
    reward: float = float("nan")
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("warm start", "sampling", "reward", "experience", "update", "evaluation"), 0.0
        )
    )

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@dataclass
class Task:
    """Prompts to train on, those held out, and what scores their completions."""

    train: Prompts
    held_out: Prompts | None
    reward: Reward


class Trainer:
    """`causal` and `tokenizer` are where training starts; the reference is a copy of them."""

    def __init__(
        self, config: LanguageConfig, causal: Any, tokenizer: PreTrainedTokenizerBase, task: Task, device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        check(config)
        if not ranks.alone and config.rollout_policy != "full":
            raise UserError(f"--rollout-policy: expected full on {ranks.size} ranks, got {config.rollout_policy}")
        self.config, self.tokenizer, self.task, self.device, self.ranks = config, tokenizer, task, device, ranks
        self._seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.policy = Policy(causal, config, device)
        ranks.shard(self.policy)
        self.learner = Learner(config, self.policy, self.generator, ranks)
        if not ranks.alone:
            self._seed(ranks.seed(config.seed))  # the parameters are there: from here on each rank draws its own
        self.sampler = torch.Generator(device).manual_seed(ranks.seed(config.seed))
        self.ends = end_tokens(causal, tokenizer, device)
        self.order, self.at = torch.empty(0, dtype=torch.int64), 0
        self.now = Now()
        self._since = time.perf_counter()

    @staticmethod
    def _seed(seed: int) -> None:
        """The global generators, for reward functions that use them."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    # --- the parts of an iteration --------------------------------------------------------------------------------------

    def _clock(self, what: str) -> None:
        """The time since the last call goes to `what`."""
        if self.device.type != "cpu":
            torch.cuda.synchronize(self.device)
        before, self._since = self._since, time.perf_counter()
        self.now.seconds[what] += self._since - before

    def _next_prompts(self) -> list[int]:
        """Prompts in random order, each once before one comes again; of those of all ranks, this one's."""
        taken: list[int] = []
        count = self.config.num_responses // self.config.group
        while len(taken) < count:
            if self.at == len(self.order):
                self.order, self.at = torch.randperm(len(self.task.train), generator=self.generator), 0
            stop = self.at + count - len(taken)
            more = self.order[self.at : stop].tolist()
            self.at += len(more)
            taken += more
        return taken[self.ranks.block(count)]

    def respond(self, prompts: Prompts, index: list[int], greedy: bool = False) -> Responses:
        config, pad = self.config, int(self.tokenizer.pad_token_id or 0)
        parts = [
            sample(
                self.policy, [prompts.tokens[i] for i in index[begin : begin + config.sampling_batch]],
                max_new_tokens=config.max_new_tokens, pad=pad, ends=self.ends, generator=None if greedy else self.sampler,
                temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            )
            for begin in range(0, len(index), config.sampling_batch)
        ]  # fmt: skip
        return joined(parts, pad)

    def completions(self, responses: Responses) -> list[str]:
        rows = [tokens[mask].tolist() for tokens, mask in zip(responses.targets, responses.mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def score(self, prompts: Prompts, index: list[int], responses: Responses) -> tuple[Tensor, list[str], list[str]]:
        """Rewards [B], prompts and completions."""
        texts, columns = prompts.take(index)
        completions = self.completions(responses)
        rewards = score(self.task.reward, self.config.reward, texts, completions, columns)
        return torch.tensor(rewards, dtype=torch.float32, device=self.device), texts, completions

    def evaluate(self) -> float:
        """Mean reward of greedy answers to the held-out prompts."""
        held_out = self.task.held_out
        if held_out is None:
            return float("nan")
        self._since = time.perf_counter()
        index = list(range(self.ranks.rank, len(held_out), self.ranks.size))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with gathered(self.policy):
            if index:
                total += self.score(held_out, index, self.respond(held_out, index, greedy=True))[0].double().sum()
        self.now.last_eval = float(self.ranks.sum(total)) / len(held_out)
        self._clock("evaluation")
        return self.now.last_eval

    def iterate(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """One rollout and one update; what was answered, and a row of COLUMNS."""
        config, now, task = self.config, self.now, self.task
        if now.iteration == 0:
            now.first_eval = self.evaluate()
        self._since = start = time.perf_counter()
        index = [i for i in self._next_prompts() for _ in range(config.group)]
        with gathered(self.policy):
            with self.policy.standing_in(compressed(self.policy.causal, config)):
                responses = self.respond(task.train, index)
            greedy = self.respond(task.train, index[:: config.group], True) if config.algorithm == "remax" else None
        self._clock("sampling")
        scores, texts, completions = self.score(task.train, index, responses)
        baselines = None
        if greedy is not None:
            baselines = self.score(task.train, index[:: config.group], greedy)[0].repeat_interleave(config.group)
        self._clock("reward")
        experience = self.learner.experience(responses, scores, baselines)
        self._clock("experience")
        learning_rate = config.learning_rate * (1.0 - now.iteration / config.iterations if config.anneal_lr else 1.0)
        learning_rate *= min(1.0, (now.iteration + 1) / max(1, config.warmup_iterations))
        kl_coef = self.learner.kl.coef
        row: dict[str, Any] = self.learner.update(experience, learning_rate)
        self._clock("update")

        now.iteration += 1
        now.responses += config.num_responses
        now.tokens += int(self.ranks.sum(responses.mask.sum()))
        now.reward = float(self.ranks.mean(scores))
        last = now.iteration == config.iterations
        evaluated = self.evaluate() if last or now.iteration % config.eval_every == 0 else float("nan")
        row.update(describe(responses, scores, experience, config, self.ranks), iteration=now.iteration,
                   responses=now.responses,
                   tokens=now.tokens, eval_reward=evaluated, kl_coef=kl_coef, learning_rate=learning_rate,
                   seconds=time.perf_counter() - start)  # fmt: skip
        shown = range(0, len(index), max(1, len(index) // max(1, config.logged_responses)))[: config.logged_responses]
        samples = [
            {"iteration": now.iteration, "prompt": texts[i], "completion": completions[i], "reward": float(scores[i]),
             "tokens": int(responses.mask[i].sum()), "finished": bool(responses.finished[i]),
             "log_prob": float(experience.old_log_prob[i].sum()), "advantage": float(experience.advantages[i].sum()),
             **({} if experience.kl is None else {"kl": float(experience.kl[i])})}
            for i in shown
        ]  # fmt: skip
        return samples, {name: row[name] for name in COLUMNS}

    @property
    def finished(self) -> bool:
        goal = self.config.stop_at_reward
        return self.now.iteration >= self.config.iterations or (goal is not None and self.now.last_eval >= goal)

    # --- state ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: later training does not change it. That of the run, on the first rank."""
        learned = {"parameters": self.policy.learned(), "optimizer": self.learner.optimizer.state_dict()}
        whole = checkpoint.on_host(learned, keep=self.ranks.leads)
        drawn = self.ranks.collect((self.sampler.get_state(), checkpoint.global_rng_state()))
        if drawn is None:
            return {}
        (sampler, rng), *others = drawn
        return {
            **whole, "kl_coef": self.learner.kl.coef, "order": self.order, "at": self.at,
            "generator": self.generator.get_state(), "sampler": sampler, "global_rng": rng, "now": asdict(self.now),
            **({"other_ranks": [list(states) for states in others]} if others else {}),
        }  # fmt: skip

    def weights(self) -> dict[str, Tensor] | None:
        """What to save the model from, where it is sharded: on the host of the first rank."""
        if self.ranks.alone:
            return None
        named = list(self.policy.causal.named_parameters(remove_duplicate=False))
        kept: dict[int, Any] = {}  # a tied weight once
        for _, p in named:
            if id(p) not in kept:
                kept[id(p)] = checkpoint.on_host(p, self.ranks.leads)
        return {name: kept[id(p)] for name, p in named} if self.ranks.leads else None

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Puts everything back, exactly; where the number of ranks is another, random numbers that each draws start anew."""
        learned = self.policy.learned()
        if learned.keys() != state["parameters"].keys():
            raise ValueError("parameters of another model")
        with torch.no_grad():
            for name, parameter in learned.items():
                if parameter.shape != state["parameters"][name].shape:
                    raise ValueError(f"{name} has another shape")
                parameter.copy_(like(state["parameters"][name], parameter))
        moments = {
            i: {k: like(x, self.learner.parameters[i]) if k.startswith("exp_avg") else x for k, x in held.items()}
            for i, held in state["optimizer"]["state"].items()
        }
        self.learner.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.learner.kl.coef = float(state["kl_coef"])
        self.order, self.at = state["order"], int(state["at"])
        self.generator.set_state(state["generator"])
        self.now = Now(**state["now"])
        drawn = [(state["sampler"], state["global_rng"]), *state.get("other_ranks", [])]
        if self.ranks.rank < len(drawn):
            sampler, rng = drawn[self.ranks.rank]
            self.sampler.set_state(sampler)
            checkpoint.set_global_rng_state(rng)
        else:
            seed = self.ranks.seed(self.config.seed, self.now.iteration)
            self.sampler.manual_seed(seed)
            self._seed(seed)
        return True


def end_tokens(causal: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tensor:
    """Tokens that end a response: the tokenizer's, and those of the model's generation config."""
    more = getattr(getattr(causal, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [] if more is None else [more])}
    return torch.tensor(sorted(ends), device=device)


def describe(
    responses: Responses, scores: Tensor, experience: Experience, config: LanguageConfig, ranks: Ranks
) -> dict[str, float]:
    """Statistics of a rollout, of all ranks, read from the device at once."""
    mask, nan = experience.mask, float("nan")
    count = ranks.sum(mask.sum())
    error = torch.where(responses.mask, responses.log_prob - experience.old_log_prob, 0.0).abs().max()
    explained = torch.tensor(nan, device=mask.device)
    if experience.values is not None and experience.returns is not None:
        returns = experience.returns[mask]
        variance, rest = ranks.variance(returns), ranks.variance(returns - experience.values[mask])
        explained = torch.where(variance > 0, 1.0 - rest / variance, nan)
    kl = torch.tensor(nan) if experience.kl is None else ranks.mean(experience.kl)
    off = mismatch(experience.old_log_prob, responses.log_prob, config, mask)
    if not ranks.alone:
        share = float(mask.sum() / count)
        for name, x in off.items():
            off[name] = ranks.rows(x[None]).max() if name.endswith("max") else ranks.sum(ranks.part(x, share))
    numbers = {
        "reward": ranks.mean(scores), "reward_std": ranks.variance(scores).sqrt(),
        "length": ranks.mean(responses.mask.sum(1).float()), "finished": ranks.mean(responses.finished.float()),
        "entropy": ranks.sum(torch.where(mask, experience.entropy, 0.0).sum()) / count,
        "kl": kl, "explained_variance": explained, "log_prob_error": ranks.rows(error[None]).max(),
        **off,
    }  # fmt: skip
    return dict(zip(numbers, torch.stack([x.float().to(mask.device) for x in numbers.values()]).tolist(), strict=True))
