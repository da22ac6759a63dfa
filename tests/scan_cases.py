"""Inputs for the tests of gae, vtrace and discounted_returns, and oracles written from the definitions."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLAGS = (torch.bool, torch.uint8, torch.int32, torch.float32)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in other memory."""
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "gaps":
        return torch.stack([x, torch.full_like(x, 1)], -1)[..., 0]
    if how == "wider":
        return torch.cat([x, torch.ones_like(x)], 1)[:, : x.shape[1]]
    return x


LAYOUTS = ("plain", "transposed", "gaps", "wider")


@st.composite
def cases(draw):
    """[T, N] inputs as keyword arguments, with NaN wherever nothing may be read; floats are seeded, choices drawn."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps, columns = draw(st.integers(0, 150)), draw(st.sampled_from((0, 1, 2, 3, 7, 8, 16, 17, 40)))
    dtype, flag = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(FLAGS))
    shape = (steps, columns)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    def flags(p):
        return torch.rand(shape, generator=generator) < p

    case = {"rewards": normal(*shape), "values": normal(*shape), "log_rhos": normal(*shape) * 0.5}
    case["last_values"] = normal(columns) if draw(st.booleans()) else None
    terminated = flags(0.1) if draw(st.booleans()) else None
    truncated = flags(0.1) if draw(st.booleans()) else None
    mask = flags(draw(st.sampled_from((0.0, 0.5, 0.9)))) if draw(st.booleans()) else None
    case["mask_mode"] = draw(st.sampled_from(("carry", "zero")))
    final = None
    if truncated is not None:
        read = truncated if terminated is None else truncated & ~terminated
        final = torch.where(read, normal(*shape), torch.nan)
    if mask is not None:
        for name in ("rewards", "values", "log_rhos"):
            case[name] = torch.where(mask, case[name], torch.nan)
        if final is not None and case["mask_mode"] == "carry":
            final = torch.where(mask, final, torch.nan)
    for name in ("rewards", "values", "log_rhos"):
        case[name] = strided(case[name], draw(st.sampled_from(LAYOUTS)))
    case["terminated"] = None if terminated is None else terminated.to(flag)
    case["truncated"] = None if truncated is None else strided(truncated.to(flag), draw(st.sampled_from(LAYOUTS)))
    case["mask"] = None if mask is None else mask.to(flag)
    if final is not None and draw(st.booleans()):
        index = (~final.isnan()).flatten().nonzero().squeeze(1)
        index = index[torch.randperm(len(index), generator=generator)]
        case["final_values"] = (index, final.flatten()[index])
    else:
        case["final_values"] = final
    for name in ("gamma", "lam"):
        per_row = draw(st.booleans())
        case[name] = torch.rand(columns, generator=generator) if per_row else draw(st.sampled_from((0.0, 0.9, 1.0)))
    return case


@st.composite
def carried_cases(draw):
    """Where masked steps are passed over: there a final value is not read either."""
    case = draw(cases())
    case["mask_mode"] = "carry"
    if isinstance(case["final_values"], torch.Tensor) and case["mask"] is not None:
        case["final_values"] = torch.where(case["mask"] != 0, case["final_values"], torch.nan)
    return case


def assert_moments(moments: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Of the advantages that the mask keeps, summed in their own dtype by the tile and in float64 from there on."""
    count, mean, m2 = moments.tolist()
    assert moments.dtype == torch.float64 and moments.shape == (3,)
    x = (advantages if mask is None else advantages[mask != 0]).double()
    assert count == x.numel()
    if count == 0:
        assert mean == 0 and m2 == 0
        return
    eps, size = torch.finfo(advantages.dtype).eps, float(x.abs().max())
    truth = float((x - x.mean()).square().sum())
    assert abs(mean - float(x.mean())) <= 4 * eps * size
    assert abs(m2 - truth) <= 32 * eps * truth + count * (2 * eps * size) ** 2


def transposed(case: dict) -> dict:
    """The same trajectories as [N, T]."""
    flat = case["final_values"]
    out = {k: v.t() if isinstance(v, torch.Tensor) and v.ndim == 2 else v for k, v in case.items()}
    if isinstance(flat, tuple):
        steps, columns = case["rewards"].shape
        out["final_values"] = (flat[0] % columns * steps + flat[0] // columns, flat[1])
    return out | {"time_dim": 1}


def double(case: dict) -> dict:
    def as_double(x):
        if isinstance(x, tuple):
            return x[0], x[1].double()
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {k: as_double(v) for k, v in case.items()}


def dense_final(case: dict) -> np.ndarray:
    final = case["final_values"]
    shape = tuple(case["rewards"].shape)
    if final is None:
        return np.zeros(shape)
    if isinstance(final, tuple):
        dense = torch.zeros(shape, dtype=torch.float64).flatten()
        dense[final[0]] = final[1].double()
        return dense.view(shape).numpy()
    return final.double().numpy()


def steps_of_column(case: dict, n: int) -> list[dict]:
    """The steps that count, in order, each with the V that follows it and whether the trace goes on."""
    steps = case["rewards"].shape[0]
    carry = case.get("mask_mode", "carry") == "carry"
    final = dense_final(case)

    def on(name, t):
        return case[name] is not None and bool(case[name][t, n] != 0)

    out = []
    for t in range(steps):
        masked = case["mask"] is not None and not on("mask", t)
        if masked and carry:
            continue
        out.append({
            "t": t, "masked": masked, "terminated": on("terminated", t), "truncated": on("truncated", t),
            "final": final[t, n],
            **{k: 0.0 if masked else float(case[k][t, n]) for k in ("rewards", "values", "log_rhos")},
        })  # fmt: skip
    last = 0.0 if case["last_values"] is None else float(case["last_values"][n])
    for i, step in enumerate(out):
        after = out[i + 1]["values"] if i + 1 < len(out) else last
        step["next"] = 0.0 if step["terminated"] else step["final"] if step["truncated"] else after
        step["goes_on"] = not (step["terminated"] or step["truncated"]) and i + 1 < len(out)
        step["ended"] = step["terminated"] or step["truncated"]
    return out


def rate(x, n: int) -> float:
    return float(x[n]) if isinstance(x, torch.Tensor) else x
