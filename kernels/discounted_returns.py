"""Discounted returns R_t = r_t + γ·R_{t+1}, started from `last_values`: gae's advantages with V = 0 and λ = 1.

Bytes a step, float32 with bool `terminated`: 9 (reward, flag; return). The scan is `_scan`'s.
"""

from __future__ import annotations

import triton.language as tl

from . import _scan
from ._rows import example


def discounted_returns(
    rewards, last_values, terminated, truncated, final_values, mask, gamma, time_dim, is_double, returns, resources=None
):
    _scan.scan(
        rewards, None, None, last_values, terminated, truncated, final_values, mask, True, None, gamma, 1.0, time_dim,
        (returns, None),
    )  # fmt: skip


_F32 = {x: "*fp32" for x in ("rewards", "last_values", "first")} | {"terminated": "*i1"}
_ROWS = {"CARRY": True, "TIME_MAJOR": False, "DTYPE": tl.float32, "LANES": _scan.LANES, "STEPS": _scan.STEPS}

AOT = [
    example(_scan.scan_columns, _F32, _ROWS | {"TIME_MAJOR": True, "AHEAD": True}, num_warps=1),
    example(_scan.scan_rows, _F32, _ROWS, num_warps=1),
]
