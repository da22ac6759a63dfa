"""linear_log_prob: the head in chunks against all logits at once in float64, its laws, its cost, and its edges."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import as_double, assert_as_good, same_bits
from linear_cases import Cost, H, M, V, example
from torch._dynamo.testing import CompileCounterWithBackend

import ppo_fast as pf
from ppo_fast import reference
from ppo_fast.ops.linear_log_prob import _op


def differentiated(op, x, seeds, **options):
    """(log_prob, entropy, gradients of all leaves)."""
    out = op(**x, **options)
    pairs = [(y, s.to(y.dtype)) for y, s in zip(out, seeds, strict=True) if y is not None]
    leaves = [v for v in x.values() if v.requires_grad]
    grads = torch.autograd.grad([y for y, _ in pairs], leaves, [s for _, s in pairs])
    return *(y.detach() for y, _ in pairs), *grads


OPTIONS = {
    "plain": {},
    "no entropy": {"entropy": False},
    "temperature": {"temperature": 0.7},
    "a temperature a token": {"temperature": torch.linspace(0.4, 2.0, M)},
    "softcap": {"softcap": 3.0},
    "ignored": {"ignore_index": -100},
    "all": {"softcap": 5.0, "temperature": torch.linspace(0.4, 2.0, M), "ignore_index": -100},
}


@pytest.mark.parametrize("memory", [None, 4 * V * 30, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_matches_float64(dtype, options, memory):
    x = example(dtype, bias="softcap" in options)
    if "ignore_index" in options:
        x["targets"][::3] = -100
    seeds = torch.randn(2, M)
    truth = differentiated(reference.linear_log_prob, {k: as_double(v) for k, v in x.items()}, seeds, **options)
    eager = differentiated(reference.linear_log_prob, x, seeds, **options)
    actual = differentiated(pf.linear_log_prob, x, seeds, **options, logits_memory=memory)
    for i, (a, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        assert_as_good(a, e, t, f"result {i}", ulps=32.0)


def test_shapes_views_and_a_padded_vocabulary():
    x = example(lead=(3, 8), vocabulary=V + 7)
    hidden, weight = x["hidden"], x["weight"]
    views = {"hidden": hidden[:, :-1], "weight": weight[:V], "targets": x["targets"][:, 1:] % V}
    seeds = torch.randn(2, 3, 7)
    copies = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in views.items()}
    log_prob, h = pf.linear_log_prob(**views)
    assert log_prob.shape == h.shape == (3, 7)
    grads = torch.autograd.grad((log_prob, h), (hidden, weight), tuple(seeds))
    expected = differentiated(pf.linear_log_prob, copies, seeds)
    assert same_bits([log_prob.detach(), h.detach()], expected[:2])
    assert torch.equal(grads[0][:, :-1], expected[2]) and not grads[0][:, -1].any()
    assert torch.equal(grads[1][:V], expected[3]) and not grads[1][V:].any()


def test_empty():
    x = example(lead=(0,))
    log_prob, h = pf.linear_log_prob(**x)
    assert log_prob.shape == h.shape == (0,)
    grads = torch.autograd.grad(log_prob.sum() + h.sum(), (x["hidden"], x["weight"]))
    assert grads[0].shape == (0, H) and not grads[1].any()


def test_a_float32_head_stays_one():
    x = example(torch.bfloat16)
    x["weight"] = x["weight"].detach().float().requires_grad_()
    log_prob, _ = pf.linear_log_prob(**x)
    logits = x["hidden"].float() @ x["weight"].T
    torch.testing.assert_close(log_prob, logits.log_softmax(-1).gather(1, x["targets"][:, None])[:, 0])
    log_prob.sum().backward()
    assert x["hidden"].grad.dtype is torch.bfloat16 and x["weight"].grad.dtype is torch.float32


def test_autocast_runs_the_products_in_its_dtype():
    x = example()
    with torch.autocast("cpu", torch.bfloat16):
        log_prob, _ = pf.linear_log_prob(**x)
    same = pf.linear_log_prob(x["hidden"].bfloat16(), x["weight"].bfloat16(), x["targets"])[0]
    assert torch.equal(log_prob, same)
    log_prob.sum().backward()
    assert x["weight"].grad.dtype is torch.float32  # the sum over chunks, not rounded on the way


def test_gradients_of_halves_are_summed_in_float32():
    """Many chunks that each add little: summed in bfloat16 the gradient would stop growing."""
    x = example(torch.bfloat16, lead=(512,))
    x["hidden"] = x["hidden"].detach()[:1].expand(512, H).contiguous().requires_grad_()
    x["targets"][:] = 5
    double = {k: as_double(v) for k, v in x.items()}
    truth = torch.autograd.grad(reference.linear_log_prob(**double, entropy=False)[0].sum(), double["weight"])[0]
    mine = torch.autograd.grad(pf.linear_log_prob(**x, entropy=False, logits_memory=V * 2 * 6)[0].sum(), x["weight"])[0]
    assert (mine - truth).abs().max() < 0.01 * truth.abs().max()


def test_what_is_frozen_costs_no_product():
    x = example()
    full = 2 * M * H * V

    def flops(x, **options):
        with Cost() as cost:
            pf.linear_log_prob(**x, **options)[0].sum().backward()
        return cost.flops / full

    assert flops(x) == 3
    assert flops({**x, "weight": x["weight"].detach()}) == 2
    assert flops({**x, "hidden": x["hidden"].detach()}) == 2
    assert flops(x, logits_memory=1) == pytest.approx(4 - 3 / M)  # all but the first two and the last
    x["targets"][: M // 2] = -100
    assert flops(x, ignore_index=-100) == pytest.approx(3 * (M - M // 2) / M)


def test_the_logits_never_exist():
    x = example(lead=(500,), vocabulary=1000)
    with Cost() as cost:
        log_prob, h = pf.linear_log_prob(**x, logits_memory=4 * 1000 * 60)
        (log_prob.sum() + h.sum()).backward()
    assert cost.elements <= 1000 * 60


def test_a_token_without_a_gradient_leaves_the_products():
    x = example(lead=(64,))
    seed = torch.randn(64)
    seed[::2] = 0
    log_prob, _ = pf.linear_log_prob(**x)
    with Cost() as cost:
        grads = torch.autograd.grad(log_prob, (x["hidden"], x["weight"]), seed)
    assert cost.flops == 2 * 32 * (2 * H * V)
    kept = {"hidden": x["hidden"][1::2], "weight": x["weight"], "targets": x["targets"][1::2]}
    expected = torch.autograd.grad(pf.linear_log_prob(**kept)[0], (x["hidden"], x["weight"]), seed[1::2])
    torch.testing.assert_close(grads, expected)


def test_ignored_tokens_may_hold_anything():
    x = example()
    x["targets"][::4] = -1
    hidden = x["hidden"].detach().clone()
    hidden[::4] = math.nan
    seeds = torch.randn(2, M)
    clean = differentiated(pf.linear_log_prob, x, seeds, ignore_index=-1)
    dirty = differentiated(pf.linear_log_prob, {**x, "hidden": hidden.requires_grad_()}, seeds, ignore_index=-1)
    assert same_bits(clean, dirty)
    assert not any(y[::4].any() for y in dirty[:3])


def test_a_shift_of_all_logits_changes_nothing():
    x = example(torch.float64, bias=True)
    seeds = torch.randn(2, M)
    shifted = {**x, "bias": (x["bias"].detach() + 300.0).requires_grad_()}
    a, b = (differentiated(pf.linear_log_prob, y, seeds) for y in (x, shifted))
    torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_backward_again_in_place_changes_and_twice_differentiated():
    x = example(torch.float64)
    log_prob, h = pf.linear_log_prob(**x)
    wanted = (x["hidden"], x["weight"])
    first = torch.autograd.grad(log_prob.sum() + h.sum(), wanted, retain_graph=True)
    again = torch.autograd.grad(log_prob.sum() + h.sum(), wanted)
    torch.testing.assert_close(first, again, rtol=1e-14, atol=1e-14)
    with torch.no_grad():
        log_prob, _ = pf.linear_log_prob(**x)
    assert not log_prob.requires_grad
    log_prob, _ = pf.linear_log_prob(**x)
    with torch.no_grad():
        x["weight"].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.sum().backward()
    small = {"hidden": x["hidden"][:3].detach().requires_grad_(), "weight": x["weight"][:7].detach().requires_grad_()}
    targets = torch.tensor([1, 6, 0])
    f = lambda hidden, weight: pf.linear_log_prob(hidden, weight, targets, temperature=0.8)  # noqa: E731
    torch.autograd.gradcheck(f, tuple(small.values()))
    torch.autograd.gradgradcheck(f, tuple(small.values()))


def test_same_bits_over_runs():
    x, seeds = example(lead=(300,), vocabulary=3000), torch.randn(2, 300)
    a, b = (differentiated(pf.linear_log_prob, x, seeds, logits_memory=4 * 3000 * 90) for _ in range(2))
    assert same_bits(a, b)


def test_a_lora_head_learns_through_its_sum():
    x = example()
    a, b = torch.randn(4, H, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    frozen = x["weight"].detach()
    log_prob, _ = pf.linear_log_prob(x["hidden"], frozen + 0.5 * b @ a, x["targets"])
    expected, _ = reference.linear_log_prob(x["hidden"], frozen + 0.5 * b @ a, x["targets"])
    torch.testing.assert_close(
        torch.autograd.grad(log_prob.sum(), (a, b)), torch.autograd.grad(expected.sum(), (a, b)), rtol=1e-4, atol=1e-4
    )


def test_compiled():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def both(hidden, weight, targets, bias, temperature):
        return pf.linear_log_prob(
            hidden * 1.0, weight, targets, bias=bias, temperature=temperature, softcap=5.0, ignore_index=-1
        )

    for n in (20, 31, 37):
        x = example(lead=(n,), bias=True)
        x["targets"][::4] = -1
        temperature, seeds = torch.linspace(0.5, 2.0, n), torch.randn(2, n)
        mine = differentiated(both, x, seeds, temperature=temperature)
        eager = differentiated(pf.linear_log_prob, x, seeds, temperature=temperature, softcap=5.0, ignore_index=-1)
        torch.testing.assert_close(mine, eager)
    assert counter.frame_count == 1


def test_opcheck():
    x = example(bias=True)
    torch.library.opcheck(_op, (x["hidden"], x["weight"], x["targets"], x["bias"], None, 0.7, 3.0, None, True, None))


BAD = {
    "weight must be [V, H] = [V, 16], got [101, 15]": {"weight": torch.zeros(V, 15)},
    "targets must be a label for each row of hidden = [37], got [36]": {"targets": torch.zeros(36, dtype=torch.long)},
    "targets must be an integer type, got float32": {"targets": torch.zeros(M)},
    "targets must be in [0, 101), got 101 at 5": {"targets": torch.where(torch.arange(M) == 5, V, 0)},
    "targets must be in [0, 101), got -1 at 36": {"targets": torch.where(torch.arange(M) == 36, -1, 0)},
    "bias must be [V] = [101], got [100]": {"bias": torch.zeros(100)},
    "hidden must be float32, float64, bfloat16 or float16, got int64": {"hidden": torch.zeros(M, H).long()},
    "temperature must be a finite number > 0 or a tensor, got 0": {"temperature": 0},
    "temperature must be the shape of targets = [37], got [3]": {"temperature": torch.ones(3)},
    "softcap must be a finite number > 0 or None, got -1.0": {"softcap": -1.0},
    "logits_memory must be a number of bytes > 0 or None, got 0": {"logits_memory": 0},
    "group must be a torch.distributed process group, got int": {"group": 3},
    "targets must be a tensor, got list": {"targets": [1]},
    "weight must have at least one row, got [0, 16]": {"weight": torch.zeros(0, H)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    x = {k: v.detach() for k, v in example().items()}
    with pytest.raises((TypeError, ValueError)) as error:
        pf.linear_log_prob(**{**x, **BAD[message]})
    assert str(error.value) == f"linear_log_prob: {message}"


RANK = """
import sys
import torch, torch.distributed as dist
import ppo_fast as pf
rank, ranks = int(sys.argv[1]), 2
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=ranks)
torch.manual_seed(0)
hidden, weight, bias = torch.randn(40, 8).double(), torch.randn(30, 8).double(), torch.randn(30).double()
targets, mask = torch.randint(30, (40,)), torch.rand(40) < 0.8
targets[3] = -100
old, advantages, values = torch.randn(40) - 3, torch.randn(40), torch.randn(40)
config = pf.LossConfig(entropy_coef=0.01, kl="k3", kl_coef=0.1, normalize_advantages=True)
if sys.argv[3] == "a shard where nothing is possible":
    bias[15:] = -float("inf")
    targets = targets.clamp(max=14)

def results(hidden, weight, bias, group):
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    log_prob, h = pf.linear_log_prob(leaves[0], leaves[1], targets, bias=leaves[2], temperature=0.7, ignore_index=-100,
                                     softcap=None, group=group, logits_memory=8 * 30 * 20)
    found = [log_prob.detach(), h.detach(), *torch.autograd.grad((log_prob * advantages + h).sum(), leaves)]
    m = mask & (targets >= 0)
    out = pf.linear_ppo_loss(leaves[0], leaves[1], targets, old, advantages, config, ref_log_prob=old, mask=m,
                             bias=leaves[2], group=group, logits_memory=8 * 30 * 20)
    return [*found, out.loss.detach(), out.stats.vector, *torch.autograd.grad(out.loss, leaves)]

whole = results(hidden, weight, bias, None)
mine = slice(rank * 15, rank * 15 + 15)
shard = results(hidden, weight[mine], bias[mine], dist.group.WORLD)
for i, (a, b) in enumerate(zip(whole, shard)):
    b_expected = a[mine] if i in (3, 4, 8, 9) else a
    torch.testing.assert_close(b, b_expected, rtol=1e-9, atol=1e-11, equal_nan=True, msg=lambda m: f"{i}: {m}")
try:
    pf.linear_log_prob(hidden, weight[: 10 + rank], targets.clamp(min=0, max=9), group=dist.group.WORLD)
except ValueError as error:
    assert "weight must have as many rows on every rank of group, got [10, 11]" in str(error), error
    print("same", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("case", ["plain", "a shard where nothing is possible"])
def test_a_vocabulary_over_two_ranks_gives_what_one_gives(tmp_path, case):
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(r), str(tmp_path / "store"), case], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
        for r in range(2)
    ]  # fmt: skip
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "same" in out, out + err
