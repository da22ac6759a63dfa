"""CleanRL: both calls against its formulas, and the rewriting of scripts."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ppo_fast.integrations import cleanrl

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/cleanrl_ppo.py"


def args(**changes):
    defaults = {"gamma": 0.99, "gae_lambda": 0.95, "clip_coef": 0.2, "clip_vloss": True, "vf_coef": 0.5, "ent_coef": 0.01,
                "norm_adv": True, "num_steps": 19}  # fmt: skip
    return SimpleNamespace(**{**defaults, **changes})


@pytest.mark.parametrize("envs", [1, 5])
def test_advantages(envs):
    T, options = 19, args(gamma=0.9, gae_lambda=0.8)
    rewards, values = torch.randn(T, envs, dtype=torch.float64), torch.randn(T, envs, dtype=torch.float64)
    dones, next_done = (torch.rand(T, envs) < 0.2).double(), (torch.rand(envs) < 0.5).double()
    next_value = torch.randn(1, envs, dtype=torch.float64)
    before = dones.clone()
    advantages, returns = cleanrl.advantages(rewards, values, dones, next_value, next_done, options)
    assert torch.equal(dones, before)
    for n in range(envs):  # from the definition: every later delta, discounted, up to the end of the episode
        for t in range(T):
            expected, factor = 0.0, 1.0
            for k in range(t, T):
                ended = (next_done if k + 1 == T else dones[k + 1])[n]
                following = (next_value[0] if k + 1 == T else values[k + 1])[n]
                expected += factor * (rewards[k, n] + 0.9 * (1 - ended) * following - values[k, n])
                factor *= 0.9 * 0.8 * (1 - ended)
            torch.testing.assert_close(advantages[t, n], expected)
    torch.testing.assert_close(returns, advantages + values)


@pytest.mark.parametrize(
    "changes", [{}, {"clip_vloss": False}, {"norm_adv": False}, {"ent_coef": 0.0, "clip_coef": 0.1}]
)
@pytest.mark.parametrize("rows", [1, 37])
def test_loss(changes, rows):
    options, B = args(**changes), 64
    make = lambda: torch.randn(B, dtype=torch.float64)  # noqa: E731
    b_logprobs, b_advantages, b_returns, b_values = make(), make(), make(), make()
    index = torch.randperm(B)[:rows]
    log_prob = (b_logprobs[index] + 0.3 * make()[:rows]).requires_grad_()
    entropy, value = make()[:rows].requires_grad_(), make()[:rows, None].requires_grad_()
    if rows == 1 and options.norm_adv:
        b_advantages *= 0  # theirs is NaN for a single row: 0/0; ours leaves it as it is
    got = cleanrl.loss(
        log_prob, entropy, value, b_logprobs, b_advantages, b_returns, b_values, index.numpy(), options
    )  # fmt: skip
    d = log_prob - b_logprobs[index]
    a, v, R, old = b_advantages[index], value.view(-1), b_returns[index], b_values[index]
    if options.norm_adv and rows > 1:
        a = (a - a.mean()) / (a.std() + 1e-8)
    c = options.clip_coef
    policy = torch.max(-a * d.exp(), -a * d.exp().clamp(1 - c, 1 + c)).mean()
    errors = (v - R) ** 2
    if options.clip_vloss:
        errors = torch.max(errors, (old + (v - old).clamp(-c, c) - R) ** 2)
    of_value = 0.5 * errors.mean()
    loss = policy - options.ent_coef * entropy.mean() + options.vf_coef * of_value
    clipped = ((d.exp() - 1).abs() > c).double().mean()
    expected = loss, policy, of_value, entropy.mean(), -d.mean(), (d.exp() - 1 - d).mean(), clipped
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(x, dtype=torch.float64), y)
    for x, y in zip(*(torch.autograd.grad(x, (log_prob, entropy, value)) for x in (got[0], loss)), strict=True):
        torch.testing.assert_close(x, y)


SCRIPT = """import torch
# a comment that stays
def run(args, rewards, values, dones, next_value, next_done, batches):
    with torch.no_grad():
        advantages = torch.zeros_like(rewards)
        returns = advantages + values
    clipfracs = []
    for newlogprob, entropy, newvalue, mb_inds in batches:
        logratio = newlogprob - 1
        pg_loss = logratio.mean()
        loss = pg_loss - entropy.mean()
        loss.backward()
    return advantages, returns
"""


def digest(first, last):
    statements = SCRIPT.splitlines()[first - 1 : last]
    tree = ast.parse("\n".join(x.strip() for x in statements))
    return hashlib.sha256("\n".join(map(ast.unparse, tree.body)).encode()).hexdigest()[:16]


@pytest.fixture
def known(monkeypatch):
    """The blocks of SCRIPT, taken for CleanRL's."""
    monkeypatch.setattr(cleanrl, "_GAE_BLOCKS", {digest(5, 6)})
    monkeypatch.setattr(cleanrl, "_LOSS_BLOCKS", {digest(9, 11)})


def test_both_blocks_become_calls_and_nothing_else_changes(known):
    result = cleanrl.patched(SCRIPT)
    ast.parse(result)
    kept = [line for line in result.splitlines() if line in SCRIPT.splitlines()]
    assert kept == [line for i, line in enumerate(SCRIPT.splitlines(), 1) if i not in (5, 6, 9, 10, 11)]
    assert (
        "        advantages, returns = cleanrl.advantages(rewards, values, dones, next_value, next_done, args)\n"
        in result
    )
    assert result.splitlines()[1] == "from ppo_fast.integrations import cleanrl"
    spaced = SCRIPT.replace("        logratio", "\n        # why\n        logratio").replace(" - 1", "  -  1")
    assert ast.dump(ast.parse(cleanrl.patched(spaced))) == ast.dump(ast.parse(result))


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("newlogprob - 1", "newlogprob - 2", "lines 9 to 11 are not CleanRL's any more; put the call in by hand"),
        (
            "advantages = torch.zeros_like(rewards)",
            "advantages = torch.zeros_like(rewards) + 1",
            "lines 5 to 6 are not",
        ),
        ("        returns = advantages + values\n", "", r"`returns = ...` must stand once in the script, found 0"),
        ("        loss = pg", "    loss = pg", "line 9 and line 11 must be of one block"),
    ],
)
def test_a_block_that_is_not_theirs_is_refused(known, old, new, says):
    assert old in SCRIPT
    with pytest.raises(ValueError, match=says):
        cleanrl.patched(SCRIPT.replace(old, new).replace("        loss.backward()\n", ""))


def test_command_line(known, tmp_path, capsys):
    script = tmp_path / "ppo.py"
    script.write_text(SCRIPT)
    assert cleanrl.main([str(script)]) == 0
    assert capsys.readouterr().out == cleanrl.patched(SCRIPT)
    assert cleanrl.main([str(script), "--diff"]) == 0
    assert "+        advantages, returns = cleanrl" in capsys.readouterr().out
    assert script.read_text() == SCRIPT
    script.write_text("x = 1\n")
    assert cleanrl.main([str(script)]) == 1 and cleanrl.main([str(tmp_path / "no.py")]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and "must stand once" in errors[0] and "no.py" in errors[1]


CHECKOUT = os.environ.get("PPO_FAST_CLEANRL")


@pytest.mark.skipif(not CHECKOUT, reason="PPO_FAST_CLEANRL names no checkout of CleanRL")
@pytest.mark.parametrize(
    "name", ["ppo", "ppo_continuous_action", "ppo_atari", "ppo_atari_envpool", "ppo_atari_lstm", "ppo_procgen"]
)
def test_cleanrls_own_scripts_are_rewritten(name):
    source = Path(CHECKOUT, f"cleanrl/{name}.py").read_text()
    result = cleanrl.patched(source)
    assert result.count("cleanrl.advantages(") == result.count("cleanrl.loss(") == 1
    ast.parse(result)


@pytest.mark.parametrize("command", [
    ["ppo", "--total-timesteps", "1024"],
    ["ppo-continuous-action", "--env-id", "Pendulum-v1", "--total-timesteps", "512", "--num-steps", "256"],
])  # fmt: skip
def test_the_example_runs(command, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLE, *command, "--run-dir", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "steps/s" in done.stdout and list(tmp_path.glob("events*"))
