"""Policy and value network: two tanh MLPs whose parameters and gradients are one flat vector each.

At 64 units and 128 rows a step of autograd, clipping and Adam spends most of its time between the operations, not in
them. So all parameters are views of one vector: clipping is one norm, Adam updates one tensor. And forward and backward
of both networks are written out in one autograd node, which takes half the time of the twenty that autograd would make.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class MLP:
    """Linear layers with tanh between them; weights and gradients are views into flat vectors."""

    def __init__(self, sizes: list[int], flat: Tensor, grad: Tensor) -> None:
        self.weights: list[Tensor] = []  # [out, in]
        self.biases: list[Tensor] = []
        self.weight_grads: list[Tensor] = []
        self.bias_grads: list[Tensor] = []
        at = 0
        for fan_in, fan_out in pairwise(sizes):
            end = at + fan_in * fan_out
            self.weights.append(flat[at:end].view(fan_out, fan_in))
            self.weight_grads.append(grad[at:end].view(fan_out, fan_in))
            at, end = end, end + fan_out
            self.biases.append(flat[at:end])
            self.bias_grads.append(grad[at:end])
            at = end
        self.transposed = [w.t() for w in self.weights]

    @staticmethod
    def size(sizes: list[int]) -> int:
        return sum(fan_in * fan_out + fan_out for fan_in, fan_out in pairwise(sizes))

    def init(self, last_gain: float, generator: torch.Generator) -> None:
        """Orthogonal weights with gain √2, `last_gain` in the last layer; biases 0."""
        last = len(self.weights) - 1
        for i, weight in enumerate(self.weights):
            torch.nn.init.orthogonal_(weight, last_gain if i == last else math.sqrt(2.0), generator=generator)
        for bias in self.biases:
            bias.zero_()

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], without a graph."""
        last = len(self.weights) - 1
        for i, weight in enumerate(self.transposed):
            x = torch.addmm(self.biases[i], x, weight)
            if i < last:
                x.tanh_()
        return x

    def layer_inputs(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What `backward` needs, the input of each layer, and the output."""
        inputs = [x]
        for i, weight in enumerate(self.transposed[:-1]):
            inputs.append(torch.addmm(self.biases[i], inputs[-1], weight).tanh_())
        return inputs, torch.addmm(self.biases[-1], inputs[-1], self.transposed[-1])

    def backward(self, inputs: list[Tensor], grad: Tensor) -> None:
        """Writes the gradients of all weights and biases, given that of the output."""
        for i in range(len(self.weights) - 1, -1, -1):
            torch.mm(grad.t(), inputs[i], out=self.weight_grads[i])
            torch.sum(grad, 0, out=self.bias_grads[i])
            if i:
                grad = torch.ops.aten.tanh_backward(grad @ self.weights[i], inputs[i])


class Forward(NamedTuple):
    """A forward pass: leaves for a loss to put gradients on, and what `ActorCritic.backward` needs."""

    params: Tensor  # logits or means, [rows, num_params]
    values: Tensor  # [rows]
    log_std: Tensor
    actor_inputs: list[Tensor]
    critic_inputs: list[Tensor]


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


class ActorCritic:
    """CleanRL's agent: separate tanh MLPs for policy and value, and log_std that does not depend on the state.

    `flat` and `grad` are what an optimiser takes; `named_parameters` are views of `flat`. `log_std` has `num_log_std`
    entries, 0 for discrete actions.
    """

    def __init__(
        self,
        obs_dim: int,
        num_params: int,
        num_log_std: int,
        hidden: tuple[int, ...],
        initial_log_std: float,
        generator: torch.Generator,
    ) -> None:
        actor_sizes, critic_sizes = [obs_dim, *hidden, num_params], [obs_dim, *hidden, 1]
        a, c = MLP.size(actor_sizes), MLP.size(critic_sizes)
        self.flat = torch.zeros(a + c + num_log_std)
        self.grad = torch.zeros_like(self.flat)
        self.actor = MLP(actor_sizes, self.flat[:a], self.grad[:a])
        self.critic = MLP(critic_sizes, self.flat[a : a + c], self.grad[a : a + c])
        self.log_std, self.log_std_grad = self.flat[a + c :], self.grad[a + c :]
        self.actor.init(0.01, generator)
        self.critic.init(1.0, generator)
        self.log_std.fill_(initial_log_std)

    def forward(self, obs: Tensor) -> Forward:
        """[rows, obs] through both networks."""
        actor_inputs, params = self.actor.layer_inputs(obs)
        critic_inputs, values = self.critic.layer_inputs(obs)
        values, log_std = values.view(-1), self.log_std.clone()
        for leaf in (params, values, log_std):
            leaf.requires_grad_()
        return Forward(params, values, log_std, actor_inputs, critic_inputs)

    def backward(self, out: Forward) -> None:
        """Carries the gradients that a loss left on `out` to `grad`, in place of what was there."""
        self.actor.backward(out.actor_inputs, _gradient(out.params))
        self.critic.backward(out.critic_inputs, _gradient(out.values).view(-1, 1))
        self.log_std_grad.copy_(_gradient(out.log_std))

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_: scales the gradient to `max_norm` where it is longer; the norm before."""
        norm = torch.linalg.vector_norm(self.grad)
        self.grad.mul_((max_norm / (norm + 1e-6)).clamp_(max=1.0))
        return norm

    def named_parameters(self) -> dict[str, Tensor]:
        named = {}
        for name, mlp in (("actor", self.actor), ("critic", self.critic)):
            for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
                named[f"{name}.{i}.weight"], named[f"{name}.{i}.bias"] = weight, bias
        if self.log_std.numel():
            named["log_std"] = self.log_std
        return named

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.named_parameters().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        named = self.named_parameters()
        shapes = {name: tuple(value.shape) for name, value in named.items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != given:
            raise ValueError(f"parameters of shapes {given}, expected {shapes}")
        for name, value in named.items():
            value.copy_(state[name])
