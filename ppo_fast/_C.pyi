# Written by tests/stubs.py from the built module.
from collections.abc import Sequence
from typing import Any, TypeAlias

#: A tensor of any library that speaks DLPack, on the CPU; None where the op does without.
Array: TypeAlias = Any

STATS: tuple[str, ...]

class LossParams:
    """A LossConfig as C++ has it."""

    def __init__(self, numbers: tuple, choices: tuple) -> None: ...

def bernoulli_log_prob(logits: Array, actions: Array, log_prob: Array, entropy: Array, resources: int, /) -> None: ...
def bernoulli_log_prob_backward(
    logits: Array,
    actions: Array,
    grad_log_prob: Array,
    grad_entropy: Array,
    grad_logits: Array,
    resources: int,
    /,
) -> None: ...
def beta_log_prob(
    alpha: Array,
    beta: Array,
    actions: Array,
    low: float,
    high: float,
    log_prob: Array,
    entropy: Array,
    resources: int,
    /,
) -> None: ...
def beta_log_prob_backward(
    alpha: Array,
    beta: Array,
    actions: Array,
    low: float,
    high: float,
    grad_log_prob: Array,
    grad_entropy: Array,
    grad_alpha: Array,
    grad_beta: Array,
    resources: int,
    /,
) -> None: ...
def categorical_log_prob(
    logits: Array,
    actions: Array,
    action_mask: Array,
    rows: Array,
    temperature: float,
    ignore_index: Array,
    log_prob: Array,
    entropy: Array,
    saved: Array,
    resources: int,
    /,
) -> None: ...
def categorical_log_prob_backward(
    logits: Array,
    actions: Array,
    action_mask: Array,
    rows: Array,
    temperature: float,
    entropy: Array,
    saved: Array,
    grad_log_prob: Array,
    grad_entropy: Array,
    grad_logits: Array,
    resources: int,
    /,
) -> None: ...
def categorical_ppo_loss(
    params: LossParams,
    logits: Array,
    actions: Array,
    action_mask: Array,
    index: Array,
    old_log_prob: Array,
    advantages: Array,
    values: Array,
    old_values: Array,
    returns: Array,
    ref_log_prob: Array,
    rollout_log_prob: Array,
    mask: Array,
    weights: Array,
    denominator: float,
    sum: bool,
    loss: Array,
    stats: Array,
    grad_logits: Array,
    grad_values: Array,
    resources: int,
    /,
) -> None: ...
def discounted_returns(
    rewards: Array,
    last_values: Array,
    terminated: Array,
    truncated: Array,
    final_values: Array,
    mask: Array,
    gamma: Array,
    time_dim: int,
    is_double: bool,
    returns: Array,
    resources: int,
    /,
) -> None: ...
def gae(
    rewards: Array,
    values: Array,
    last_values: Array,
    terminated: Array,
    truncated: Array,
    final_values: Array,
    mask: Array,
    mask_mode: Array,
    cu_seqlens: Array,
    gamma: Array,
    lam: Array,
    time_dim: int,
    is_double: bool,
    advantages: Array,
    returns: Array,
    moments: Array,
    resources: int,
    /,
) -> None: ...
def has_overlap(x: Array) -> bool:
    """Whether elements of a tensor may share memory."""

def isa() -> str:
    """Instruction set in use: base, v3 (AVX2) or v4 (AVX-512)."""

def multi_categorical_log_prob(
    logits: Array,
    actions: Array,
    action_mask: Array,
    nvec: Sequence[int],
    log_prob: Array,
    entropy: Array,
    saved: Array,
    resources: int,
    /,
) -> None: ...
def multi_categorical_log_prob_backward(
    logits: Array,
    actions: Array,
    action_mask: Array,
    nvec: Sequence[int],
    saved: Array,
    grad_log_prob: Array,
    grad_entropy: Array,
    grad_logits: Array,
    resources: int,
    /,
) -> None: ...
def normal_log_prob(
    mean: Array,
    log_std: Array,
    actions: Array,
    squash: bool,
    log_prob: Array,
    entropy: Array,
    resources: int,
    /,
) -> None: ...
def normal_log_prob_backward(
    mean: Array,
    log_std: Array,
    actions: Array,
    squash: bool,
    grad_log_prob: Array,
    grad_entropy: Array,
    grad_mean: Array,
    grad_log_std: Array,
    resources: int,
    /,
) -> None: ...
def normal_ppo_loss(
    params: LossParams,
    mean: Array,
    log_std: Array,
    actions: Array,
    squash: bool,
    index: Array,
    old_log_prob: Array,
    advantages: Array,
    values: Array,
    old_values: Array,
    returns: Array,
    ref_log_prob: Array,
    rollout_log_prob: Array,
    mask: Array,
    weights: Array,
    denominator: float,
    sum: bool,
    loss: Array,
    stats: Array,
    grad_mean: Array,
    grad_log_std: Array,
    grad_values: Array,
    resources: int,
    /,
) -> None: ...
def ppo_loss(
    params: LossParams,
    log_prob: Array,
    old_log_prob: Array,
    advantages: Array,
    values: Array,
    old_values: Array,
    returns: Array,
    entropy: Array,
    ref_log_prob: Array,
    rollout_log_prob: Array,
    mask: Array,
    weights: Array,
    denominator: float,
    sum: bool,
    loss: Array,
    stats: Array,
    grad_log_prob: Array,
    grad_values: Array,
    grad_entropy: Array,
    resources: int,
    /,
) -> None: ...
def set_isa(name: str) -> None:
    """For tests and bug reports; an empty name picks the best."""

def vtrace(
    log_rhos: Array,
    rewards: Array,
    values: Array,
    last_values: Array,
    terminated: Array,
    truncated: Array,
    final_values: Array,
    mask: Array,
    gamma: Array,
    lam: Array,
    rho_clip: Array,
    c_clip: Array,
    time_dim: int,
    is_double: bool,
    targets: Array,
    advantages: Array,
    resources: int,
    /,
) -> None: ...
def whiten(
    x: Array,
    mask: Array,
    out: Array,
    moments: Array,
    have_moments: bool,
    ddof: int,
    eps: float,
    shift_mean: bool,
    eps_in_variance: bool,
    resources: int,
    /,
) -> None: ...
