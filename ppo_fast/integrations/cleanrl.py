"""CleanRL: its scripts are files to copy, with nothing to hook into, so two blocks of a script are rewritten as two calls.

    python -m ppo_fast.integrations.cleanrl ppo.py > ppo_fast_ppo.py           # a copy of your script with both calls
    python -m ppo_fast.integrations.cleanrl ppo_continuous_action.py --diff    # what would change

By hand it is the same: in place of the loop over steps, and of everything from `logratio = ...` to `loss = ...`,

    advantages, returns = cleanrl.advantages(rewards, values, dones, next_value, next_done, args)

    loss, pg_loss, v_loss, entropy_loss, old_approx_kl, approx_kl, clipfrac = cleanrl.loss(
        newlogprob, entropy, newvalue, b_logprobs, b_advantages, b_returns, b_values, mb_inds, args)

for `ppo.py`, `ppo_continuous_action.py`, `ppo_atari.py`, `ppo_atari_envpool.py`, `ppo_atari_lstm.py`, `ppo_procgen.py` and what
was made of them, as long as these blocks are still CleanRL's: one that was changed is refused, not rewritten. The agent's
distribution stays as it is; `examples/cleanrl_ppo.py` and `examples/cleanrl_ppo_continuous_action.py` have it fused too.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import LossConfig, gae, ppo_loss


def advantages(
    rewards: Tensor, values: Tensor, dones: Tensor, next_value: Tensor, next_done: Tensor, args: Any
) -> tuple[Tensor, ...]:
    """(advantages, returns) of a rollout, [T, N]. dones[t] says whether an episode ended before step t."""
    ended = dones.roll(-1, 0)  # [T, N]
    ended[-1] = next_done
    return gae(
        rewards, values, next_value.reshape(-1), terminated=ended, gamma=args.gamma, lam=args.gae_lambda
    )  # fmt: skip


def config_of(args: Any) -> LossConfig:
    """The loss that a script's arguments describe."""
    return LossConfig(
        clip_low=args.clip_coef, clip_high=args.clip_coef, value_clip=args.clip_coef if args.clip_vloss else None,
        value_coef=args.vf_coef, entropy_coef=args.ent_coef, normalize_advantages=args.norm_adv,
    )  # fmt: skip


def loss(
    newlogprob: Tensor, entropy: Tensor, newvalue: Tensor, b_logprobs: Tensor, b_advantages: Tensor, b_returns: Tensor,
    b_values: Tensor, mb_inds: Any, args: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """(loss, pg_loss, v_loss, entropy_loss, old_approx_kl, approx_kl, clipfrac) of a minibatch; clipfrac is a number."""
    old, of_batch, returns, old_values = (x[mb_inds] for x in (b_logprobs, b_advantages, b_returns, b_values))
    critic = {"values": newvalue.reshape(-1), "old_values": old_values, "returns": returns}
    total, stats = ppo_loss(newlogprob, old, of_batch, config_of(args), entropy=entropy, **critic)
    of_policy = stats.policy_loss, stats.value_loss, stats.entropy, stats.old_approx_kl, stats.approx_kl
    return total, *of_policy, stats.clip_fraction.item()


# --- rewriting a script -----------------------------------------------------------------------------------------------

_GAE = "advantages, returns = cleanrl.advantages(rewards, values, dones, next_value, next_done, args)"
_LOSS = (
    "loss, pg_loss, v_loss, entropy_loss, old_approx_kl, approx_kl, clipfrac = cleanrl.loss(\n"
    "    newlogprob, entropy, newvalue, b_logprobs, b_advantages, b_returns, b_values, mb_inds, args)\n"
    "clipfracs += [clipfrac]"
)
#: Digests of the blocks that the calls replace, comments and layout aside: CleanRL's from v1.0.0 on. In any other something was
#: changed that a call would drop.
_GAE_BLOCKS = {"e1077398aa88169f"}
_LOSS_BLOCKS = {"22e36dd585602ff9"}


def patched(source: str, name: str = "the script") -> str:
    """A CleanRL script with both blocks as calls. ValueError where one is not found, or is not CleanRL's."""
    tree = ast.parse(source, name)
    lines = source.splitlines()
    first = _find(
        tree, lambda x: _assigns(x, "advantages") and "zeros_like" in ast.unparse(x), "advantages = torch.zeros_like"
    )
    last = _find(
        tree, lambda x: _assigns(x, "returns") and ast.unparse(x) == "returns = advantages + values", "returns = ..."
    )
    gae_block = _block(tree, first, last, name)
    _known(gae_block, _GAE_BLOCKS, name)
    first = _find(tree, lambda x: _assigns(x, "logratio"), "logratio = newlogprob - ...")
    last = _find(tree, lambda x: _assigns(x, "loss") and "pg_loss" in ast.unparse(x), "loss = pg_loss ...")
    loss_block = _block(tree, first, last, name)
    _known(loss_block, _LOSS_BLOCKS, name)
    imports = [x for x in tree.body if isinstance(x, (ast.Import, ast.ImportFrom))]
    for block, call in ((loss_block, _LOSS), (gae_block, _GAE)):  # from below, so that the numbers above stay true
        start, end = block[0].lineno - 1, block[-1].end_lineno
        indent = " " * block[0].col_offset
        lines[start:end] = [indent + line for line in call.splitlines()]
    lines.insert(imports[-1].end_lineno or 0, "from ppo_fast.integrations import cleanrl")
    return "\n".join(lines) + "\n"


def _assigns(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id == name for x in node.targets)


def _find(tree: ast.AST, matches: Any, what: str) -> ast.stmt:
    found = [x for x in ast.walk(tree) if isinstance(x, ast.stmt) and matches(x)]
    if len(found) != 1:
        raise ValueError(f"cleanrl: `{what}` must stand once in the script, found {len(found)}")
    return found[0]


def _block(tree: ast.AST, first: ast.stmt, last: ast.stmt, name: str) -> list[ast.stmt]:
    """The statements from first to last, which must be neighbours in one body."""
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(body, list) and first in body and last in body[body.index(first) :]:
                return body[body.index(first) : body.index(last) + 1]
    raise ValueError(f"cleanrl: {name}: line {first.lineno} and line {last.lineno} must be of one block")


def _known(block: list[ast.stmt], digests: set[str], name: str) -> None:
    text = "\n".join(ast.unparse(statement) for statement in block)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    if digest not in digests:
        raise ValueError(
            f"cleanrl: {name}: lines {block[0].lineno} to {block[-1].end_lineno} are not CleanRL's any more; put the call in "
            "by hand, see python -m ppo_fast.integrations.cleanrl --help"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m ppo_fast.integrations.cleanrl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("script", type=Path, help="a CleanRL PPO script; it is not changed")
    parser.add_argument("--diff", action="store_true", help="print a diff in place of the whole script")
    options = parser.parse_args(arguments)
    try:
        source = options.script.read_text()
        result = patched(source, str(options.script))
    except (OSError, SyntaxError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.diff:
        before, after = source.splitlines(keepends=True), result.splitlines(keepends=True)
        sys.stdout.writelines(
            difflib.unified_diff(before, after, str(options.script), f"{options.script.stem}_fast.py")
        )
    else:
        sys.stdout.write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
