"""A stand-in for the Hugging Face hub in TRL's tests, both without and with us: the models that most of them download, made
from configs with random weights, a tokenizer of bytes and a data set of a few prompts. What is not here is not found.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import warnings
from pathlib import Path

_cache = tempfile.TemporaryDirectory(prefix="hub-")
os.environ["HF_HUB_CACHE"] = _cache.name
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from bench.trainers.trl import tokenizer  # noqa: E402

VOCABULARY = 300
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
MODELS = {
    "Qwen2ForCausalLM-2.5": {}, "Qwen2ForSequenceClassification-2.5": {}, "Qwen3ForCausalLM": {"head_dim": 8},
    "Qwen3ForSequenceClassification": {"head_dim": 8}, "LlamaForCausalLM-3.2": {"tie_word_embeddings": True},
    "MistralForCausalLM-0.2": {}, "Cohere2ForCausalLM": {"logit_scale": 0.125}, "Qwen3MoeForCausalLM": EXPERTS,
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
PROMPTS = ["The quick brown fox", "A stitch in time", "Rain falls", "Once more", "Two and two", "North of here"] * 3


def make(name: str, options: dict) -> None:
    folder = Path(_cache.name) / f"models--trl-internal-testing--tiny-{name}"
    snapshot = folder / "snapshots" / ("0" * 40)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    kind = name.partition("-")[0]
    model = getattr(transformers, kind)
    extra = {"num_labels": 1} if kind.endswith("Classification") else {}
    torch.manual_seed(0)
    model(model.config_class(**SMALL, **options, **extra)).save_pretrained(snapshot)
    words = tokenizer(VOCABULARY)
    words.chat_template = TEMPLATE
    words.save_pretrained(snapshot)


for _name, _options in MODELS.items():
    make(_name, _options)


def load_dataset(name, config=None, *, split=None, streaming=False):
    if name != "trl-internal-testing/zen" or config not in ("standard_prompt_only", "conversational_prompt_only"):
        raise ConnectionError(f"{name}, {config}: not in {__name__}.py")
    chat = config.startswith("conversational")
    rows = [[{"role": "user", "content": x}] if chat else x for x in PROMPTS]
    made = datasets.DatasetDict(
        {s: datasets.Dataset.from_dict({"prompt": rows[:n]}) for s, n in (("train", 17), ("test", 2))}
    )
    if streaming:
        made = datasets.IterableDatasetDict({s: x.to_iterable_dataset() for s, x in made.items()})
    return made if split is None else made[split]


datasets.load_dataset = load_dataset

#: What the tests, which are older, import and this version has no more; tests that use it fail or are skipped.
GONE = {
    "trl.trainer.utils": {"patch_chunked_lm_head": None},
    "trl.import_utils": {"is_joblib_available": lambda: False},
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _module, _names in GONE.items():
        for _gone, _value in _names.items():
            _made = importlib.import_module(_module)
            if not hasattr(_made, _gone):
                setattr(_made, _gone, _value)
