"""ppo_fast.jax: what bad input, bad labels and missing parts say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ppo_fast as pf

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import ppo_fast.jax as pj  # noqa: E402

X = np.zeros((4, 3), np.float32)
LOGITS = np.zeros((5, 7), np.float32)
ROW = np.zeros(5, np.float32)
ACTIONS = np.zeros(5, np.int32)
KL = pf.LossConfig(kl="k3", kl_coef=0.1)

BAD = [
    (lambda: pj.gae(X, X.T), ValueError, r"gae: values must be \[T, N\] = \[4, 3\], got \[3, 4\]"),
    (lambda: pj.gae(X, X[None]), ValueError, r"gae: values must be \[T, N\] = \[4, 3\], got \[1, 4, 3\]"),
    (lambda: pj.gae(X[None], X), ValueError, r"gae: values must be the shape of rewards = \[1, 4, 3\], got \[4, 3\]"),
    (lambda: pj.gae([[0.0]], X), TypeError, "gae: rewards must be an array, got list"),
    (lambda: pj.gae(None, X), TypeError, "gae: rewards must be an array, got None"),
    (lambda: pj.gae(X, None), TypeError, "gae: values must be a tensor, got None"),
    (lambda: pj.gae(X, 1.0), TypeError, "gae: values must be an array, got float"),
    (
        lambda: pj.gae(X, X.astype(int)),
        TypeError,
        "gae: values must be float32, float64, bfloat16 or float16, got int32",
    ),
    (lambda: pj.gae(X, X.astype(np.complex64)), TypeError, "gae: values has a dtype that no kernel takes, complex64"),
    (lambda: pj.gae(X, X, X[0, :2]), ValueError, r"gae: last_values must be \[N\] = \[3\], got \[2\]"),
    (lambda: pj.gae(X[None], X[None], X[0]), ValueError, "last_values must be the shape of rewards without time"),
    (lambda: pj.gae(X, X, truncated=X), ValueError, "gae: final_values must be given with truncated"),
    (lambda: pj.gae(X, X, gamma=1.5), ValueError, r"gae: gamma must be in \[0, 1\], got 1.5"),
    (lambda: pj.gae(X, X, lam="x"), TypeError, "gae: lam must be a number, got str"),
    (lambda: pj.gae(X, X, mask_mode="x"), ValueError, "gae: mask_mode must be 'carry' or 'zero', got 'x'"),
    (lambda: pj.gae(X, X, time_dim=2), ValueError, r"gae: time_dim must be in \[-2, 2\), got 2"),
    (lambda: pj.gae(X[0, 0], X), (TypeError, ValueError), "gae: rewards must"),
    (lambda: pj.gae(X, X, final_values=(1, 2, 3)), ValueError, "final_values must be an array or a pair"),
    (
        lambda: pj.gae(X, X, final_values=(ROW, ROW)),
        TypeError,
        r"final_values\[0\] must be an integer type, got float32",
    ),
    (lambda: pj.gae(X, X, cu_seqlens=ACTIONS), ValueError, r"rewards must be packed, \[M\], with cu_seqlens"),
    (lambda: pj.gae(X[0], X[0], cu_seqlens=ROW), TypeError, "cu_seqlens must be int32 or int64, got float32"),
    (lambda: pj.gae(X, X, out=X), TypeError, r"gae: out must be a tuple of two arrays, \(advantages, returns\)"),
    (
        lambda: pj.gae(X, X, out=(X, X[:2])),
        ValueError,
        r"gae: out\[1\] must be the shape of rewards = \[4, 3\], got \[2, 3\]",
    ),
    (lambda: pj.gae(X, X, out=(X.astype(np.float16), X)), TypeError, r"gae: out\[0\] must be float32, got float16"),
    (lambda: pj.vtrace(X, X, X, rho_clip=0.0), ValueError, "vtrace: rho_clip must be > 0, got 0"),
    (
        lambda: pj.discounted_returns(X, mask=X[0]),
        ValueError,
        r"discounted_returns: mask must be \[T, N\] = \[4, 3\], got \[3\]",
    ),
    (lambda: pj.whiten(X, ddof=2), ValueError, "whiten: ddof must be 0 or 1, got 2"),
    (lambda: pj.whiten(X, mask=X[0]), ValueError, r"whiten: mask must be the shape of x = \[4, 3\], got \[3\]"),
    (lambda: pj.whiten(None), TypeError, "whiten: x must be a tensor, got None"),
    (lambda: pj.categorical_log_prob(LOGITS, ACTIONS[:2]), ValueError, "actions must be the shape of the rows"),
    (
        lambda: pj.categorical_log_prob(ACTIONS, ACTIONS[0]),
        TypeError,
        "logits must be float32, float64, bfloat16 or float16",
    ),
    (
        lambda: pj.categorical_log_prob(LOGITS, ACTIONS, temperature=0.0),
        ValueError,
        "temperature must be a finite number > 0",
    ),
    (lambda: pj.multi_categorical_log_prob(LOGITS, ACTIONS[:, None], [3]), ValueError, "nvec must have 1 entries"),
    (lambda: pj.beta_log_prob(LOGITS, LOGITS, LOGITS, low=1.0), ValueError, "low must be less than high"),
    (lambda: pj.normal_log_prob(LOGITS, ROW, LOGITS), ValueError, "log_std must broadcast to the shape of mean"),
    (
        lambda: pj.ppo_loss(ROW, ROW, LOGITS),
        ValueError,
        r"advantages must be the shape of log_prob = \[5\], got \[5, 7\]",
    ),
    (lambda: pj.ppo_loss(ROW, ROW, None), TypeError, "ppo_loss: advantages must be a tensor, got None"),
    (lambda: pj.ppo_loss(None, ROW, ROW), TypeError, "ppo_loss: log_prob must be an array, got None"),
    (lambda: pj.ppo_loss(ROW, ROW, 1.0), TypeError, "ppo_loss: advantages must be an array, got float"),
    (lambda: pj.ppo_loss(ROW, ROW, ROW, KL), TypeError, r"ref_log_prob must be a tensor with LossConfig\(kl=...\)"),
    (lambda: pj.ppo_loss(ROW, ROW, ROW, "cleanrl"), TypeError, "config must be a LossConfig, got str"),
    (
        lambda: pj.ppo_loss(ROW, ROW, ROW, pf.LossConfig().on("cpu")),
        TypeError,
        "config must be a LossConfig, got DeviceLossC",
    ),
    (
        lambda: pj.ppo_loss(ROW, ROW, ROW, denominator=0.0),
        ValueError,
        "denominator must be a finite number > 0, got 0.0",
    ),
    (lambda: pj.ppo_loss(ROW, ROW, ROW, values=ROW), TypeError, "returns must be a tensor with values, got None"),
    (
        lambda: pj.ppo_loss(ROW, ROW, ROW, pf.LossConfig(reduction="seq-mean-token-mean"), mask=LOGITS),
        ValueError,
        "mask must be the shape of log_prob",
    ),
    (lambda: pj.categorical_ppo_loss(LOGITS, ACTIONS, ROW, ROW, index=ROW), TypeError, "index must be an integer type"),
    (
        lambda: pj.normal_ppo_loss(LOGITS, ROW, LOGITS, ROW, ROW),
        ValueError,
        "log_std must broadcast to the shape of mean",
    ),
]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_bad_input(i):
    """Named while tracing: nothing runs, under jit or not."""
    call, kind, message = BAD[i]
    with pytest.raises(kind, match=message):
        call()
    with pytest.raises(kind, match=message):
        jax.jit(call)()


@pytest.mark.parametrize("jit", [lambda f: f, jax.jit])
def test_labels_out_of_range(jit):
    """Only the running program knows: it stops with one line, and the next one runs."""
    runs = [
        (lambda a: pj.categorical_log_prob(LOGITS, a)[0], "categorical_log_prob: actions must be in range, got 7 at 3"),
        (
            lambda a: pj.categorical_ppo_loss(LOGITS, a, ROW, ROW).loss,
            "categorical_ppo_loss: actions must be in range, got 7 at 3",
        ),
        (
            lambda a: pj.multi_categorical_log_prob(LOGITS, a[:, None], [7])[0],
            "multi_categorical_log_prob: actions must be in range, got 7 at 3",
        ),
        (
            lambda a: pj.categorical_ppo_loss(LOGITS, ACTIONS, ROW, ROW, index=a).loss,
            "categorical_ppo_loss: index must be in range, got 7 at 3",
        ),
        (
            lambda a: pj.normal_ppo_loss(LOGITS, LOGITS[0], LOGITS, ROW, ROW, index=a).loss,
            "normal_ppo_loss: index must be in range, got 7 at 3",
        ),
        (
            lambda a: pj.gae(ROW, ROW, cu_seqlens=a)[0],
            "gae: cu_seqlens must go from 0 to M = 5, got 0 to 0",
        ),
    ]  # fmt: skip
    for function, message in runs:
        program = jit(function)
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            program(jnp.asarray([0, 0, 0, 7, 0])).block_until_ready()
    assert jnp.isfinite(jit(runs[0][0])(ACTIONS)).all()
    with pytest.raises(jax.errors.JaxRuntimeError, match="cu_seqlens must not decrease, got 4 before 2"):
        pj.gae(ROW, ROW, cu_seqlens=np.array([0, 4, 2, 5]))[0].block_until_ready()


def test_a_sparse_final_value_that_is_missing_is_nan():
    ended = np.zeros((4, 3), bool)
    ended[1, 2] = ended[2, 0] = True
    adv, _ = pj.gae(X, X, truncated=ended, final_values=(np.array([5]), np.array([1.0], np.float32)))
    assert jnp.isnan(adv).sum() == 3 and jnp.isnan(adv[:3, 0]).all() and adv[1, 2] > 0


def test_forward_mode_of_a_loss_is_refused():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda p: pj.ppo_loss(p, ROW, ROW).loss, (ROW,), (ROW,))


def test_a_plan_of_another_build_is_refused():
    out = jax.ShapeDtypeStruct((4, 3), np.float32)
    from ppo_fast.jax._call import Call, plans

    call = Call("whiten")
    written: list[bytes] = []
    plans.whiten(call(X), None, call.result((4, 3), np.float32), None, False, 1, 1e-8, True, False, written)
    plan = np.frombuffer(written[0], np.int64)
    wrong = [
        plan[:2],
        plan[:-1],
        np.array([*plan[:1], 9999, *plan[2:]]),
        np.array([99, *plan[1:]]),
        np.array([plan[0], plan[1] + 1, *plan[2:], 0]),  # a struct that is one word longer
        np.zeros(0, np.int64),
    ]
    for words in wrong:
        with pytest.raises(jax.errors.JaxRuntimeError, match="another build of ppo_fast"):
            jax.ffi.ffi_call("ppo_fast.whiten", out)(X, plan=words).block_until_ready()
    assert jnp.isfinite(jax.ffi.ffi_call("ppo_fast.whiten", out)(X, plan=plan)).all()


NO_MODULE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
"""
OLD_JAX = "import jax; jax.__version_info__, jax.__version__ = (0, 4, 38), '0.4.38'"


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (NO_MODULE.format(hidden="jax"), 'ppo_fast.jax needs jax: pip install "ppo_fast[jax]"'),
        (OLD_JAX, "ppo_fast.jax needs jax >= 0.6, got 0.4.38: pip install --upgrade jax"),
        (
            "import ppo_fast._C_xla as x; x.FFI = (9, 9)",
            "ppo_fast.jax: this ppo_fast was built for a newer jaxlib (FFI (9, 9))",
        ),
        (NO_MODULE.format(hidden="ppo_fast._C_xla"), "ppo_fast.jax: this ppo_fast was built without its part for XLA"),
        (NO_MODULE.format(hidden="ppo_fast._C"), "ppo_fast.jax: this ppo_fast was built without its part for XLA"),
    ],
)
def test_what_is_missing_is_said_in_one_line(before, message):
    code = f"{before}\ntry:\n    import ppo_fast.jax\nexcept ImportError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(message) and done.stdout.count("\n") == 1, done.stdout + done.stderr


def test_torch_needs_no_jax():
    code = "import sys, ppo_fast; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.mark.skipif(not SETUP.exists(), reason="needs the repository")
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PPO_FAST_XLA": "2"}, "ppo_fast: PPO_FAST_XLA must be 0, 1 or unset, got '2'"),
        ({"PPO_FAST_XLA_INCLUDE": "/nowhere"}, "PPO_FAST_XLA_INCLUDE=/nowhere, but no xla/ffi/api/ffi.h in /nowhere"),
        ({"PPO_FAST_XLA": "0"}, "ppo_fast"),
        ({}, "ppo_fast"),
    ],
)
def test_a_build_says_why_there_is_no_part_for_xla(variables, message):
    done = subprocess.run([sys.executable, SETUP, "-q", "--name"], capture_output=True, text=True, cwd=SETUP.parent,
                          env={**os.environ, "PPO_FAST_CUDA": "0", **variables})  # fmt: skip
    assert (done.stdout + done.stderr).strip().splitlines()[-1].endswith(message), done.stdout + done.stderr
