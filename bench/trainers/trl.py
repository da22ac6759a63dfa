"""TRL's GRPO on a Llama of two layers made from a config, with a vocabulary of 32,000: completions of even tokens."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

PACKAGE, TASK = "trl", "GRPO, Llama of 2 layers, vocabulary 32,000, 8 prompts of 96 tokens, 64 new tokens"
VOCABULARY, PROMPT, COMPLETION = 32_000, 96, 64


def tokenizer(vocabulary: int) -> Any:
    """Bytes, and names for the rest of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"<{i}>" for i in range(len(tokens), vocabulary)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import torch
    import trl
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from bench.harness import OURS, Provider, peak_memory
    from ppo_fast.integrations import trl as ours

    from . import timed

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    arguments = trl.GRPOConfig(
        str(Path.cwd()), per_device_train_batch_size=8, num_generations=8, max_steps=3 if quick else 20, beta=0.0,
        max_completion_length=COMPLETION, learning_rate=1e-3, logging_steps=1, seed=seed, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [chr(ord("a") + i % 26) * PROMPT for i in range(64)]})
    seconds: dict[str, float] = {}
    with ours.enabled() if enabled else nullcontext(), ExitStack() as stack:
        model = LlamaForCausalLM(config)
        trainer = trl.GRPOTrainer(model, even, arguments, train_dataset=prompts, processing_class=tokenizer(VOCABULARY))
        stack.enter_context(timed(trainer, "training_step", seconds, "loss and backward"))
        stack.enter_context(timed(trainer, "_prepare_inputs", seconds, "generation"))
        batches: list[dict[str, Any]] = []
        compute = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, **rest: batches.append(inputs) or compute(model, inputs, **rest)
        start = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - start
        seconds["loss and backward"] -= seconds["generation"]  # theirs generates inside training_step

        def step() -> dict[str, Any]:
            compute(trainer.model, batches[-1]).backward()
            return {}

        trainer.model.zero_grad()
        peak = peak_memory(Provider(OURS, step))
    curve = [(row["step"], row["reward"]) for row in trainer.state.log_history if "reward" in row]
    return {"seconds": total, "parts": seconds, "peak_bytes": peak, "curve": curve}
