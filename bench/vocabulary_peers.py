"""Other people's log-probs of a vocabulary, from logits or from hidden states, where their packages import.

By provider: a function that returns log_prob and, where it is asked for, entropy, both with gradients, and a note on it; or
None and why not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F

from . import peers

Found = tuple[Callable | None, str]


def from_logits(dtype: str) -> dict[str, Found]:
    """(logits [rows, V], labels [rows]) -> (log_prob, entropy). Theirs are in the logits' dtype."""
    note = "" if dtype == "float32" else f"log-prob and entropy in {dtype} (on a CPU)"
    found = {"trl": _trl_of_logits(), "verl": _verl_of_logits()}
    return {name: (function, note if function else why) for name, (function, why) in found.items()}


def from_hidden(entropy: bool) -> dict[str, Found]:
    """(hidden [M, H], weight [V, H], targets [M]) -> (log_prob, entropy or None)."""
    return {"torch-chunked": _torch(entropy), "liger": _liger(entropy), "trl": _trl(entropy), "verl": _verl(entropy)}


def _trl_of_logits() -> Found:
    both, why = peers.function("trl.trainer.utils", "selective_log_softmax_and_entropy")
    if both is None:
        return None, why
    # one sequence: it loops over sequences
    return lambda logits, labels: [x.squeeze(0) for x in both(logits[None], labels[None])], ""


def _verl_of_logits() -> Found:
    log_prob, why = peers.function("verl.utils.torch_functional", "logprobs_from_logits")
    entropy, _ = peers.function("verl.utils.torch_functional", "entropy_from_logits")
    if log_prob is None or entropy is None:
        return None, why

    def both(logits, labels):
        # one sequence: its torch path loops over sequences; flash-attn's in-place backward would spoil the entropy's
        found = log_prob(logits[None], labels[None], inplace_backward=False)
        return found.squeeze(0), entropy(logits)

    return both, ""


def _torch(entropy: bool) -> Found:
    if entropy:
        return None, "F.linear_cross_entropy gives no entropy"
    if not hasattr(F, "linear_cross_entropy"):
        return None, "torch before 2.13 has no F.linear_cross_entropy"
    return lambda hidden, weight, targets: (
        -F.linear_cross_entropy(hidden, weight, targets, reduction="none"),
        None,
    ), ""


def _liger(entropy: bool) -> Found:
    module, name = "liger_kernel.ops.fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction"
    loss, why = peers.function(module, name)
    if loss is None:
        return None, why

    def both(hidden, weight, targets):
        found = loss.apply(hidden, weight, targets, 1.0, -100, 1, entropy)
        return (-found[0], found[1]) if entropy else (-found, None)

    return both, ""


def _trl(entropy: bool) -> Found:
    loss, why = peers.function("trl.trainer.utils", "_ChunkedLogProbFunction")
    columns, _ = peers.function("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    if loss is None or columns is None:
        return None, why or "trl before 1.16 has another _ChunkedLogProbFunction"
    wanted = ("entropy",) if entropy else ()
    return lambda hidden, weight, targets: loss.apply(
        hidden, weight, None, targets, 1.0, columns, None, 1.0, wanted
    )[:2], ""  # fmt: skip


def _verl(entropy: bool) -> Found:
    module, why = peers.function("verl.utils.experimental.torch_functional", "FusedLinearForPPO")
    if module is None:
        return None, why
    return module(), "" if entropy else "computes the entropy too"
