"""Generalised advantage estimation: δ_t = r_t + γ·V_{t+1} - V_t, A_t = δ_t + γλ·A_{t+1}, returns = A + V.

Bytes a step, float32 with bool `terminated`: 17 (reward, value, flag; advantage, return), with or without moments. The scan is
`_scan`'s.
"""

from __future__ import annotations

import triton.language as tl

from . import _scan
from ._rows import example


def gae(
    rewards, values, last_values, terminated, truncated, final_values, mask, mask_mode, cu_seqlens, gamma, lam, time_dim,
    is_double, advantages, returns, moments=None, resources=None,
):  # fmt: skip
    _scan.scan(
        rewards, values, None, last_values, terminated, truncated, final_values, mask, mask_mode == "carry", cu_seqlens,
        gamma, lam, time_dim, (advantages, returns), moments=moments,
    )  # fmt: skip


_F32 = {x: "*fp32" for x in ("rewards", "values", "last_values", "first", "second")} | {"terminated": "*i1"}
_ALL = _F32 | {"values": "*bf16", "truncated": "*i1", "final_values": "*fp32", "mask": "*i1", "gammas": "*fp32"}
_F64 = {x: t.replace("fp32", "fp64").replace("bf16", "fp64") for x, t in _ALL.items()}
_MOMENTS = {"moments": "*fp64"}
_ROWS = {"CARRY": True, "TIME_MAJOR": False, "DTYPE": tl.float32, "LANES": _scan.LANES, "STEPS": _scan.STEPS}
_COLUMNS = _ROWS | {"TIME_MAJOR": True, "AHEAD": True}

AOT = [
    example(_scan.scan_columns, _F32, _COLUMNS, num_warps=1),
    example(_scan.scan_columns, _ALL, _COLUMNS, num_warps=1),
    example(_scan.scan_columns, _ALL, _COLUMNS | {"CARRY": False}, num_warps=1),
    example(_scan.scan_columns, _F64, _COLUMNS | {"DTYPE": tl.float64}, num_warps=1),
    example(_scan.scan_rows, _F32, _ROWS, num_warps=1),
    example(_scan.scan_rows, _ALL | {"bounds": "*i32"}, _ROWS, num_warps=1),
    example(_scan.scan_rows, _ALL, _ROWS | {"CARRY": False}, num_warps=1),
    example(_scan.scan_rows, _F64, _ROWS | {"DTYPE": tl.float64}, num_warps=1),
    example(_scan.scan_columns, _F32 | _MOMENTS, _COLUMNS, num_warps=1),
    example(_scan.scan_columns, _F64 | _MOMENTS, _COLUMNS | {"DTYPE": tl.float64}, num_warps=1),
    example(_scan.scan_rows, _ALL | _MOMENTS, _ROWS, num_warps=1),
    example(_scan.scan_rows, _F64 | _MOMENTS, _ROWS | {"DTYPE": tl.float64}, num_warps=1),
]
