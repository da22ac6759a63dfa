"""Runs in their folders: exact resume, mistakes as one line that names the sample, and what a run leaves."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers")

import language_worlds
import torch
from language_worlds import GPT2, HERE, LLAMA, RECORDS, SMALL, config_in, model_file, prompt_file, quiet, trainer_in
from test_cli import assert_one_line, run

from ppo_fast import cli
from ppo_fast.trainer import checkpoint
from ppo_fast.trainer.errors import UserError
from ppo_fast.trainer.language import LanguageConfig, train
from ppo_fast.trainer.language import prompts as prompts_module

KIND = "ppo_fast.language"

VARIANTS = [
    {"algorithm": "ppo", "kl_target": 0.01, "kl_horizon": 100.0, "epochs": 2, "anneal_lr": True},
    {"algorithm": "grpo", "kl_in": "loss", "kl_estimator": "k3", "micro_batch": 3, "top_p": 0.9},
    {"algorithm": "remax", "lora_rank": 2, "dtype": "bfloat16", "gradient_checkpointing": True},
    {"algorithm": "rloo", "kl_coef": 0.0, "reward": f"{HERE}:moody"},
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def assert_equal(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds", "run_dir", "resume"}:
            assert_equal(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), path


def progress(folder):
    with open(folder / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: c["algorithm"])
def test_state_goes_into_a_fresh_trainer_at_every_iteration(tmp_path, changes):
    straight = trainer_in(tmp_path, iterations=5, **changes)
    states, rows = [], []
    for i in range(4):
        samples, row = straight.iterate()
        rows.append((samples, {k: v for k, v in row.items() if k != "seconds"}))
        checkpoint.save(tmp_path / f"{i}.pt", straight.state_dict(), KIND)
        states.append(straight.state_dict())
    for at in (0, 2):
        resumed = trainer_in(tmp_path, iterations=5, **changes)
        resumed.iterate()  # a used one: everything must be put back
        assert resumed.load_state_dict(checkpoint.load(tmp_path / f"{at}.pt", KIND))
        for i in range(at + 1, 4):
            samples, row = resumed.iterate()
            del row["seconds"]
            assert_equal((samples, row)[0], rows[i][0])
            assert_equal(row, rows[i][1])
            assert_equal(resumed.state_dict(), states[i])


@pytest.mark.parametrize("source", ["built", "folder"])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(tmp_path, source):
    """Stopped by a reward function that fails, which is as sudden as any stop."""
    changes: dict = {"iterations": 5, "eval_prompts": prompt_file(tmp_path), "eval_every": 2, "checkpoint_seconds": 0.0}
    if source == "folder":
        trainer = trainer_in(tmp_path)
        trainer.policy.causal.save_pretrained(tmp_path / "base")
        trainer.tokenizer.save_pretrained(tmp_path / "base")
        changes["model"] = str(tmp_path / "base")
    else:
        changes.update(warm_start_accuracy=1.0, warm_start_steps=3)
    reward = language_worlds.faulty
    type(reward).how, type(reward).after, type(reward).calls = "nan", 10**9, 0
    changes["reward"] = f"{HERE}:faulty"
    straight = train(config_in(tmp_path, **{**changes, "run_dir": str(tmp_path / "straight")}), console=quiet())
    assert straight.finished
    type(reward).after, type(reward).calls = 4, 0  # evaluation, iterations 1 and 2, evaluation, then it fails
    config = config_in(tmp_path, **changes)
    with pytest.raises(UserError, match="expected finite rewards"):
        train(config, console=quiet())
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt", KIND)["now"]["iteration"] == 2
    type(reward).after = 10**9
    resumed = train(dataclasses.replace(config, resume=True), console=quiet())
    a, b = (checkpoint.load(tmp_path / name / "checkpoint.pt", KIND) for name in ("straight", "run"))
    del a["logs"], b["logs"]
    assert_equal(a, b)
    assert (resumed.iteration, resumed.last_eval) == (straight.iteration, straight.last_eval)
    assert progress(tmp_path / "straight") == progress(tmp_path / "run")
    assert len(progress(tmp_path / "run")) == 5
    for name in ("rollouts.jsonl", "model/model.safetensors"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_ctrl_c_leaves_a_checkpoint_and_exit_code_130(tmp_path):
    args = [
        sys.executable,
        "-m",
        "ppo_fast.cli",
        "train",
        "language",
        "--run-dir",
        "run",
        "--model",
        model_file(tmp_path),
    ]
    args += [
        "--prompts",
        prompt_file(tmp_path),
        "--reward",
        f"{HERE}:vowels",
        "--warm-start-accuracy",
        "0",
        "--no-plot",
    ]
    args += [
        "--no-tensorboard",
        "--iterations",
        "100000",
        "--num-responses",
        "4",
        "--group-size",
        "2",
        "--threads",
        "1",
    ]
    import os

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        args, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "progress.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130, out
    assert "ppo-fast train language --run-dir run --resume" in out
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt", KIND)["now"]["iteration"] >= 1


# --- mistakes ---------------------------------------------------------------------------------------------------------


def flags(tmp_path, *more):
    args = [
        "train",
        "language",
        "--run-dir",
        "run",
        "--model",
        model_file(tmp_path),
        "--prompts",
        prompt_file(tmp_path),
    ]
    args += ["--reward", f"{HERE}:vowels", "--warm-start-accuracy", "0", "--num-responses", "8", "--group-size", "2"]
    return [
        *args,
        "--iterations",
        "2",
        "--threads",
        "1",
        "--no-plot",
        "--no-tensorboard",
        "--checkpoint-seconds",
        "0",
        *more,
    ]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--temperature", "0"], ["--temperature", "> 0", "got 0"]),
        (["--temperature", "-1"], ["--temperature", "-1"]),
        (["--top-p", "0"], ["--top-p", "> 0"]),
        (["--top-p", "1.5"], ["--top-p", "<= 1"]),
        (["--group-size", "-1"], ["--group-size", ">= 0"]),
        (["--group-size", "3"], ["--num-responses", "multiple of the 3", "got 8"]),
        (["--num-minibatches", "9"], ["--num-minibatches", "at most", "8"]),
        (["--algorithm", "dpo"], ["--algorithm", "dpo", "grpo"]),
        (["--kl-target", "1", "--kl-coef", "0"], ["--kl-target", "--kl-coef"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--model", "nowhere"], ["--model", "nowhere", "config.json"]),
        (["--model", "empty"], ["--model", "empty", "config.json"]),
        (["--model", "broken"], ["--model", "broken"]),
        (["--model", "broken.json"], ["--model", "broken.json", "model_type"]),
        (["--model", "strange.json"], ["--model", "strange.json"]),
        (["--prompts", "missing.jsonl"], ["--prompts", "missing.jsonl"]),
        (["--prompts", "empty.jsonl"], ["--prompts", "empty.jsonl", "empty"]),
        (["--prompts", "words.jsonl"], ["--prompts", "words.jsonl", "line 2", "JSON"]),
        (["--prompts", "keys.jsonl"], ["--prompts", "keys.jsonl", "line 3", '"prompt"']),
        (["--prompts", "taken.jsonl"], ["--prompts", "line 1", "rename"]),
        (["--prompts", "long.jsonl"], ["long.jsonl", "prompt 1", "1 to 1024 tokens", "2000"]),
        (["--prompts", "blank.jsonl"], ["blank.jsonl", "prompt 0", "got 0"]),
        (["--eval-prompts", "missing.jsonl"], ["--eval-prompts", "missing.jsonl"]),
        (["--reward", "vowels"], ["--reward", "module:function"]),
        (["--reward", "no_such_module:f"], ["--reward", "no_such_module"]),
        (["--reward", f"{HERE}:no_such_function"], ["--reward", "no_such_function"]),
        (["--reward", f"{HERE}:not_a_function"], ["--reward", "not_a_function", "function"]),
        (["--reward", "gone.py:f"], ["--reward", "gone.py"]),
        (["--config", "missing.json"], ["missing.json"]),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(capsys, tmp_path, more, parts):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text(json.dumps(GPT2))  # no weights, no tokenizer
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "strange.json").write_text('{"model_type": "perceptron"}')
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "words.jsonl").write_text('{"prompt": "a"}\nhello\n')
    (tmp_path / "keys.jsonl").write_text('{"prompt": "a"}\n\n{"question": "a"}\n')
    (tmp_path / "taken.jsonl").write_text('{"prompt": "a", "completions": 1}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "a" * 2000}) + "\n")
    (tmp_path / "blank.jsonl").write_text('{"prompt": ""}\n')
    assert_one_line(run(capsys, *flags(tmp_path, *more)), *parts)
    assert not (tmp_path / "run").exists()


SICK = [
    ("raise", ["raised ZeroDivisionError: the judge is ill at sample 6 (prompt"]),
    ("nan", ["finite rewards", "got nan for sample 7"]),
    ("few", ["expected 8 rewards", "got 7"]),
    ("many", ["expected 8 rewards", "got 9"]),
    ("none", ["to return numbers"]),
    ("text", ["to return numbers"]),
]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(("how", "parts"), SICK, ids=lambda x: x if isinstance(x, str) else "")
def test_a_reward_function_that_fails_is_named_with_its_sample_and_the_run_goes_on_later(capsys, tmp_path, how, parts):
    reward = language_worlds.faulty
    type(reward).how, type(reward).after, type(reward).calls = how, 1, 0
    args = flags(tmp_path, "--reward", f"{HERE}:faulty")
    assert_one_line(run(capsys, *args), "--reward", *parts, "--resume")
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt", KIND)["now"]["iteration"] == 1
    type(reward).after = 10**9
    code, out, err = run(capsys, "train", "language", "--run-dir", "run", "--resume")
    assert (code, err) == (0, "")
    assert "resuming run at iteration 1" in out


@pytest.mark.usefixtures("elsewhere")
def test_a_batch_without_a_token_to_learn_from_is_named(capsys, tmp_path):
    args = flags(tmp_path, "--mask-truncated", "--max-new-tokens", "1", "--seed", "3")
    assert_one_line(run(capsys, *args), "--mask-truncated", "8 that were cut", "--max-new-tokens 1")
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt", KIND)["now"]["iteration"] == 0


def test_minibatches_without_a_token_take_no_step(tmp_path):
    trainer = trainer_in(tmp_path, num_minibatches=6, epochs=1)
    index = [0, 1, 2, 3, 4, 5] * 2
    responses = trainer.respond(trainer.task.train, index)
    experience = trainer.learner.experience(responses, torch.rand(12), None)
    experience.mask[1:] = False
    steps = []
    trainer.learner.optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    stats = trainer.learner.update(experience, 1e-3)
    assert len(steps) == 1
    assert all(math.isfinite(x) for x in stats.values())


@pytest.mark.usefixtures("elsewhere")
def test_divergence_is_named(capsys, tmp_path):
    args = flags(tmp_path, "--algorithm", "rloo", "--reward", f"{HERE}:huge")
    assert_one_line(run(capsys, *args), "training diverged", "--learning-rate")


@pytest.mark.usefixtures("elsewhere")
def test_answers_are_asked_for_by_a_supervised_start(capsys, tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "b"}\n')
    args = flags(tmp_path, "--prompts", "bare.jsonl", "--warm-start-accuracy", "0.5")
    assert_one_line(run(capsys, *args), '"answer"', "prompt 1", "bare.jsonl", "--warm-start-accuracy 0")


@pytest.mark.usefixtures("elsewhere")
def test_a_checkpoint_of_the_other_trainer_or_another_configuration_is_refused(capsys, tmp_path):
    assert run(capsys, *flags(tmp_path))[0] == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    args = ["train", "language", "--run-dir", "run", "--resume"]
    assert_one_line(run(capsys, *args, "--temperature", "0.5"), "--temperature: 1.0 -> 0.5")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert_one_line(run(capsys, "train", "control", "--run-dir", "run", "--resume"), "ppo_fast.control")
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt", KIND)
    for broken, part in (({**state, "sampler": None}, "does not fit"), ({**state, "parameters": {}}, "another model")):
        checkpoint.save(tmp_path / "run" / "checkpoint.pt", broken, KIND)
        assert_one_line(run(capsys, *args), "checkpoint.pt", part)
    import shutil

    shutil.rmtree(tmp_path / "run" / "start")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(before)
    assert_one_line(run(capsys, *args), "start", "config.json")


# --- what a run leaves, and help ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("elsewhere")
def test_a_run_leaves_what_it_promises(capsys, tmp_path):
    args = [
        a
        for a in flags(tmp_path, "--eval-prompts", prompt_file(tmp_path))
        if a not in ("--no-plot", "--no-tensorboard")
    ]
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "")
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "checkpoint.pt", "config.json", "curve.png", "progress.csv", "rollouts.jsonl", "start", "model", "tensorboard", ".lock"
    }  # fmt: skip
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in out
    for word in ("iteration 2/2", "held out", "sampling", "update", "curve.png"):
        assert word in out
    samples = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert [s["iteration"] for s in samples] == [1] * 8 + [2] * 8
    assert {s["prompt"] for s in samples} <= {r["prompt"] for r in RECORDS}
    for s in samples:
        assert s["reward"] == pytest.approx(sum(c.islower() for c in s["completion"]) / 5)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"language/reward", "language/eval_reward", "language/entropy"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("language/reward")] == [1, 2]
    assert run(capsys, *args)[1].startswith("run is taken")


def test_help_explains_every_flag_in_groups(capsys):
    code, out, _ = run(capsys, "train", "language", "--help")
    assert code == 0
    text = "".join(out.split())
    for field in dataclasses.fields(LanguageConfig):
        assert "--" + field.name.replace("_", "-") in text
    for group in ("model", "task", "sampling", "algorithm", "kl", "update", "output"):
        assert f"{group} options" in out
    assert "train language" in run(capsys, "--help")[1]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_a_missing_package_is_named(capsys, monkeypatch, tmp_path, package):
    for name in [n for n in sys.modules if n.startswith("ppo_fast.trainer.language.") and not n.endswith("config")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert_one_line(run(capsys, *flags(tmp_path)), f"{package} is not installed", "ppo_fast[language]")


def test_lora_without_peft_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"peft is not installed: .*ppo_fast\[lora\]"):
        trainer_in(tmp_path, lora_rank=2)


def test_heads_that_do_more_than_a_product_are_refused(tmp_path):
    gemma = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.01}
    with pytest.raises(UserError, match="Gemma2ForCausalLM, which transforms them further"):
        trainer_in(tmp_path, gemma)


def test_additions_are_ten_thousand_and_none_is_in_both_parts():
    train_records, held_out = prompts_module.additions()
    prompts = [r["prompt"] for r in train_records + held_out]
    assert len(prompts) == len(set(prompts)) == 10_000
    assert len(held_out) == 512
    for record in held_out:
        a, b = record["prompt"].rstrip("=").split("+")
        assert int(a) + int(b) == int(record["answer"])


def test_the_shipped_task_learns_a_little(tmp_path):
    """The default model and task, for a few seconds; docs/language.md has the whole curve."""
    config = LanguageConfig(
        run_dir=str(tmp_path / "run"), iterations=1, num_responses=8, warm_start_steps=60, threads=1,
        **{k: v for k, v in SMALL.items() if k in ("tensorboard", "plot", "progress")},
    )  # fmt: skip
    result = train(config, console=quiet())
    assert result.first_eval == result.first_eval
    samples = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert (
        sum(s["completion"].isdigit() for s in samples) > len(samples) / 2
    )  # it has learned what an answer looks like


def test_cli_defaults_are_those_of_the_class(capsys, monkeypatch):
    seen = []
    from ppo_fast.trainer.language import run as run_module

    monkeypatch.setattr(run_module, "train", lambda config: seen.append(config) or type("R", (), {"finished": True}))
    assert cli.main(["train", "language"]) == 0
    assert cli.main(["train", "language", "--algorithm", "grpo", "--seed", "5", "--dual-clip", "3"]) == 0
    assert seen == [LanguageConfig(), LanguageConfig(algorithm="grpo", seed=5, dual_clip=3.0)]
