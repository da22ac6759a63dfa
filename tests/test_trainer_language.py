"""Sampling and training see the same model, gradients do not depend on how a batch is split, and it learns."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from language_worlds import GPT2, LLAMA, RECORDS, config_in, quiet, trainer_in

from ppo_fast import LossConfig, reference
from ppo_fast.reductions import token_weights
from ppo_fast.trainer.language import LanguageConfig, train
from ppo_fast.trainer.language.config import GROUPS
from ppo_fast.trainer.language.learner import crop
from ppo_fast.trainer.language.model import build, byte_tokenizer, load, save
from ppo_fast.trainer.language.sampling import joined, sample, truncate

MODELS = [LLAMA, GPT2]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # models this small; conftest puts it back


def rollout(trainer, index=(0, 1, 2, 3, 4, 5, 6, 7), greedy=False):
    return trainer.respond(trainer.task.train, list(index), greedy)


# --- model and tokenizer ----------------------------------------------------------------------------------------------


def test_byte_tokenizer_goes_through_a_folder_and_loses_nothing(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(again) == 258
    for text in ("12+34=", " häß \n\t€", "", "<eos", "\x00ÿ"):
        ids = again(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert again.decode(ids, clean_up_tokenization_spaces=False) == text
    assert again.eos_token_id != again.pad_token_id


@pytest.mark.parametrize("fields", MODELS, ids=lambda f: f["model_type"])
def test_models_go_through_a_folder(tmp_path, fields):
    trainer = trainer_in(tmp_path, fields)
    for _ in range(2):  # the second time over the first
        save(trainer.policy.causal, trainer.tokenizer, tmp_path / "saved")
    causal, tokenizer = load(tmp_path / "saved")
    tokens = torch.randint(258, (2, 9))
    assert torch.equal(causal(tokens).logits, trainer.policy.causal(tokens).logits)
    assert tokenizer.eos_token_id == trainer.tokenizer.eos_token_id
    assert [p.name for p in tmp_path.glob(".*.tmp")] == []


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", MODELS, ids=lambda f: f["model_type"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.7, "micro_batch": 3},
        {"top_k": 20, "sampling_batch": 3},
        {"top_p": 0.5, "temperature": 1.5},
    ],
)
def test_recorded_log_probs_are_those_of_training(tmp_path, fields, changes):
    """Cached, left-padded, batched sampling against one forward over the whole sequence; to float64."""
    trainer = trainer_in(tmp_path, fields, double=True, **changes)
    responses = rollout(trainer)
    assert bool(responses.mask[:, 0].all())
    log_prob, entropy, values = trainer.learner.log_probs(responses, values=True)
    assert log_prob.dtype == torch.float64
    torch.testing.assert_close(responses.log_prob, log_prob, rtol=1e-9, atol=1e-9)
    for i in range(len(RECORDS)):  # and against each sequence alone, without padding, from the logits
        ids = responses.tokens[i][responses.attention[i]]
        n = int(responses.mask[i].sum())
        assert ids[:-n].tolist() == trainer.task.train.tokens[i]
        out = trainer.policy.causal(ids[None], output_hidden_states=True)
        z = out.logits[0, -n - 1 : -1] / trainer.config.temperature
        p = z.log_softmax(-1)
        alone = p.gather(1, ids[-n:, None]).squeeze(1)
        torch.testing.assert_close(log_prob[i, :n], alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(entropy[i, :n], -(p.exp() * p).sum(-1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(values[i, :n], trainer.policy.values(out.hidden_states[-1][0, -n - 1 : -1]))
        assert not bool(log_prob[i, n:].any())


def test_log_probs_of_float32_agree_too(tmp_path):
    trainer = trainer_in(tmp_path)
    responses = rollout(trainer)
    torch.testing.assert_close(responses.log_prob, trainer.learner.log_probs(responses)[0], rtol=1e-5, atol=1e-5)


def test_greedy_is_argmax_and_an_end_token_ends(tmp_path):
    trainer = trainer_in(tmp_path)
    responses = rollout(trainer, greedy=True)
    for i in range(len(RECORDS)):
        ids = torch.tensor([trainer.task.train.tokens[i]])
        for t in range(int(responses.mask[i].sum())):
            token = trainer.policy.causal(ids).logits[0, -1].argmax()
            assert token == responses.targets[i, t]
            ids = torch.cat([ids, token.view(1, 1)], 1)
    # the token that the first response gives second ends it there, and only cut ones are unfinished
    ends = responses.targets[0, 1:2]
    again = sample(trainer.policy, trainer.task.train.tokens, max_new_tokens=5, pad=256, ends=ends)
    hit = again.targets == ends
    lengths = torch.where(hit.any(1), hit.int().argmax(1) + 1, 5)
    assert torch.equal(again.mask.sum(1), lengths)
    assert torch.equal(again.finished, hit.any(1))
    assert 0 < int(lengths[0]) <= 2
    assert bool((again.tokens[:, again.prompt_length :][~again.mask] == 256).all())


def test_truncation_keeps_what_it_should():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 12, generator=generator)
    assert torch.equal(truncate(z, 0, 1.0), z)
    assert bool(((truncate(z, 3, 1.0) > -torch.inf).sum(-1) == 3).all())
    for row, kept in zip(z, truncate(z, 0, 0.6), strict=True):
        p = row.softmax(-1)
        order = p.argsort(descending=True)
        count = next(k for k in range(1, 13) if float(p[order[:k]].sum()) >= 0.6)
        assert sorted((kept > -torch.inf).nonzero().flatten().tolist()) == sorted(order[:count].tolist())
    assert bool(((truncate(z, 0, 1e-9) > -torch.inf).sum(-1) == 1).all())


def test_samples_follow_the_distribution(tmp_path):
    trainer = trainer_in(tmp_path, temperature=0.5, top_k=4, max_new_tokens=1, sampling_batch=8000)
    with torch.no_grad():
        trainer.policy.head.weight *= 20  # logits far enough apart for the temperature to show
    logits = trainer.policy.causal(torch.tensor([trainer.task.train.tokens[1]])).logits[0, -1].detach() / 0.5
    p = truncate(logits[None], 4, 1.0).softmax(-1)[0]
    drawn = rollout(trainer, [1] * 8000).targets[:, 0].bincount(minlength=258) / 8000
    assert float((drawn - p).abs().max()) < 4 * 0.5 / 8000**0.5
    assert bool((drawn[p == 0] == 0).all())


def test_batches_join_at_their_longest(tmp_path):
    trainer = trainer_in(tmp_path)
    parts = [rollout(trainer, [0], greedy=True), rollout(trainer, [5, 3], greedy=True)]
    whole, ours = rollout(trainer, [0, 5, 3], greedy=True), joined(parts, trainer.tokenizer.pad_token_id)
    assert torch.equal(ours.tokens, whole.tokens)
    assert torch.equal(ours.attention, whole.attention)
    torch.testing.assert_close(ours.log_prob, whole.log_prob)


# --- the loss ---------------------------------------------------------------------------------------------------------

VARIANTS = [
    {"algorithm": "ppo", "reduction": "token-mean", "value_clip": 0.1, "entropy_coef": 0.01},
    {"algorithm": "ppo", "reduction": "seq-mean-token-mean", "length_adaptive_alpha": 0.4},
    {"algorithm": "grpo", "reduction": "token-sum-norm", "kl_in": "loss", "kl_estimator": "k3"},
    {"algorithm": "rloo", "reduction": "seq-mean-token-sum", "mask_truncated": True, "dual_clip": 3.0},
    {"algorithm": "grpo", "reduction": "seq-mean-token-mean", "policy": "gspo", "mask_truncated": True},
    {"algorithm": "grpo", "reduction": "token-mean", "policy": "cispo"},
]


def experience_of(trainer):
    generator = torch.Generator().manual_seed(1)
    index = [i for i in range(8) for _ in range(2)]
    responses = rollout(trainer, index)
    # of different lengths, whatever the model says
    lengths = torch.randint(1, responses.mask.shape[1] + 1, (16,), generator=generator)
    responses.attention[:, responses.prompt_length :] = torch.arange(responses.mask.shape[1]) < lengths[:, None]
    responses.finished[:] = torch.arange(16) % 3 > 0
    scores = torch.rand(16, generator=generator, dtype=torch.float64)
    experience = trainer.learner.experience(responses, scores, None)
    # as if the policy had moved: ratios on both sides of the clip
    experience.old_log_prob += 0.3 * torch.randn(experience.mask.shape, generator=generator, dtype=torch.float64)
    return experience


def gradients(trainer, experience, index):
    for p in trainer.learner.parameters:
        p.grad = None
    stats = trainer.learner.backward(experience, index)
    return stats, [p.grad.clone() for p in trainer.learner.parameters]


@pytest.mark.parametrize(
    "changes", VARIANTS, ids=lambda c: " ".join(str(c.get(k, "")) for k in ("algorithm", "reduction", "policy"))
)
def test_gradients_do_not_depend_on_the_split_and_are_those_of_the_formula(tmp_path, changes):
    trainer = trainer_in(tmp_path, double=True, **changes)
    experience = experience_of(trainer)
    index = torch.randperm(16, generator=torch.Generator().manual_seed(2))[:13]
    found = []
    for micro in (0, 1, 2, 5, 13, 16):
        object.__setattr__(trainer.config, "micro_batch", micro)
        found.append(gradients(trainer, experience, index))
    for stats, grads in found[1:]:
        torch.testing.assert_close(stats, found[0][0], rtol=1e-5, atol=1e-6)
        for a, b in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)

    # the formula: all logits of the padded minibatch at once
    config, learner, policy, responses = trainer.config, trainer.learner, trainer.policy, experience.responses
    hidden = policy.hidden(responses.tokens[index], responses.attention[index], responses.prompt_length)
    log_prob, entropy = reference.categorical_log_prob(
        policy.head(hidden), responses.targets[index], temperature=config.temperature
    )
    mask = experience.mask[index]
    reduction, denominator = config.reduction, None
    if reduction == "token-sum-norm":
        reduction, denominator = "sum", 13.0 * config.max_new_tokens
    weights = token_weights(mask.double(), mask, reduction, None, denominator, None)
    out = reference.ppo_loss(
        log_prob, experience.old_log_prob[index], experience.advantages[index], learner.loss_config, mask=mask,
        values=None if policy.value_head is None else policy.values(hidden), weights=weights, entropy=entropy,
        old_values=None if experience.values is None else experience.values[index],
        returns=None if experience.returns is None else experience.returns[index],
        ref_log_prob=None if experience.ref_log_prob is None else experience.ref_log_prob[index],
    )  # fmt: skip
    expected = torch.autograd.grad(out.loss, learner.parameters)
    for a, b in zip(found[0][1], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(float(found[0][0][0]), float(out.stats.policy_loss), rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    plain = trainer_in(tmp_path, double=True)
    experience = experience_of(plain)
    checkpointed = trainer_in(tmp_path, double=True, gradient_checkpointing=True)
    checkpointed.policy.load_state_dict(plain.policy.state_dict())
    assert checkpointed.policy.checkpoints
    calls = []
    for trainer in (plain, checkpointed):
        layer = trainer.policy.causal.base_model.layers[0].mlp
        count: list[int] = []
        layer.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        index = torch.arange(16)
        calls.append((gradients(trainer, experience, index)[1], len(count)))
    assert calls[1][1] == 2 * calls[0][1]  # computed again in the backward
    for a, b in zip(calls[0][0], calls[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_rewards_advantages_and_kl_are_put_together(tmp_path):
    trainer = trainer_in(tmp_path, double=True, algorithm="ppo", whiten_advantages=False, gamma=0.9, gae_lambda=0.8)
    with torch.no_grad():
        for p in trainer.policy.causal.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=p.dtype)
    index = [i for i in range(8) for _ in range(2)]
    responses = rollout(trainer, index)
    scores = torch.rand(16, dtype=torch.float64)
    e = trainer.learner.experience(responses, scores, None)
    assert e.kl is not None and e.ref_log_prob is not None and e.values is not None and e.returns is not None
    reference_model = build(trainer.config.model)[0]
    reference_model.load_state_dict(trainer.policy.references[0].causal.state_dict())
    for i in range(16):
        n = int(e.mask[i].sum())
        ids = responses.tokens[i][responses.attention[i]]
        ref = (
            reference_model.double()(ids[None])
            .logits[0, -n - 1 : -1]
            .log_softmax(-1)
            .gather(1, ids[-n:, None])
            .squeeze(1)
        )
        torch.testing.assert_close(e.ref_log_prob[i, :n], ref, rtol=1e-9, atol=1e-9)
        kl = e.old_log_prob[i, :n] - ref
        torch.testing.assert_close(e.kl[i], kl.sum(), rtol=1e-9, atol=1e-9)
        rewards = -0.1 * kl
        rewards[-1] += scores[i]
        running = torch.zeros((), dtype=torch.float64)
        for t in reversed(range(n)):
            following = e.values[i, t + 1] if t + 1 < n else 0.0
            running = rewards[t] + 0.9 * following - e.values[i, t] + 0.9 * 0.8 * running
            torch.testing.assert_close(e.advantages[i, t], running, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(e.returns[i, t], running + e.values[i, t], rtol=1e-9, atol=1e-9)
    assert float(e.kl.abs().max()) > 0.01  # the reference has stayed behind


def test_crop_leaves_out_columns_of_padding_only(tmp_path):
    trainer = trainer_in(tmp_path)
    responses = rollout(trainer)
    tokens, attention, start, length = crop(responses, torch.tensor([0, 1]))
    assert start == 2
    assert tokens.shape == attention.shape == (2, start + length)
    assert bool(attention.any(0).all())
    assert torch.equal(tokens[1, :2], torch.tensor(trainer.task.train.tokens[1]))
    assert length == int(responses.mask[:2].sum(1).max())


# --- learning ---------------------------------------------------------------------------------------------------------

ALGORITHMS = ("ppo", "grpo", "dr_grpo", "rloo", "leave_one_out", "opo", "reinforce_plus_plus",
              "reinforce_plus_plus_baseline", "remax")  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_to_write_letters(tmp_path, algorithm):
    config = config_in(
        tmp_path,
        algorithm=algorithm,
        num_responses=64,
        group_size=4,
        iterations=14,
        learning_rate=2e-2,
        kl_coef=0.0,
        anneal_lr=False,
        warmup_iterations=0,
        logged_responses=64,
    )
    result = train(config, console=quiet())
    rows = [json.loads(line) for line in (result.run_dir / "rollouts.jsonl").read_text().splitlines()]
    first, last = ([r["reward"] for r in rows if r["iteration"] in when] for when in ((1, 2), (13, 14)))
    assert sum(last) / len(last) > sum(first) / len(first) + 0.15


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True, "micro_batch": 3}])
def test_variants_run(tmp_path, changes):
    result = train(config_in(tmp_path, iterations=2, **changes), console=quiet())
    assert result.iteration == 2
    load(result.run_dir / "model")


def test_lora_trains_adapters_only_and_the_reference_is_the_model_without(tmp_path):
    pytest.importorskip("peft")
    trainer = trainer_in(tmp_path, algorithm="grpo", lora_rank=2, learning_rate=0.05)
    assert all("lora" in name for name in trainer.policy.learned())
    assert trainer.policy.references == []
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    tokens = torch.randint(258, (2, 9))
    with torch.no_grad():
        start = trainer.policy.causal(tokens).logits
    for _ in range(2):
        trainer.iterate()
    with torch.no_grad():
        moved = trainer.policy.causal(tokens).logits
        with trainer.policy.as_reference():
            assert torch.equal(trainer.policy.causal(tokens).logits, start)
        assert torch.equal(trainer.policy.causal(tokens).logits, moved)
    assert not torch.equal(moved, start)
    for name, p in trainer.policy.named_parameters():
        assert torch.equal(p, before[name]) != ("lora" in name), name
    train(config_in(tmp_path, algorithm="grpo", lora_rank=2), console=quiet())
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()


def test_entropy_and_kl_controller(tmp_path):
    trainer = trainer_in(tmp_path, kl_target=1e-6, kl_horizon=100.0, kl_coef=0.5)
    coefs = [trainer.iterate()[1]["kl_coef"] for _ in range(4)]
    assert coefs[0] == 0.5
    assert coefs[3] > coefs[2] > coefs[1]  # far above the target after the first update: up by 20 %·12/100
    assert coefs[3] / coefs[2] == pytest.approx(1.024)


def test_the_configuration_is_the_groups_of_its_help():
    grouped = [name for group in GROUPS for name in group.__dataclass_fields__]
    assert sorted(grouped) == sorted(field.name for field in dataclasses.fields(LanguageConfig))
    assert LossConfig(clip_low=0.2).clip_high == LanguageConfig().clip_high
