"""V-trace targets and advantages (arXiv 1802.01561, eq. 1), with ratios ρ = exp(log_rhos) clipped at ρ̄ and c̄.

Bytes a step, float32 with bool `terminated`: 21 (ratio, reward, value, flag; target, advantage). The scan is `_scan`'s.
"""

from __future__ import annotations

import triton.language as tl

from . import _scan
from ._rows import example


def vtrace(
    log_rhos, rewards, values, last_values, terminated, truncated, final_values, mask, gamma, lam, rho_clip, c_clip,
    time_dim, is_double, targets, advantages, resources=None,
):  # fmt: skip
    _scan.scan(
        rewards, values, log_rhos, last_values, terminated, truncated, final_values, mask, True, None, gamma, lam,
        time_dim, (targets, advantages), (rho_clip, c_clip),
    )  # fmt: skip


_F32 = {x: "*fp32" for x in ("rewards", "values", "log_rhos", "last_values", "first", "second")} | {"terminated": "*i1"}
_ALL = _F32 | {"truncated": "*i1", "final_values": "*fp32", "mask": "*i1", "gammas": "*fp32", "lams": "*fp32"}
_ROWS = {"CARRY": True, "TIME_MAJOR": False, "DTYPE": tl.float32, "LANES": _scan.LANES, "STEPS": _scan.STEPS}

AOT = [
    example(_scan.scan_columns, _F32, _ROWS | {"TIME_MAJOR": True, "AHEAD": True}, num_warps=1),
    example(_scan.scan_columns, _ALL, _ROWS | {"AHEAD": False}, num_warps=1),
    example(_scan.scan_rows, _ALL, _ROWS, num_warps=1),
]
