"""ppo_fast.jax: torch's bits, through jit, grad, vmap and scan. Bad input and builds without it: test_jax_errors.py."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES, log_probs, streams
from scan_cases import cases, transposed

import ppo_fast as pf

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import ppo_fast.jax as pj  # noqa: E402

FEW = settings(max_examples=10, deadline=None)


@pytest.fixture(autouse=True)
def wide():
    """float64 where a test asks for it; what is not asked for stays float32."""
    with jax.enable_x64(True):
        yield


def to_jax(x):
    if isinstance(x, torch.Tensor):
        x = x.detach()
        if x.dtype == torch.bfloat16:
            return jnp.asarray(x.contiguous().view(torch.int16).numpy()).view(jnp.bfloat16)
        return jnp.asarray(x.numpy())
    if isinstance(x, dict):
        return {k: to_jax(v) for k, v in x.items()}
    return tuple(map(to_jax, x)) if isinstance(x, tuple) else x


def assert_bits(actual, wanted: torch.Tensor, what="") -> None:
    wanted = to_jax(wanted)
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape, what
    np.testing.assert_array_equal(np.asarray(actual.astype(float)), np.asarray(wanted.astype(float)), what)


# --- advantages ---------------------------------------------------------------------------------------------------------

SCANS = {
    "gae": ("rewards", "values", "last_values", "terminated", "truncated", "final_values", "mask", "mask_mode", "gamma", "lam"),
    "vtrace": (
        "log_rhos", "rewards", "values", "last_values", "terminated", "truncated", "final_values", "mask", "gamma", "lam",
    ),
    "discounted_returns": ("rewards", "last_values", "terminated", "truncated", "final_values", "mask", "gamma"),
}  # fmt: skip


def carried(case: dict, op: str) -> dict:
    """Its arguments. Ops without mask_mode pass over masked steps: their final values are not read."""
    kept = {k: v for k, v in case.items() if k in (*SCANS[op], "time_dim")}
    if op != "gae" and isinstance(kept["final_values"], torch.Tensor) and case["mask"] is not None:
        kept["final_values"] = torch.where(case["mask"] != 0, kept["final_values"], torch.nan)
    return kept


@pytest.mark.parametrize("op", SCANS)
@given(case=cases(), as_rows=st.booleans())
@FEW
def test_scans(op, case, as_rows):
    case = carried(transposed(case) if as_rows else case, op)
    wanted, found = getattr(pf, op)(**case), getattr(pj, op)(**to_jax(case))
    for a, b in zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]:
        assert_bits(a, b)


def rollout(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "rewards": torch.randn(shape, generator=g), "values": torch.randn(shape, generator=g),
        "terminated": torch.rand(shape, generator=g) < 0.1,
    }  # fmt: skip


@pytest.mark.parametrize("time_dim", [0, 1, 2, -1])
def test_more_dimensions(time_dim):
    x = rollout(5, 6, 7)
    last = torch.randn([n for d, n in enumerate((5, 6, 7)) if d != time_dim % 3])
    wanted = pf.gae(**x, last_values=last, time_dim=time_dim)
    for a, b in zip(pj.gae(**to_jax(x), last_values=to_jax(last), time_dim=time_dim), wanted, strict=True):
        assert_bits(a, b)


@pytest.mark.parametrize("time_dim", [0, 1])
@pytest.mark.parametrize("axes", [(0, 0, 0, None), (1, None, 0, 0), (2, 2, None, 0), (None, 0, None, None)])
def test_vmap_of_gae_is_a_loop(axes, time_dim):
    batch, shape = 3, (9, 4)
    lead = shape[1 - time_dim]
    sizes = [shape, shape, (lead,), ()]

    def array(axis, size):
        return np.random.default_rng(1).random(size if axis is None else (*size[:axis], batch, *size[axis:]))

    arrays = [array(a, s) for a, s in zip(axes, sizes, strict=True)]
    ended = np.random.default_rng(2).random(shape) < 0.2

    def one(rewards, values, last_values, gamma):
        return pj.gae(rewards, values, last_values, terminated=ended, gamma=gamma, time_dim=time_dim)

    found = jax.jit(jax.vmap(one, in_axes=axes))(*arrays)
    for i in range(batch):
        wanted = one(*(x if a is None else np.take(x, i, a) for x, a in zip(arrays, axes, strict=True)))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a[i], b)


def test_vmap_of_vmap_and_of_one_dimension():
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 5)).astype(np.float32)
    found = jax.vmap(jax.vmap(lambda r: pj.discounted_returns(r, time_dim=1)))(x)
    assert_bits(found, pf.discounted_returns(torch.from_numpy(x), time_dim=3))
    last = x[:, 0, 0, 0]
    found = jax.vmap(lambda r, v: pj.discounted_returns(r, v))(x[:, 0, 0], last)
    assert_bits(found, pf.discounted_returns(torch.from_numpy(x[:, 0, 0]), torch.from_numpy(last), time_dim=1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed(dtype):
    x = rollout(23)
    borders, last, gamma = torch.tensor([0, 4, 4, 15, 23], dtype=dtype), torch.randn(4), torch.rand(4)
    wanted = pf.gae(**x, last_values=last, cu_seqlens=borders, gamma=gamma)
    call = functools.partial(pj.gae, cu_seqlens=to_jax(borders), gamma=to_jax(gamma), last_values=to_jax(last))
    for a, b in zip(jax.jit(call)(**to_jax(x)), wanted, strict=True):
        assert_bits(a, b)
    many = jax.vmap(lambda r, v: call(r, v)[0])(*(jnp.stack([to_jax(x[k])] * 2) for k in ("rewards", "values")))
    assert_bits(many[1], pf.gae(x["rewards"], x["values"], last, cu_seqlens=borders, gamma=gamma)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"ddof": 0, "eps": 1e-3}, {"shift_mean": False, "eps_in_variance": True}])
def test_whiten(dtype, options):
    x, mask = torch.randn(37, 129).to(dtype), torch.rand(37, 129) < 0.7
    assert_bits(jax.jit(lambda x: pj.whiten(x, **options))(to_jax(x)), pf.whiten(x, **options))
    assert_bits(pj.whiten(to_jax(x), mask=to_jax(mask), **options), pf.whiten(x, mask=mask, **options))
    each = jax.vmap(lambda x, m: pj.whiten(x, mask=m, **options))(to_jax(x), to_jax(mask))
    assert_bits(each[5], pf.whiten(x[5], mask=mask[5], **options))


def test_advantages_are_constants():
    x = to_jax(rollout(8, 3))
    grads = jax.grad(lambda r, v: sum(y.sum() for y in pj.gae(r, v)), argnums=(0, 1))(x["rewards"], x["values"])
    assert all((g == 0).all() for g in grads)
    assert (jax.jvp(pj.whiten, (x["values"],), (x["values"],))[1] == 0).all()


def test_out_is_written_to():
    """Donated memory takes the results; what is not donated stays as it was."""
    x, out = to_jax(rollout(64, 48)), (jnp.full((64, 48), jnp.nan, jnp.float32), jnp.ones((64, 48), jnp.float32))
    wanted = pj.gae(**x)
    for found in (pj.gae(**x, out=out), jax.vmap(lambda x, out: pj.gae(**x, out=out), 1, 1)(x, out)):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert jnp.isnan(out[0]).all() and (out[1] == 1).all()
    memory = [a.unsafe_buffer_pointer() for a in out]
    program = jax.jit(lambda x, out: pj.gae(**x, out=out), donate_argnums=1).lower(x, out).compile()
    assert " copy(" not in program.as_text()
    found = program(x, out)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert [a.unsafe_buffer_pointer() for a in found] == memory and out[0].is_deleted()


# --- log-probabilities --------------------------------------------------------------------------------------------------


def distributions(name: str, lead: tuple[int, ...], dtype: torch.dtype):
    """(inputs with gradients, the rest by name)"""
    n = lambda *shape: torch.randn(*lead, *shape).to(dtype)  # noqa: E731
    mask = lambda width: torch.rand(*lead, width) < 0.7  # noqa: E731
    return {
        "categorical": lambda: ((n(7),), {"actions": torch.randint(7, lead)}),
        "categorical_masked": lambda: (
            (n(7),),
            {"actions": torch.randint(7, lead), "action_mask": mask(7), "temperature": torch.rand(lead) + 0.5},
        ),
        "categorical_ignoring": lambda: (
            (n(40),), {"actions": torch.randint(40, lead, dtype=torch.int32), "ignore_index": 3, "temperature": 0.7},
        ),
        "multi_categorical": lambda: (
            (n(9),), {"actions": torch.stack([torch.randint(k, lead) for k in (2, 3, 4)], -1), "nvec": [2, 3, 4]},
        ),
        "bernoulli": lambda: ((n(5),), {"actions": torch.randint(2, (*lead, 5))}),
        "normal": lambda: ((n(3), n(3)), {"actions": n(3)}),
        "normal_shared": lambda: ((n(3), torch.randn(3).to(dtype)), {"actions": n(3), "squash": True}),
        "normal_column": lambda: ((n(3), n(1)), {"actions": n(3)}),
        "beta": lambda: ((n(3).exp(), n(3).exp()), {"actions": torch.rand(*lead, 3).to(dtype) * 4 - 2, "low": -2.0, "high": 2.0}),
    }[name]()  # fmt: skip


DISTRIBUTIONS = (
    "categorical", "categorical_masked", "categorical_ignoring", "multi_categorical", "bernoulli", "normal", "normal_shared",
    "normal_column", "beta",
)  # fmt: skip


def op_of(name: str, module):
    base = name if name.startswith("multi") else name.split("_")[0]
    return getattr(module, f"{base}_log_prob")


@pytest.mark.parametrize("used", ["both", "log_prob", "entropy", "no entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_log_probs(name, dtype, used):
    inputs, rest = distributions(name, (6, 11), dtype)
    g, h = torch.randn(6, 11, dtype=torch.float64), torch.randn(6, 11, dtype=torch.float64)
    entropy = {} if used != "no entropy" else {"entropy": False}

    def total(log_prob, ent, g, h):
        out = 0.0
        if used != "entropy":
            out = out + (log_prob * g).sum()
        return out + (ent * h).sum() if used in ("both", "entropy") else out

    leaves = [x.clone().requires_grad_() for x in inputs]
    wanted = op_of(name, pf)(*leaves, **rest, **entropy)
    total(*wanted, g.to(wanted[0].dtype), h.to(wanted[0].dtype)).backward()

    def function(*xs):
        out = op_of(name, pj)(*xs, **to_jax(rest), **entropy)
        return total(*out, to_jax(g).astype(out[0].dtype), to_jax(h).astype(out[0].dtype)), out

    grads, found = jax.jit(jax.grad(function, argnums=tuple(range(len(inputs))), has_aux=True))(*map(to_jax, inputs))
    assert_bits(found[0], wanted[0].detach(), "log_prob")
    assert (found[1] is None) == (wanted[1] is None)
    if found[1] is not None:
        assert_bits(found[1], wanted[1].detach(), "entropy")
    for a, b in zip(grads, leaves, strict=True):
        if name == "normal_column" and a.shape == b.grad.shape and a.ndim > 1 and a.shape[-1] == 1:
            np.testing.assert_allclose(  # both sum over the last dimension afterwards, each in its own order
                np.asarray(a.astype(float)), b.grad.double().numpy(), atol=8 * torch.finfo(dtype).eps
            )
        else:
            assert_bits(a, b.grad, "gradient")


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_vmap_of_log_probs_is_a_loop(name):
    inputs, rest = distributions(name, (4, 5), torch.float32)
    inputs = [*map(to_jax, inputs)]
    arrays = {k: to_jax(v) for k, v in rest.items() if isinstance(v, torch.Tensor)}
    static = {k: v for k, v in rest.items() if k not in arrays}
    if name == "normal_shared":
        inputs[1] = jnp.stack([inputs[1] + i for i in range(4)])  # one for each of the batch

    def one(inputs, arrays):
        f = lambda *xs: sum((y * y).sum() for y in op_of(name, pj)(*xs, **arrays, **static))  # noqa: E731
        return op_of(name, pj)(*inputs, **arrays, **static), jax.grad(f, argnums=tuple(range(len(inputs))))(*inputs)

    found = jax.jit(jax.vmap(one))(inputs, arrays)
    for i in range(4):
        wanted = jax.jit(one)(*jax.tree.map(lambda x, i=i: x[i], (inputs, arrays)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), found, wanted)
    if name == "normal_shared":  # one for all of them
        lp = jax.vmap(lambda m, a: pj.normal_log_prob(m, inputs[1][0], a)[0])(inputs[0], arrays["actions"])
        np.testing.assert_array_equal(lp, pj.normal_log_prob(inputs[0], inputs[1][0], arrays["actions"])[0])


def test_inplace_backward_saves_memory_and_nobody_sees_it():
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((256, 8), (8, 512)))

    def program(inplace, reads_later):
        def f(weight):
            logits = hidden @ weight
            out = pj.categorical_log_prob(logits, jnp.zeros(256, int), inplace_backward=inplace)[0].sum()
            return out + (logits**3).sum() if reads_later else out

        return jax.jit(jax.grad(f)).lower(weight).compile()

    plain, inplace = program(False, False), program(True, False)
    spared = plain.memory_analysis().temp_size_in_bytes - inplace.memory_analysis().temp_size_in_bytes
    assert spared >= 0.9 * 256 * 512 * 4
    np.testing.assert_array_equal(plain(weight), inplace(weight))
    np.testing.assert_array_equal(program(False, True)(weight), program(True, True)(weight))


# --- losses -------------------------------------------------------------------------------------------------------------


def both_losses(op: str, inputs: dict, stored: dict, config, **rest):
    """Loss, statistics and gradients of both libraries, compared."""
    stored = {k: v for k, v in stored.items() if v is not None}
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items() if v is not None}
    out = getattr(pf, op)(**leaves, **stored, config=config, **rest)
    (out.loss * 1.5).backward()

    def function(inputs):
        loss, stats = getattr(pj, op)(**inputs, **to_jax(stored), config=config, **to_jax(rest))
        return loss * jnp.asarray(1.5, loss.dtype), (loss, stats)

    grads, (loss, stats) = jax.jit(jax.grad(function, has_aux=True))(to_jax(leaves))
    assert_bits(loss, out.loss.detach(), "loss")
    assert_bits(stats.vector, out.stats.vector, "stats")
    for name, leaf in leaves.items():
        assert_bits(grads[name], leaf.grad, name)
    plain = getattr(pj, op)(**to_jax(leaves), **to_jax(stored), config=config, **to_jax(rest))
    assert_bits(plain.loss, out.loss.detach(), "loss without gradient")


SHAPES = [(1,), (5,), (3, 7), (2, 1100), (0,)]


@given(st.data())
@FEW
def test_ppo_loss(data):
    shape, dtype = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    s = data.draw(streams(shape, g, dtype))
    inputs = {"log_prob": torch.randn(shape, generator=g).to(dtype) * 0.3}
    if "returns" in s.stored:
        inputs["values"] = torch.randn(shape, generator=g).to(dtype)
    if data.draw(st.booleans()):
        inputs["entropy"] = torch.rand(shape, generator=g).to(dtype)
    both_losses("ppo_loss", inputs, s.stored, s.config, **s.rest)


@given(st.data())
@FEW
def test_categorical_ppo_loss(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    lead, stored = data.draw(st.sampled_from([((3, 7), (3, 7)), ((9,), (4, 8))]))
    width = data.draw(st.sampled_from([1, 4, 33]))
    s = data.draw(streams(stored, g, dtype))
    s.stored["actions"] = torch.randint(width, stored, generator=g)
    if data.draw(st.booleans()):
        s.stored["action_mask"] = torch.rand(*stored, width, generator=g) < 0.8
    if lead != stored:
        s.stored["index"] = torch.randint(32, lead, generator=g, dtype=torch.int32)
    inputs = {"logits": torch.randn(*lead, width, generator=g).to(dtype)}
    if "returns" in s.stored:
        inputs["values"] = torch.randn(lead, generator=g).to(dtype)
    both_losses("categorical_ppo_loss", inputs, s.stored, s.config, **s.rest)


@given(st.data())
@FEW
def test_normal_ppo_loss(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    lead, stored = data.draw(st.sampled_from([((3, 7), (3, 7)), ((9,), (4, 8))]))
    s = data.draw(streams(stored, g, dtype))
    s.stored["actions"] = torch.randn(*stored, 3, generator=g).to(dtype)
    if lead != stored:
        s.stored["index"] = torch.randint(32, lead, generator=g)
    shared = data.draw(st.booleans())
    inputs = {
        "mean": torch.randn(*lead, 3, generator=g).to(dtype),
        "log_std": torch.randn(*(() if shared else lead), 3, generator=g).to(dtype) * 0.3,
    }
    if "returns" in s.stored:
        inputs["values"] = torch.randn(lead, generator=g).to(dtype)
    rest = {**s.rest, "squash": data.draw(st.booleans())}
    both_losses("normal_ppo_loss", inputs, s.stored, s.config, **rest)


@pytest.mark.parametrize("denominator", [None, 7.0, torch.tensor(7.0)], ids=["none", "number", "array"])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"])
def test_packed_sequences(reduction, denominator):
    config = pf.LossConfig(reduction=reduction)
    x = {
        k: log_probs((23,), torch.Generator().manual_seed(i), torch.float32) for i, k in enumerate(("log_prob", "old"))
    }
    stored = {"old_log_prob": x["old"], "advantages": torch.randn(23), "mask": torch.rand(23) < 0.7}
    borders = torch.tensor([0, 4, 4, 15, 23])
    both_losses("ppo_loss", {"log_prob": x["log_prob"]}, stored, config, cu_seqlens=borders, denominator=denominator)


def batch(n=12):
    rng = np.random.default_rng(0)
    return {
        k: rng.standard_normal(n).astype(np.float32)
        for k in ("log_prob", "old_log_prob", "advantages", "values", "returns")
    }


def test_vmap_of_losses_is_a_loop():
    many = {k: np.stack([np.roll(v, i) * (1 + i) for i in range(3)]) for k, v in batch().items()}

    def one(x):
        return jax.value_and_grad(
            lambda p: pj.ppo_loss(p, **{k: v for k, v in x.items() if k != "log_prob"}), has_aux=True
        )(x["log_prob"])

    found = jax.jit(jax.vmap(one))(many)
    for i in range(3):
        wanted = one({k: v[i] for k, v in many.items()})
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), found, wanted)
    shared = jax.vmap(lambda a: pj.ppo_loss(batch()["log_prob"], batch()["old_log_prob"], a).loss)(many["advantages"])
    assert (
        shared.shape == (3,)
        and shared[1] == pj.ppo_loss(batch()["log_prob"], batch()["old_log_prob"], many["advantages"][1]).loss
    )


def test_only_what_is_asked_for_is_computed():
    """A gradient that nobody wants is no result of the program; statistics and constants have none."""
    x = batch()

    def loss(log_prob, values, x):
        return pj.ppo_loss(log_prob, x["old_log_prob"], x["advantages"], values=values, returns=x["returns"])

    text = jax.jit(jax.grad(lambda p: loss(p, x["values"], x).loss)).lower(x["log_prob"]).as_text()
    call = next(line for line in text.splitlines() if "ppo_fast.ppo_loss" in line)
    assert call.rsplit("->", 1)[1].count("tensor<12xf32>") == 1
    constants = jax.grad(lambda x: loss(x["log_prob"], x["values"], x).loss)(x)
    assert (
        (constants["advantages"] == 0).all() and (constants["returns"] == 0).all() and (constants["values"] != 0).any()
    )
    of_stats = jax.grad(lambda p: loss(p, x["values"], x).stats.approx_kl)(x["log_prob"])
    assert (of_stats == 0).all()


def test_in_a_scan_and_donated():
    """Gradient steps inside lax.scan, the carry donated: as one by one."""
    x = batch()

    def step(p, _):
        (loss, stats), g = jax.value_and_grad(
            lambda p: pj.ppo_loss(p, x["old_log_prob"], x["advantages"], pf.LossConfig(normalize_advantages=True)),
            has_aux=True,
        )(p)
        return p - 0.1 * g, (loss, stats)

    last, (losses, stats) = jax.jit(lambda p: jax.lax.scan(step, p, length=5), donate_argnums=0)(
        jnp.asarray(x["log_prob"])
    )
    p = jnp.asarray(x["log_prob"])
    for i in range(5):
        p, (loss, one) = jax.jit(step)(p, None)
        assert loss == losses[i] and one.approx_kl == stats.approx_kl[i]
    np.testing.assert_array_equal(p, last)


def test_stats():
    stats = pj.ppo_loss(*(batch()[k] for k in ("log_prob", "old_log_prob", "advantages"))).stats
    assert list(stats.to_dict()) == list(pf.config.STATS) and stats.to_dict()["ess"] == float(stats.ess)
    assert "ess=" in repr(stats) and "ess" in dir(stats)
    with pytest.raises(AttributeError, match="Stats has no 'es'"):
        _ = stats.es
    assert isinstance(jax.tree.map(lambda x: x + 1, stats), pj.Stats)


def test_threads_of_python_and_of_xla():
    """Programs at once, each with blocks enough for XLA's threads: the bits of one."""
    from concurrent.futures import ThreadPoolExecutor

    x = to_jax(rollout(512, 300))
    program = jax.jit(lambda x: pj.gae(**x))
    wanted = program(x)
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: program(x), range(40)):
            jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_nothing_is_read_before_every_block_is_done():
    """Long blocks on XLA's threads, and a sum over them that follows at once."""
    alpha, actions = jnp.full((6000, 4), 1.5, jnp.float32), jnp.full((6000, 4), 0.3, jnp.float32)
    program = jax.jit(lambda a, x: pj.beta_log_prob(a, a, x)[0].min() + pj.beta_log_prob(a, x, x)[0].min())
    assert len({float(program(alpha, actions)) for _ in range(30)}) == 1


def test_configs_are_static():
    x = batch()
    loss = jax.jit(
        lambda p, config: pj.ppo_loss(p, x["old_log_prob"], x["advantages"], config).loss, static_argnames="config"
    )
    a, b = (loss(x["log_prob"], config=pf.LossConfig(clip_low=c, clip_high=c)) for c in (0.01, 0.4))
    assert a != b
