"""Small models, prompts and reward functions for the tests of the language trainer. No network: nothing is downloaded."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import torch
from rich.console import Console

from ppo_fast.trainer.language import prompts, rewards
from ppo_fast.trainer.language.config import LanguageConfig
from ppo_fast.trainer.language.model import build
from ppo_fast.trainer.language.trainer import Task, Trainer

os.environ["HF_HUB_OFFLINE"] = "1"

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
HERE = "language_worlds"
QUIET = {"tensorboard": False, "plot": False, "progress": False}
SMALL = {
    "reward": f"{HERE}:vowels", "num_responses": 12, "group_size": 2, "max_new_tokens": 5, "num_minibatches": 2, "iterations": 3,
    "warm_start_accuracy": 0.0, "kl_coef": 0.1, "learning_rate": 1e-3, "threads": 1, **QUIET,
}  # fmt: skip
RECORDS = [{"prompt": p, "answer": p[-1]} for p in ("a", "bc", "def", "ghij", "k", "lmnop", "häß", "\n\t")]


def vowels(prompts, completions, **columns):
    """The share of bytes that print as lower-case letters: a random model finds some at once."""
    return [sum(c.islower() for c in text) / 5 for text in completions]


def moody(prompts, completions, **columns):
    """Draws from the global generators, which a resumed run must put back."""
    return [random.random() + float(torch.rand(())) for _ in completions]


def huge(prompts, completions, **columns):
    return [1e38 * (-1) ** i for i in range(len(completions))]


class Faulty:
    """Fails at the n-th call as `how` says."""

    how, after, calls, sick = "raise", 0, 0, ""

    def __call__(self, prompts, completions, **columns):
        Faulty.calls += 1
        good = vowels(prompts, completions)
        if Faulty.calls <= Faulty.after:
            return good
        if Faulty.how == "raise":
            Faulty.sick = Faulty.sick or prompts[-1]
            if Faulty.sick in prompts:
                raise ZeroDivisionError("the judge is ill")
            return good
        return {
            "nan": [*good[:-1], float("nan")], "few": good[:-1], "none": None, "text": ["x"] * len(good),
            "many": [*good, 0.0],
        }[Faulty.how]  # fmt: skip


faulty = Faulty()
not_a_function = 3


def model_file(folder: Path, fields=LLAMA) -> str:
    path = folder / f"{fields['model_type']}.json"
    path.write_text(json.dumps(fields))
    return str(path)


def prompt_file(folder: Path, records=RECORDS) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def config_in(folder: Path, **changes) -> LanguageConfig:
    fields = {
        **SMALL,
        "run_dir": str(folder / "run"),
        "model": model_file(folder),
        "prompts": prompt_file(folder),
        **changes,
    }
    return LanguageConfig(**fields)


def trainer_in(folder: Path, fields=LLAMA, double=False, ranks=None, **changes) -> Trainer:
    """`ranks`: as they are at the start of a run, in the default dtype."""
    config = config_in(folder, **changes)
    torch.manual_seed(config.seed)
    causal, tokenizer = build(model_file(folder, fields))
    if double or torch.get_default_dtype() == torch.float64:
        causal = causal.double()
    task = Task(prompts.tokenize(RECORDS, tokenizer, 64, "test"), None, rewards.find(config.reward))
    if ranks is not None:
        return Trainer(config, causal, tokenizer, task, torch.device("cpu"), ranks)
    trainer = Trainer(config, causal, tokenizer, task, torch.device("cpu"))
    if trainer.policy.value_head is not None:  # not all 0, so that values matter
        torch.nn.init.normal_(trainer.policy.value_head.weight)
        if double:
            trainer.policy.value_head.double()
    return trainer


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)
