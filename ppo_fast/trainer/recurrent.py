"""Policies with a memory: an LSTM or GRU in front of actor and critic, for observations that do not tell everything.

The memory is empty when an episode begins and is carried from one rollout to the next. For the update a rollout is cut
into sequences: at episode ends, and every `--sequence-length` steps. A sequence starts from what the memory held there
in the rollout. A minibatch is whole sequences side by side, the shorter ones filled up at their end. Fillings leave
right after the memory, before the networks and the loss, so no mean and no gradient counts a step that does not exist.

torch also takes sequences packed, without fillings; on a CPU its LSTM is then many times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .device import upload
from .learner import Learner
from .networks import ActorCritic, without_modules
from .normalize import RewardNormalizer
from .policies import Batch
from .rollout import Collector


class RecurrentActorCritic(ActorCritic):
    """One memory that actor and critic share; they are the networks of `ActorCritic`, on what it puts out.

    A state of the memory is one row: its output h [size], then for an LSTM its cell c [size]. Zeros are the empty one.
    """

    def __init__(
        self,
        obs_dim: int,
        num_params: int,
        num_log_std: int,
        hidden: tuple[int, ...],
        initial_log_std: float,
        generator: torch.Generator,
        *,
        kind: str,
        size: int,
    ) -> None:
        super().__init__(size, num_params, num_log_std, hidden, initial_log_std, generator)
        self.size, self.is_lstm = size, kind == "lstm"
        self.state_size = size * (1 + self.is_lstm)
        made = nn.LSTM if self.is_lstm else nn.GRU
        self.memory = made(obs_dim, size, device="meta").to_empty(device="cpu")  # draws nothing
        for name, parameter in self.memory.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def remember(self, obs: Tensor, state: Tensor) -> Tensor:
        """One step of the memory: [N, obs] and the state before it, [N, state_size] -> the state after it."""
        weights = self.memory.all_weights[0]
        if self.is_lstm:
            return torch.cat(torch.lstm_cell(obs, state.chunk(2, -1), *weights), -1)
        return torch.gru_cell(obs, state, *weights)

    def values(self, state: Tensor) -> Tensor:
        """V of the observations that brought the memory to these states, [..., state_size] -> [...]."""
        return self.critic(state[..., : self.size]).squeeze(-1)

    def forward(  # type: ignore[override]
        self, obs: Tensor, there: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sequences side by side, obs [L, S, obs], from state [S, state_size]: parameters and values of the steps `there`.

        What follows the end of a sequence reaches nothing before it, and what it gives is left out: no gradient either.
        """
        start = tuple(x.contiguous()[None] for x in state.split(self.size, -1))
        seen, _ = self.memory(obs, start if self.is_lstm else start[0])
        return super().forward(seen.view(-1, self.size)[there])


class RecurrentCollector(Collector):
    """`states[t]` is the memory after step t - 1, also where an episode ended there: V of its last observation needs it.

    `begins[t]` says where an episode begins at t: there the memory is empty, whatever `states[t]` holds.
    """

    net: RecurrentActorCritic

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        t, n = self.rewards.shape
        self.states = torch.zeros(t + 1, n, self.net.state_size, device=self.device)
        self.begins = np.zeros((t + 1, n), bool)

    def collect(self) -> None:
        self.states[0].copy_(self.before(slice(-1, None))[0])
        self.begins[0] = False
        super().collect()
        self._mark(len(self.rewards))

    def before(self, steps: slice) -> Tensor:
        """The memory as these steps find it, [steps, N, state_size]."""
        begins = upload(torch.from_numpy(self.begins[steps]), self.device)
        return self.states[steps].masked_fill(begins[..., None], 0.0)

    def _mark(self, t: int) -> None:
        """Where an episode begins at t > 0: after an end, or after the filler step that next-step autoreset puts there."""
        if self.config.autoreset == "same_step":
            np.logical_or(self.terminated[t - 1], self.truncated[t - 1], out=self.begins[t])
        else:
            np.logical_not(self.valid[t - 1], out=self.begins[t])

    def _actor(self) -> Callable[[int, Tensor], Tensor]:
        net, states, begins, actor = self.net, self.states, self.begins, without_modules(self.net.actor)

        def forward(t: int, obs: Tensor) -> Tensor:
            if t:
                self._mark(t)
            before = self.before(slice(t, t + 1))[0] if begins[t].any() else states[t]
            after = states[t + 1].copy_(net.remember(obs, before))
            return actor(after[:, : net.size])

        return forward

    def values(self) -> Tensor:
        last = self.net.remember(self.obs[-1], self.before(slice(-1, None))[0])
        return self.net.values(torch.cat([self.states[1:], last[None]]))

    def _final(self, obs: Tensor, index: Tensor) -> Tensor:
        after = self.states[1:].view(-1, self.net.state_size)[index]
        return self.net.values(self.net.remember(obs, after))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "memory": self.before(slice(-1, None))[0].to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.states[-1].copy_(state["memory"])
        self.begins[-1] = False


class Sequences(NamedTuple):
    """Where the sequences of a rollout lie in its flat rows t·N + n, on the host; those of a strip stay together."""

    first: np.ndarray  # [S], first row
    length: np.ndarray  # [S]
    strip: np.ndarray  # [S], 0 ... strips - 1
    num_envs: int


def find_sequences(begins: np.ndarray, valid: np.ndarray, longest: int) -> Sequences:
    """Cuts a rollout [T, N] where episodes begin and every `longest` steps; `longest` steps of an environment are a strip.

    Steps that are not valid belong to none; they must stand before a step where an episode begins, or at the end.
    """
    t, n = begins.shape
    step, env = np.divmod(np.arange(t * n).reshape(t, n), n)
    cut = begins | (step % longest == 0)
    rows = (step * n + env).T[valid.T]  # environment by environment, in the order of time
    starts = np.flatnonzero(cut.T[valid.T])
    first = rows[starts]
    length = np.diff(starts, append=len(rows))
    return Sequences(first, length, first // n // longest * n + first % n, n)


class Padded(NamedTuple):
    """A minibatch of sequences side by side, the shorter ones filled up with their first step again."""

    grid: Tensor  # [L, S], rows of the rollout
    there: Tensor  # [M], where in the flat grid the steps are that exist
    state: Tensor  # [S, state_size], the memory where they start

    @property
    def rows(self) -> Tensor:
        return self.grid.view(-1)[self.there]


def pad(sequences: Sequences, chosen: np.ndarray, states: Tensor) -> Padded:
    """The `chosen` sequences of a rollout; `states` [sequences, state_size] is the memory where each starts."""
    first, length = sequences.first[chosen], sequences.length[chosen]
    step = np.arange(length.max())[:, None]
    there = step < length
    grid = np.where(there, first + step * sequences.num_envs, first)
    parts = (grid, np.flatnonzero(there), chosen)
    rows, exist, which = (upload(torch.from_numpy(x), states.device) for x in parts)
    return Padded(rows, exist, states[which])


class RecurrentBatch(Batch):
    """A rollout with its sequences, and the memory where they start."""

    __slots__ = ("sequences", "states")

    def __init__(self, rows: Batch, sequences: Sequences, states: Tensor) -> None:
        super().__init__(
            rows.obs, rows.actions, rows.action_mask, rows.log_prob, rows.values, rows.advantages, rows.returns
        )
        self.sequences, self.states = sequences, states


class RecurrentLearner(Learner):
    """Minibatches are whole strips: whole sequences, and as many rows in each as can be."""

    net: RecurrentActorCritic

    def batch(self, rollout: Collector, normalizer: RewardNormalizer | None) -> RecurrentBatch:
        assert isinstance(rollout, RecurrentCollector)
        longest = self.config.sequence_length or self.config.num_steps
        sequences = find_sequences(rollout.begins[:-1], rollout.valid, longest)
        starts = upload(torch.from_numpy(sequences.first), self.device)
        states = rollout.before(slice(0, -1)).view(-1, self.net.state_size)[starts]
        return RecurrentBatch(super().batch(rollout, normalizer), sequences, states)

    def pieces(self, batch: Batch, rows: Tensor) -> Iterator[tuple[Padded, float]]:
        assert isinstance(batch, RecurrentBatch)
        strips = self.config.num_strips
        order = torch.randperm(strips, generator=self.generator)
        for strip in order.tensor_split(min(self.config.num_minibatches, strips)):
            chosen = np.flatnonzero(np.isin(batch.sequences.strip, strip.numpy()))
            if len(chosen):  # strips of one step may hold nothing but fillers
                yield pad(batch.sequences, chosen, batch.states), 1.0

    def forward(self, batch: Batch, index: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *self.net(batch.obs[index.grid], index.there, index.state), index.rows
