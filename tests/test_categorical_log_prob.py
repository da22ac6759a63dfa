"""categorical_log_prob against its specification: short rows in lanes, long rows in chunks."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_as_good, pf
from hypothesis import given
from hypothesis import strategies as st
from log_prob_laws import (
    LAYOUTS,
    assert_compiles,
    assert_double_backward,
    assert_parity,
    assert_refuses,
    assert_rows_stand_alone,
    assert_same_bits,
    gradients,
    strided,
)

from ppo_fast import _C, reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 3, 4, 6, 18, 63, 64, 65, 100, 1024, 1030, 2600]


@st.composite
def cases(draw):
    width = draw(st.sampled_from(WIDTHS))
    lead = draw(st.sampled_from([(), (1,), (5,), (16,), (33,), (2, 3), (4, 1, 5), (0,)]))
    layout = draw(st.sampled_from(LAYOUTS))
    dtype = draw(st.sampled_from(FLOATS))
    torch.manual_seed(draw(st.integers(0, 999)))
    logits = strided((*lead, width), layout, dtype)
    actions = torch.randint(0, width, lead)
    options = {}
    if draw(st.booleans()):
        mask = torch.rand(*lead, width) > 0.4
        mask.scatter_(-1, actions[..., None], True)
        options["action_mask"] = mask.to(draw(st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32])))
    if draw(st.booleans()):
        options["ignore_index"] = draw(st.sampled_from([0, -100]))
        actions = torch.where(torch.rand(lead) < 0.3, options["ignore_index"], actions)
    temperature = draw(st.sampled_from([1.0, 0.3, 2.5, "rows", "scalar tensor"]))
    if temperature == "rows":
        temperature = torch.rand(lead) + 0.5
    elif temperature == "scalar tensor":
        temperature = torch.tensor(0.7)
    options["temperature"] = temperature
    label = draw(st.sampled_from([torch.int64, torch.int32, torch.float32]))
    return logits, actions.to(label), options


@given(cases())
def test_parity(case):
    logits, actions, options = case
    wide = dict(options)
    if isinstance(options["temperature"], torch.Tensor):
        wide["temperature"] = options["temperature"].double()
    assert_parity(
        lambda z: pf.categorical_log_prob(z, actions, **options),
        lambda z: reference.categorical_log_prob(z, actions, **options),
        [logits],
        double=lambda z: reference.categorical_log_prob(z, actions, **wide),
        ulps=32.0 if logits.dtype == torch.float64 else 8.0,  # float64's truth rounds too
    )


@pytest.mark.parametrize("width", [6, 64, 65, 3000])
def test_parity_on_every_instruction_set(isa, width):
    for dtype in FLOATS:
        logits, actions = strided((37, width), "plain", dtype), torch.randint(0, width, (37,))
        mask = torch.rand(37, width) > 0.3
        args, options = (actions,), {"action_mask": mask, "temperature": 0.8}
        assert_parity(
            lambda z, a=args, o=options: pf.categorical_log_prob(z, *a, **o),
            lambda z, a=args, o=options: reference.categorical_log_prob(z, *a, **o),
            [logits],
            ulps=32.0,
        )


@pytest.mark.parametrize("width", [1, 6, 64, 65, 1500])
@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_everywhere(width, dtype):
    n = 700 if width < 100 else 90
    logits, actions = strided((n, width), "plain", dtype), torch.randint(0, width, (n,))
    mask = torch.rand(n, width) > 0.2
    assert_same_bits(lambda z: pf.categorical_log_prob(z, actions, action_mask=mask), [logits])


@pytest.mark.parametrize("width", [2, 6, 64, 65, 2100])
def test_rows_stand_alone(width):
    logits, actions = strided((53, width), "plain", torch.float32), torch.randint(0, width, (53,))
    assert_rows_stand_alone(
        lambda z, a: pf.categorical_log_prob(z, a, temperature=0.7), [logits, actions], (True, True)
    )
    whole = gradients(lambda z: pf.categorical_log_prob(z, actions), [logits])[2]
    for row in (0, 15, 16, 52):
        z = logits[row : row + 1].clone().requires_grad_()
        log_prob, entropy = pf.categorical_log_prob(z, actions[row : row + 1])
        generator = torch.Generator().manual_seed(0)
        g, h = (torch.randn(53, generator=generator, dtype=torch.float64).float() for _ in range(2))
        (log_prob * g[row] + entropy * h[row]).sum().backward()
        assert torch.equal(z.grad[0], whole[row])


@pytest.mark.parametrize("width", [6, 70])
def test_double_backward(width):
    n = 4 if width < 10 else 1
    logits = torch.randn(n, width, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(0, width, (n,))
    mask = (torch.rand(n, width) > 0.2).scatter_(-1, actions[:, None], True)
    temperature = torch.rand(n, dtype=torch.float64) + 0.5
    assert_double_backward(
        lambda z: pf.categorical_log_prob(z, actions, action_mask=mask, temperature=temperature), [logits]
    )


@pytest.mark.parametrize("width", [6])
def test_double_backward_of_one_output(width):
    actions = torch.randint(0, width, (3,))
    logits = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    for output in (0, 1):
        assert_double_backward(lambda z, k=output: pf.categorical_log_prob(z, actions)[k], [logits])
    assert_double_backward(lambda z: pf.categorical_log_prob(z, actions, entropy=False)[0], [logits])


@pytest.mark.parametrize("width", [2, 18, 64, 70, 5000])
def test_laws(width):
    logits, actions = torch.randn(40, width), torch.randint(0, width, (40,))
    log_prob, entropy, grad = gradients(lambda z: pf.categorical_log_prob(z, actions), [logits])
    shifted = gradients(lambda z: pf.categorical_log_prob(z + 4.0, actions), [logits])
    assert_as_good(shifted[0], None, log_prob.double(), "shift of all logits", ulps=64)
    assert_as_good(shifted[1], None, entropy.double(), "shift of all logits", ulps=64)
    assert grad.double().sum(-1).abs().max() < 1e-6 * math.sqrt(width)  # a softmax has no gradient along ones
    assert bool((log_prob <= 0).all()) and bool((entropy >= 0).all())
    assert bool((entropy <= math.log(width) * (1 + 1e-6)).all())
    uniform = pf.categorical_log_prob(torch.zeros(3, width), torch.zeros(3, dtype=torch.long))
    assert_as_good(uniform[1], None, torch.full((3,), math.log(width), dtype=torch.float64), "uniform", ulps=2)


@pytest.mark.parametrize("width", [5, 64, 66, 2050])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_special_rows(width, dtype):
    z = torch.randn(8, width).to(dtype)
    z[1, 1:] = -math.inf  # certain
    z[2, 2] = -math.inf
    z[3] = -math.inf  # impossible
    z[4, 1] = math.nan
    z[5] = math.nan
    z[6, 3] = math.inf
    z[7] = torch.linspace(-3e4, 3e4, width)
    actions = torch.tensor([0, 0, 2, 0, 0, 0, 0, width - 1])
    log_prob, entropy, grad = gradients(lambda z: pf.categorical_log_prob(z, actions), [z])
    expected = gradients(lambda z: reference.categorical_log_prob(z, actions), [z])
    for got, want in zip((log_prob, entropy, grad), expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert log_prob[1] == 0 and entropy[1] == 0 and not grad[1].any()
    assert log_prob[2] == -math.inf and entropy[2].isfinite() and grad[2].isfinite().all()
    assert log_prob[3] == 0 and entropy[3] == 0 and not grad[3].any()
    for row in (4, 5, 6):
        assert log_prob[row].isnan() and entropy[row].isnan() and grad[row].isnan().all()


@pytest.mark.parametrize("width", [5, 66, 2050])
def test_what_is_masked_reaches_nothing(width):
    z, actions = torch.randn(20, width), torch.randint(0, width, (20,))
    mask = (torch.rand(20, width) > 0.5).scatter_(-1, actions[:, None], True)
    mask[3] = False
    actions[5] = -7

    def op(z):
        return pf.categorical_log_prob(z, actions, action_mask=mask, ignore_index=-7)

    clean = gradients(op, [z])
    dirty = torch.where(mask, z, math.nan)
    dirty[5] = math.nan
    for a, b in zip(clean, gradients(op, [dirty]), strict=True):
        assert torch.equal(a, b)
    assert not clean[2][~mask].any() and not clean[2][5].any() and not clean[2][3].any()
    assert clean[0][3] == clean[0][5] == clean[1][3] == clean[1][5] == 0
    mask[0], mask[0, actions[0]] = True, False
    assert op(z)[0][0] == -math.inf


@pytest.mark.parametrize("width", [3, 80])
def test_one_gradient_only(width):
    z, actions = torch.randn(9, width, requires_grad=True), torch.randint(0, width, (9,))
    for k in (0, 1):
        (got,) = torch.autograd.grad(pf.categorical_log_prob(z, actions)[k].sum(), z)
        (want,) = torch.autograd.grad(reference.categorical_log_prob(z.double(), actions)[k].sum(), z)
        torch.testing.assert_close(got, want.float())
    log_prob, entropy = pf.categorical_log_prob(z, actions, entropy=False)
    assert entropy is None
    torch.testing.assert_close(
        torch.autograd.grad(log_prob.sum(), z)[0],
        torch.autograd.grad(reference.categorical_log_prob(z, actions)[0].sum(), z)[0],
    )


def test_long_rows_far_apart_in_memory():
    """Offsets beyond 2**31 elements, over memory that is not there: expanded rows of one vocabulary."""
    z = torch.randn(1, 32000).expand(90_000, 32000)[::89_999]
    log_prob, entropy = pf.categorical_log_prob(z, torch.tensor([5, 7]))
    torch.testing.assert_close(log_prob, z[0].log_softmax(-1)[[5, 7]])
    assert entropy[0] == entropy[1]


@pytest.mark.parametrize("width", [6, 64, 65, 3000])
def test_labels_out_of_range(width):
    z = torch.randn(600 if width < 100 else 70, width)
    for bad in (-1, width, 2**40, -(2**62)):
        actions = torch.zeros(len(z), dtype=torch.long)
        actions[[40, 60]] = torch.tensor([bad, width + 5])
        assert_refuses(
            ValueError, ["categorical_log_prob: actions", f"[0, {width})", f"got {bad} at row 40"],
            pf.categorical_log_prob, z, actions,
        )  # fmt: skip


def test_errors():
    z, a = torch.randn(4, 5), torch.zeros(4, dtype=torch.long)
    op = pf.categorical_log_prob
    assert_refuses(ValueError, ["actions", "[4]", "[3]"], op, z, a[:3])
    assert_refuses(ValueError, ["action_mask", "[4, 5]"], op, z, a, action_mask=torch.ones(4))
    assert_refuses(TypeError, ["logits", "float"], op, z.long(), a)
    assert_refuses(ValueError, ["temperature", "> 0"], op, z, a, temperature=0.0)
    assert_refuses(ValueError, ["temperature", "> 0"], op, z, a, temperature=math.nan)
    assert_refuses(ValueError, ["temperature", "[4]"], op, z, a, temperature=torch.ones(5))
    assert_refuses(TypeError, ["actions"], op, z, None)
    assert_refuses(TypeError, ["categorical_log_prob", "list"], op, [[1.0]], a)
    assert_refuses(
        ValueError, ["temperature gets no gradient"], op, z, a, temperature=torch.ones(4, requires_grad=True)
    )
    assert_refuses(ValueError, ["at least one action"], op, z[:, :0], a)
    with pf.use_backend("reference"):
        assert_refuses(ValueError, ["actions", "[4]", "[3]"], op, z, a[:3])


def test_empty():
    z = torch.empty(0, 5, requires_grad=True)
    log_prob, entropy = pf.categorical_log_prob(z, torch.empty(0, dtype=torch.long))
    assert log_prob.shape == entropy.shape == (0,)
    (log_prob.sum() + entropy.sum()).backward()
    assert z.grad.shape == (0, 5)


# --- inplace_backward -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [6, 80, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "sliced", "transposed"])
def test_inplace_backward(width, dtype, layout):
    base, actions = strided((21, width), layout, dtype), torch.randint(0, width, (21,))

    def run(inplace):
        leaf = base.clone().requires_grad_()
        logits = leaf * 1.0
        if layout == "sliced":
            logits = torch.cat([logits, logits], -1)[:, :width]
        log_prob, entropy = pf.categorical_log_prob(logits, actions, inplace_backward=inplace)
        before, version = logits.data_ptr(), logits._version
        seen = []
        logits.register_hook(lambda g: seen.append(g.data_ptr()))
        (log_prob.sum() + 0.3 * entropy.sum()).backward()
        assert (seen[0] == before) is inplace and logits._version == version + inplace
        return leaf.grad

    assert torch.equal(run(True), run(False))


def test_inplace_backward_refuses_where_it_would_harm():
    leaf, actions = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.long)
    for logits in (leaf, leaf[:, 1:], leaf.view(4, 5)):
        assert_refuses(
            ValueError, ["inplace_backward", "leaf"], pf.categorical_log_prob, logits, actions, inplace_backward=True
        )
    shared = (leaf[:1] * 1.0).expand(4, 5)
    assert_refuses(
        ValueError, ["inplace_backward", "memory"], pf.categorical_log_prob, shared, actions, inplace_backward=True
    )
    logits = leaf * 1.0
    log_prob, _ = pf.categorical_log_prob(logits, actions, inplace_backward=True)
    log_prob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_prob.sum().backward()
    logits = leaf * 1.0
    other = logits.square().sum()  # saved the logits
    pf.categorical_log_prob(logits, actions, inplace_backward=True)[0].sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_overlap():
    x = torch.randn(4, 6)
    for y in (x, x.T, x[::2, 1:4], x[:, :1], torch.empty(0, 3), torch.randn(5).as_strided((1, 5), (99, 1))):
        assert not _C.has_overlap(y)
    for y in (x[:1].expand(3, 6), torch.randn(9).as_strided((3, 4), (2, 1))):
        assert _C.has_overlap(y)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [True, False])
def test_registered_op(entropy):
    z, a = torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,))
    mask = torch.rand(5, 7) > 0.2
    args = (z, a, mask, torch.rand(5) + 0.5, 1.0, None, entropy)
    torch.library.opcheck(torch.ops.ppo_fast.categorical_log_prob.default, args)
    _, h, saved = torch.ops.ppo_fast.categorical_log_prob(*args)
    g = torch.randn(5)
    rest = (h.detach(), saved, g, g if entropy else None)
    torch.library.opcheck(torch.ops.ppo_fast.categorical_log_prob_backward.default, (z.detach(), *args[1:], *rest))


@pytest.mark.parametrize("width", [6, 90])
def test_compiles(width):
    actions, mask = torch.randint(0, width, (9,)), torch.rand(9, width) > 0.2
    assert_compiles(
        lambda z: pf.categorical_log_prob(z, actions, action_mask=mask, temperature=0.7), [torch.randn(9, width)]
    )


def test_functorch_goes_through_the_reference():
    z, actions = torch.randn(4, 5, 6), torch.randint(0, 6, (4, 5))
    mapped = torch.func.vmap(pf.categorical_log_prob)(z, actions)
    for a, b in zip(mapped, pf.categorical_log_prob(z, actions), strict=True):
        torch.testing.assert_close(a, b)


# --- K labels a row ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [5, 1030])
@pytest.mark.parametrize("options", ["plain", "ignored", "masked", "temperatures"])
def test_many_labels(dtype, width, options):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, width, generator=g).to(dtype)
    labels = torch.randint(width, (3, 7, 4), generator=g)
    labels[0, 0] = labels[0, 0, 0]  # the same one, K times
    rest = {}
    if options == "ignored":
        labels[torch.rand(labels.shape, generator=g) < 0.4] = -7
        labels[1] = -7
        rest["ignore_index"] = -7
    elif options == "masked":
        rest["action_mask"] = torch.rand(logits.shape, generator=g) < 0.8
    elif options == "temperatures":
        rest["temperature"] = torch.rand(3, 7, generator=g) + 0.5
    seeds = torch.randn(3, 7, 4, generator=g), torch.randn(3, 7, generator=g)

    def run(op, x, **more):
        x = x.detach().requires_grad_()
        out = op(x * 1.0, labels, **rest, **more)
        (grad,) = torch.autograd.grad(out, x, [s.to(y) for s, y in zip(seeds, out, strict=True)])
        return [*(y.detach() for y in out), grad]

    truth, eager = run(reference.categorical_log_prob, logits.double()), run(reference.categorical_log_prob, logits)
    for more in ({}, {"inplace_backward": True}):
        for i, (a, e, t) in enumerate(zip(run(pf.categorical_log_prob, logits, **more), eager, truth, strict=True)):
            assert_as_good(a, e, t, f"{more} result {i}", ulps=16.0)
    one = run(pf.categorical_log_prob, logits)
    for k in range(4):
        alone = pf.categorical_log_prob(logits, labels[..., k], **rest)[0]
        torch.testing.assert_close(one[0][..., k], alone, rtol=1e-5, atol=1e-5)


def test_many_labels_twice_differentiated_compiled_and_refused():
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0, 5], [-1, 2]])
    f = lambda z: pf.categorical_log_prob(z, labels, ignore_index=-1, temperature=0.7)  # noqa: E731
    torch.autograd.gradcheck(f, logits)
    torch.autograd.gradgradcheck(f, logits)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits), f(logits))
    for labels, error, message in (
        (torch.tensor([[0, 6], [1, 2]]), ValueError, r"actions must be in \[0, 6\), got 6 at 1"),
        (torch.zeros(2, 2), TypeError, "actions must be an integer type for K labels a row, got float32"),
        (torch.zeros(3, 2).long(), ValueError, r"actions must be \[...\] or \[..., K\] with \[2, 6\], got \[3, 2\]"),
    ):
        with pytest.raises(error, match=message):
            pf.categorical_log_prob(logits, labels)
