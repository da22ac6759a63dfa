"""Tianshou: generalised advantage estimation on our kernels.

    from ppo_fast.integrations import tianshou
    tianshou.enable()

replaces `_gae`, which `Algorithm.compute_episodic_return` calls for A2C, PPO, NPG, TRPO, GAIL and Reinforce. Theirs: a numba loop
in `algorithm/algorithm_base.py`, in float64 as ours and about as fast, which every process compiles anew. Updates are theirs.
What lies behind the end of an episode does not reach the steps ahead of it, also where it is NaN.
"""

from __future__ import annotations

import numpy as np
import torch

from .. import discounted_returns
from . import _seam

_seam.require("tianshou", "2.0", "2.1")
from tianshou.algorithm import algorithm_base  # noqa: E402

_theirs = algorithm_base._gae


def _gae(
    v_s: np.ndarray, v_s_: np.ndarray, rew: np.ndarray, end_flag: np.ndarray, gamma: float, gae_lambda: float
) -> np.ndarray:
    """`pf.discounted_returns` of the TD errors, at γλ: next values are of the buffer, not those of the next entry."""
    if (
        rew.ndim != 1
        or not v_s.shape == v_s_.shape == rew.shape == end_flag.shape
        or not 0.0 <= gamma * gae_lambda <= 1.0
    ):
        return _theirs(v_s, v_s_, rew, end_flag, gamma, gae_lambda)
    errors = np.multiply(v_s_, gamma, dtype=np.float64)
    errors += rew
    errors -= v_s
    ends = torch.from_numpy(np.ascontiguousarray(end_flag))
    return discounted_returns(torch.from_numpy(errors), terminated=ends, gamma=gamma * gae_lambda).numpy()


_integration = _seam.Integration(
    "tianshou",
    "tianshou",
    "2.0",
    "2.1",
    [_seam.Seam("tianshou.algorithm.algorithm_base:_gae", _gae, "v_s, v_s_, rew, end_flag, gamma, gae_lambda")],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
