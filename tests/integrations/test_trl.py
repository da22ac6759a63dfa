"""TRL: what stands in for its functions against those functions, and its GRPO trainer on a small model without and with us."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import trl as theirs
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

from bench.trainers.trl import tokenizer
from ppo_fast import linear_log_prob as original
from ppo_fast.integrations import trl

HEAD = ChunkedLogProbFunction.apply
LENGTHS = torch.tensor([7, 4, 9, 0, 1, 8])  # one row is empty
B, T, V, H = len(LENGTHS), 9, 37, 8
MASK = (torch.arange(T) < LENGTHS[:, None]).long()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(mine, other, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


# --- the head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "temperature, softcap, scale, bias",
    [(1.0, None, 1.0, False), (0.7, None, 1.0, True), (1.3, 5.0, 1.0, False), (0.9, 5.0, 0.25, True), (1.0, None, 2.0, False)],
)  # fmt: skip
def test_head(dtype, temperature, softcap, scale, bias):
    g = generator()
    hidden = torch.randn(2 * B, T, H, generator=g, dtype=dtype)[::2].flatten(0, 1)  # a view's copy, M = B·T
    inputs = [hidden, torch.randn(V, H, generator=g, dtype=dtype), torch.randn(V, generator=g, dtype=dtype)][: 2 + bias]
    inputs += [None] * (3 - len(inputs))
    targets = torch.randint(V, (B * T,), generator=g)
    pulls = torch.randn(2, B * T, generator=g)

    def run(apply, dtype):
        leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in inputs]
        log_prob, entropy, *rest = apply(*leaves, targets, temperature, 16, softcap, scale, ("log_probs", "entropy"))
        assert rest == [None, None, None] and log_prob.dtype == entropy.dtype == torch.float32
        ((log_prob * pulls[0]).sum() + (entropy * pulls[1]).sum()).backward()
        grads = [x.grad for x in leaves if x is not None]
        assert all(x.dtype == dtype for x in grads)
        return [log_prob.detach(), entropy.detach(), *grads]

    mine, other = run(trl.head, dtype), run(HEAD, dtype)
    if (
        dtype is torch.bfloat16
    ):  # TRL rounds a product before it adds the bias, and after: no further from the truth than it
        for x, y, truth in zip(mine, other, run(HEAD, torch.float64), strict=True):
            assert (x - truth).norm() <= 1.05 * (y - truth).norm() < 0.05 * truth.norm()
        return
    for x, y in zip(mine, other, strict=True):
        close(x, y, 1e-4, 2e-5)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy")])
def test_head_without_tokens_and_under_autocast(outputs):
    g = generator(1)
    weight = torch.randn(V, H, generator=g)
    empty = torch.zeros(0, H, requires_grad=True)
    log_prob, *_ = trl.head(empty, weight, None, torch.zeros(0, dtype=torch.long), 1.0, 16, None, 1.0, outputs)
    log_prob.sum().backward()
    assert log_prob.shape == (0,) and empty.grad.shape == (0, H)
    hidden, targets = torch.randn(20, H, generator=g), torch.randint(V, (20,), generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        x, y = (f(hidden, weight, None, targets, 0.8, 16, None, 1.0, outputs) for f in (HEAD, trl.head))
    for a, b in zip(x, y, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(b, a, 1e-5, 1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"outputs": ("log_probs", "is_top1")}, {"logit_scale": -1.0}, {"logit_scale": 0.0}, {"softcap": 4.0, "half": True},
     {"shard": True}],
)  # fmt: skip
def test_head_calls_theirs_for_what_it_cannot_do(changes, monkeypatch):
    g = generator(2)
    dtype = torch.bfloat16 if changes.get("half") else torch.float32
    hidden, weight = (torch.randn(*shape, generator=g).to(dtype) for shape in ((5, H), (V, H)))
    if changes.get("shard"):
        weight.ds_id = 1
    called = []
    monkeypatch.setattr(trl, "_head", lambda *args: called.append(args) or HEAD(*args))
    options = (
        changes.get("softcap"),
        changes.get("logit_scale", 1.0),
        changes.get("outputs", ("log_probs", "entropy")),
    )
    mine = trl.head(hidden, weight, None, torch.arange(5), 1.0, 16, *options)
    other = HEAD(hidden, weight, None, torch.arange(5), 1.0, 16, *options)
    assert len(called) == 1 and all(a is b is None or torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def model(vocabulary=V, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "max_position_embeddings": 64, **changes}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **config))


@pytest.mark.parametrize("tied", [False, True])
def test_fused_lm_head_of_a_model(tied):
    ids = torch.randint(V, (3, 12), generator=generator())
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1] = -100
    found = []
    for enabled in (False, True):
        net = model(tie_word_embeddings=tied)
        utils.add_fused_lm_head(net, temperature=0.7, outputs=("log_probs", "entropy"))
        if enabled:
            trl.enable()
        try:
            out = net(ids, labels=labels, fused_lm_head=True)
        finally:
            if enabled:
                trl.disable()
        (out.loss + 0.1 * out.entropy.sum()).backward()
        found.append((out.loss, out.log_probs, out.entropy, *(p.grad for p in net.parameters())))
    for x, y in zip(*found, strict=True):
        close(y, x, 1e-4, 1e-6)


def test_only_labels_are_scored(monkeypatch):
    seen = []
    monkeypatch.setattr(
        trl, "linear_log_prob", lambda hidden, *a, **k: seen.append(len(hidden)) or original(hidden, *a, **k)
    )
    ids = torch.zeros(2, 6, dtype=torch.long)
    net = model()
    utils.add_fused_lm_head(net)
    with trl.enabled():
        labels = ids.masked_fill(torch.arange(6) < 4, -100)
        assert net(ids, labels=labels, fused_lm_head=True).log_probs.count_nonzero() == 4
        net(ids, labels=torch.full_like(ids, -100), fused_lm_head=True).loss.backward()  # a zero with a graph
    assert seen == [4, 0]


# --- from logits --------------------------------------------------------------------------------------------------------


def logits_of(shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).mul(4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("view", [False, True])
def test_selective_log_softmax(dtype, k, temperature, view):
    x = logits_of((B, T + 1, V), dtype)
    x = x[:, :-1] if view else x[:, 1:].contiguous()
    x[0, 0, 5:] = -torch.inf
    index = torch.randint(5, (B, T) if k is None else (B, T, k), generator=generator(1))
    found = []
    for f in (trl._selective_log_softmax, trl.selective_log_softmax):
        leaf = x.clone().requires_grad_() if not view else x.detach().requires_grad_()
        out = f(leaf, index, temperature)
        (grad,) = torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape).cos()).sum(), leaf)
        assert out.dtype == dtype and out.shape == index.shape
        found.append((out, grad))
    tight = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for a, b in zip(*found, strict=True):
        close(b, a, **tight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [None, 1, 3])
def test_half_precision_has_their_bits(dtype, k):
    x, index = logits_of((B, T, V), dtype), torch.randint(V, (B, T) if k is None else (B, T, k), generator=generator())
    expected = x.log_softmax(-1).gather(-1, index.unsqueeze(-1) if k is None else index).view(index.shape)
    assert torch.equal(trl.selective_log_softmax(x, index), expected)
    assert torch.equal(trl.entropy_from_logits(x, 4), trl._entropy_from_logits(x, 4))
    if k is None:
        for a, b in zip(trl.selective_log_softmax_and_entropy(x, index), trl._both(x, index), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(V,), (5, V), (2, 3, V), (2, 2, 2, V), (0, V), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_from_logits(shape, dtype):
    x = logits_of(shape, dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    mine = trl.entropy_from_logits(leaves[1])
    if 0 in shape:
        assert mine.shape == shape[:-1]
        return
    other = trl._entropy_from_logits(leaves[0], 2)
    assert mine.dtype == dtype and mine.shape == other.shape
    close(mine, other, 1e-5, 1e-5)
    for y in (mine, other):
        y.sum().backward()
    close(leaves[1].grad, leaves[0].grad, 1e-4, 1e-6)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_both_from_logits(with_gradient, masked):
    x, index = logits_of((B, T, V)), torch.randint(V, (B, T), generator=generator())
    row_mask = MASK if masked else None
    found = []
    for f in (trl._both, trl.selective_log_softmax_and_entropy):
        leaf = x.clone().requires_grad_()
        log_prob, entropy = f(leaf, index, with_gradient, 0.8, row_mask)
        assert entropy.requires_grad is with_gradient
        (log_prob.sum() + (2 * entropy.sum() if with_gradient else 0)).backward()
        found.append((log_prob, entropy, leaf.grad))
    for a, b in zip(*found, strict=True):
        close(b, a, 1e-4, 1e-5)
    if masked:  # NaN there reaches nothing
        dirty = x.clone().masked_fill_(MASK[..., None] == 0, torch.nan).requires_grad_()
        log_prob, entropy = trl.selective_log_softmax_and_entropy(dirty, index, with_gradient, 0.8, row_mask)
        assert torch.equal(log_prob, found[1][0]) and torch.equal(entropy, found[1][1])
        (log_prob.sum() + (2 * entropy.sum() if with_gradient else 0)).backward()
        assert torch.equal(dirty.grad, found[1][2])


def test_odd_calls_are_theirs():
    x = logits_of((2, 3, V))
    with pytest.raises(ValueError, match="temperature"):
        trl.selective_log_softmax(x, torch.zeros(2, 3, dtype=torch.long), 0.0)
    index = torch.zeros(2, 2, 4, dtype=torch.long)  # gather takes fewer positions; so do they
    with pytest.raises(RuntimeError):
        trl.selective_log_softmax(x, index[:, :, :, None])
    assert trl.selective_log_softmax(x, torch.zeros(2, 3, 0, dtype=torch.long)).shape == (2, 3, 0)


# --- GRPO's loss --------------------------------------------------------------------------------------------------------


def trainer_of(log_prob, entropy, **settings):
    """What `_compute_loss` reads of a trainer, and no model."""
    args = {"delta": None, "use_bias_correction_kl": False, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.25,
            "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
            "steps_per_generation": 4}  # fmt: skip
    methods = theirs.GRPOTrainer
    fake = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0,
        importance_sampling_level="token", epsilon_low=0.1, epsilon_high=0.15, loss_type="grpo", use_vllm=False,
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=2, max_completion_length=20,
        _entropy_bonus_enabled=False, entropy_coef=0.3, use_adaptive_entropy=False, model=SimpleNamespace(training=True),
        get_gamma_weights=methods.get_gamma_weights, get_off_policy_mask=methods.get_off_policy_mask,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, args=SimpleNamespace(**args),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t, sync_gradients=True,
                                    pad_across_processes=lambda t, **_: t),
        _get_per_token_logps_and_entropies=lambda *a, **k: (log_prob, entropy, None),
    )  # fmt: skip
    fake.get_high_entropy_mask = lambda *args: methods.get_high_entropy_mask(fake, *args)
    for name, value in settings.items():
        setattr(fake.args if name in args else fake, name, value)
    return fake


def batch(seed=0, scale=0.3, **changes):
    g = generator(seed)
    make = lambda scale, mean=0.0: torch.randn(B, T, generator=g) * scale + mean  # noqa: E731
    ids = torch.zeros(B, T, dtype=torch.long)
    x = {"log_prob": make(scale, -1.5), "entropy": make(0.2, 2.0).abs()}
    inputs = {
        "prompt_ids": ids[:, :2], "prompt_mask": ids[:, :2] + 1, "completion_ids": ids, "completion_mask": MASK,
        "advantages": torch.tensor([1.0, -0.7, 0.4, 2.0, -1.5, 0.0]), "old_per_token_logps": make(scale, -1.5),
        "ref_per_token_logps": make(scale, -1.5), "num_items_in_batch": MASK.sum() * 3,
        "importance_sampling_ratio": make(0.3).exp(), "sampling_per_token_logps": make(scale, -1.5),
    }  # fmt: skip
    return x, {k: v for k, v in {**inputs, **changes}.items() if v is not None}


def loss_of(compute, x, inputs, settings):
    log_prob = x["log_prob"].clone().requires_grad_()
    fake = trainer_of(log_prob, x["entropy"], **settings)
    loss = compute(fake, None, inputs)
    (grad,) = torch.autograd.grad(loss, log_prob)
    return loss, grad, fake._metrics


def compare(x, inputs, settings):
    loss, grad, metrics = loss_of(trl._compute_loss, x, inputs, settings)
    mine, my_grad, my_metrics = loss_of(trl.compute_loss, x, inputs, settings)
    close(mine, loss)
    close(my_grad, grad)
    for mode in metrics:
        assert set(my_metrics[mode]) == set(metrics[mode])
        for name, values in metrics[mode].items():
            assert my_metrics[mode][name] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), name
    return my_grad, my_metrics


KINDS = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
SETTINGS = {
    "plain": {},
    "sequence": {"importance_sampling_level": "sequence"},
    "a KL": {"beta": 0.2},
    "an unbiased KL": {"beta": 0.2, "use_bias_correction_kl": True},
    "sequence, an unbiased KL": {"importance_sampling_level": "sequence", "beta": 0.2, "use_bias_correction_kl": True},
    "a cap": {"delta": 1.2},
    "a low cap": {"delta": 1.05},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "high entropy only": {"top_entropy_quantile": 0.4, "beta": 0.2},
    "vllm": {"use_vllm": True, "beta": 0.1},
    "vllm, uncorrected": {"use_vllm": True, "vllm_importance_sampling_correction": False},
    "a bonus": {"_entropy_bonus_enabled": True},
    "evaluation": {"model": SimpleNamespace(training=False)},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradient_and_metrics(kind, name):
    settings = {"loss_type": kind, "epsilon_high": 1.1 if kind == "cispo" else 0.15, **SETTINGS[name]}
    grad, metrics = compare(*batch(), settings)
    assert grad.count_nonzero() > 3 and torch.equal(grad[MASK == 0], torch.zeros(int((MASK == 0).sum())))
    mode = "train" if name != "evaluation" else "eval"
    assert len(metrics[mode]["entropy"]) == 1


@pytest.mark.parametrize("kind", KINDS[:7])
@pytest.mark.parametrize(
    "changes",
    [{"old_per_token_logps": None}, {"tool_mask": (torch.arange(T) % 3 != 1).long().expand(B, T)},
     {"completion_mask": MASK.float()}, {"completion_mask": MASK * 0}, {"num_items_in_batch": torch.tensor(0)},
     {"sampling_per_token_logps": None}],
    ids=["on policy", "tools", "a mask of numbers", "nothing", "no items", "no sampler"],
)  # fmt: skip
def test_odd_batches(kind, changes):
    settings = {"loss_type": kind, "epsilon_high": 1.1, "off_policy_mask_threshold": 0.05}
    compare(*batch(seed=3, **changes), settings)


@pytest.mark.parametrize("kind", KINDS[:7])
def test_extreme_ratios_and_ties(kind):
    x, inputs = batch(seed=4, scale=6.0)
    inputs["advantages"] = torch.randn(B, T, generator=generator(5))  # one a token, as subclasses of theirs have it
    inputs["old_per_token_logps"][0] = x["log_prob"][0]  # ratio 1
    settings = {"loss_type": kind, "epsilon_high": 1.0}
    compare(x, inputs, settings)


def test_nan_where_masked_reaches_nothing():
    for kind in KINDS[:7]:
        x, inputs = batch()
        settings = {"loss_type": kind, "beta": 0.2, "epsilon_high": 1.1}
        loss, grad, metrics = loss_of(trl.compute_loss, x, inputs, settings)
        for tensors, names in ((x, x), (inputs, ("old_per_token_logps", "ref_per_token_logps"))):
            for name in names:
                tensors[name] = tensors[name].masked_fill(MASK == 0, torch.nan)
        again, same, logged = loss_of(trl.compute_loss, x, inputs, settings)
        assert torch.equal(loss, again) and torch.equal(grad, same)
        assert str(metrics) == str(logged)


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "vespo"}, {"_entropy_bonus_enabled": True}, {"aux_loss_enabled": True},
     {"loss_type": "cispo", "epsilon_high": 0.2}, {"loss_type": "sapo", "sapo_temperature_neg": 0.0},
     {"loss_type": "sapo", "importance_sampling_level": "sequence"}, {"importance_sampling_level": "words"},
     {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": True}, {"loss_type": "new"}],
)  # fmt: skip
def test_what_is_left_to_theirs(settings):
    assert trl.config_of(trainer_of(None, None)) is not None
    assert trl.config_of(trainer_of(None, None, **settings)) is None


# --- the trainer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path):
    datasets = pytest.importorskip("datasets")

    def run(cls=theirs.GRPOTrainer, **settings):
        data = datasets.Dataset.from_dict({"prompt": ["one two", "a", "three", "four five"] * 2})
        arguments = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 2,
                     "max_completion_length": 8, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False,
                     "logging_steps": 1, "disable_tqdm": True, "seed": 3, "save_strategy": "no", **settings}  # fmt: skip
        model(vocabulary=258).save_pretrained(tmp_path / "model")  # a KL loads it again
        trainer = cls(
            str(tmp_path / "model"), lambda completions, **_: [float(len(set(x))) for x in completions],
            theirs.GRPOConfig(**arguments), train_dataset=data, processing_class=tokenizer(258),
        )  # fmt: skip
        trainer.train()
        return trainer

    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings", [{}, {"num_iterations": 2, "beta": 0.1, "loss_type": "grpo", "gradient_accumulation_steps": 2}]
)
def test_training_is_theirs(trained, settings):
    one = trained(**settings)
    with trl.enabled():
        two = trained(**settings)
        three = trained(trl.GRPOTrainer, **settings)
    for x, y, z in zip(*(t.model.parameters() for t in (one, two, three)), strict=True):
        close(y, x, 1e-3, 1e-4)
        assert torch.equal(y, z)
    for x, y in zip(one.state.log_history, two.state.log_history, strict=True):
        assert set(x) == set(y)
        timed = {name for name in x if "time" in name or "runtime" in name or "per_second" in name}
        for name in set(x) - timed:
            assert y[name] == pytest.approx(x[name], rel=1e-3, abs=1e-4, nan_ok=True), name


def test_enable_and_disable():
    importlib = pytest.importorskip("importlib")
    module = importlib.import_module("trl.experimental.sdft.loss_utils")
    before = utils.selective_log_softmax, theirs.GRPOTrainer._compute_loss, utils._use_triton
    with trl.enabled():
        assert module.selective_log_softmax is utils.selective_log_softmax is trl.selective_log_softmax
        assert ChunkedLogProbFunction.apply is trl.head and theirs.GRPOTrainer._compute_loss is trl.compute_loss
    assert before == (utils.selective_log_softmax, theirs.GRPOTrainer._compute_loss, utils._use_triton)
    assert module.selective_log_softmax is before[0] and "apply" not in vars(ChunkedLogProbFunction)
    assert sys.modules["trl.trainer.utils"]._ChunkedLogProbFunction.apply == HEAD
