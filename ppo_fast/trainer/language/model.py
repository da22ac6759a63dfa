"""Causal language models of transformers: from a folder or a configuration, with value head, adapters and reference."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import UserError, one_line
from .config import LanguageConfig

#: What learns the arithmetic task: 99,000 parameters with the byte tokenizer's 258 tokens.
SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each of the 256 bytes of UTF-8, then <eos> and <pad>: any text, nothing learned. A real tokenizer of
    transformers: `save_pretrained` and `AutoTokenizer.from_pretrained` work."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # one printable character for each byte
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def load(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model (float32) and tokenizer of a local folder; `UserError` where it is none."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--model: expected the folder of a causal language model, got {folder}, which has no config.json"
        )
    try:
        config = _without_dropout(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a foreign or damaged folder may raise anything in there
        raise UserError(
            f"--model: expected the folder of a causal language model, got {folder} ({one_line(error)})"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model: expected a tokenizer with an end-of-sequence token in {folder}, got none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    return model, tokenizer


def build(source: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Random weights, of torch's global generator, by a .json file with a transformers configuration; "": `SMALL`."""
    tokenizer = byte_tokenizer()
    try:
        fields = json.loads(Path(source).read_text(encoding="utf-8")) if source else dict(SMALL)
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
                  "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}  # fmt: skip
        config = transformers.AutoConfig.for_model(**{**fields, **tokens})
        model = transformers.AutoModelForCausalLM.from_config(_without_dropout(config), dtype=torch.float32)
    except Exception as error:
        raise UserError(
            f'--model: expected a transformers configuration with its "model_type", got {source} ({one_line(error)})'
        ) from None
    return model, tokenizer


def _without_dropout(config: Any) -> Any:
    """Dropout would make the ratio of the first step differ from 1."""
    for name, value in vars(config).items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def save(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """A folder that `from_pretrained` reads: whole, or as it was before. With adapters: the adapters alone. `state_dict`: of
    a model whose own is sharded."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=state_dict)
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


class Reference(nn.Module):
    """A frozen model; called as a policy is."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, compute: Callable[..., Any], *args: Any) -> Any:
        return compute(*args)


class Policy(nn.Module):
    """A causal model as training sees it: hidden states of the responses, the head's weight, and values."""

    def __init__(self, causal: Any, config: LanguageConfig, device: torch.device) -> None:
        super().__init__()
        self.causal = causal
        self.device_type, self.in_bfloat16 = device.type, config.dtype == "bfloat16"
        self.head = causal.get_output_embeddings()
        _check_head(causal, self.head)
        if config.lora_rank:
            _add_adapters(causal, config)
        self.adapters = bool(config.lora_rank)
        self.checkpoints = config.gradient_checkpointing
        if self.checkpoints:
            names = (
                "activation_checkpointing_enable",
                "gradient_checkpointing_enable",
            )  # of today and of older transformers
            getattr(causal, next(name for name in names if hasattr(causal, name)))({"use_reentrant": False})
        self.value_head = nn.Linear(self.head.in_features, 1) if config.algorithm == "ppo" else None
        if self.value_head is not None:  # says 0 at first
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.takes_positions = "position_ids" in inspect.signature(causal.base_model.forward).parameters
        self.to(device)
        self.eval()
        frozen = self.needs_reference(config) and not self.adapters
        # in lists: no parameters of ours
        self.references = [Reference(copy.deepcopy(causal).requires_grad_(False))] if frozen else []
        self._gathers: list[Any] = [self]

    @staticmethod
    def needs_reference(config: LanguageConfig) -> bool:
        return config.kl_coef > 0

    def forward(self, compute: Callable[..., Any], *args: Any) -> Any:
        """`compute(*args)`. Where parameters are sharded, the hooks around this gather them, and scatter their gradients."""
        return compute(*args)

    def run(self, compute: Callable[..., Any], *args: Any) -> Any:
        """`compute(*args)`, which uses the head; as the reference where that stands in for the policy."""
        return self._gathers[-1](compute, *args)

    def learned(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; a tied weight once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.in_bfloat16)

    def states(self, tokens: Tensor, attention: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        """The model without its head. `attention` [B, cached + T] marks what is not padding; positions count it."""
        positions = {}
        if self.takes_positions:
            positions["position_ids"] = (attention.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return self.causal.base_model(
            input_ids=tokens, attention_mask=attention.long(), past_key_values=cache, use_cache=use_cache, **positions
        )

    def hidden(self, tokens: Tensor, attention: Tensor, prompt_length: int) -> Tensor:
        """[B, R, H]: the state before each response token."""
        self.train(self.checkpoints and torch.is_grad_enabled())  # transformers checkpoints in train mode only
        return self.states(tokens, attention).last_hidden_state[:, prompt_length - 1 : -1]

    def values(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [...], float32 at least."""
        assert self.value_head is not None
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1)

    @contextlib.contextmanager
    def as_reference(self):
        """Within, the model is the one that training started from."""
        if self.adapters:
            self.causal.disable_adapters()
            try:
                yield
            finally:
                self.causal.enable_adapters()
        else:
            with self.standing_in(self.references[0].causal, self.references[0]):
                yield

    @contextlib.contextmanager
    def standing_in(self, causal: Any, root: Any = None):
        """Within, `causal` is the model; `root`: what gathers its parameters, where they are sharded."""
        mine = self.causal, self.head
        self.causal, self.head = causal, causal.get_output_embeddings()
        if root is not None:
            self._gathers.append(root)
        try:
            yield
        finally:
            self.causal, self.head = mine
            if root is not None:
                self._gathers.pop()


def _add_adapters(causal: Any, config: LanguageConfig) -> None:
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError('--lora-rank: peft is not installed: pip install "ppo_fast[lora]"') from None
    try:
        causal.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear"))
    except ValueError as error:
        raise UserError(f"--lora-rank: peft cannot adapt this model ({one_line(error)})") from None


@torch.no_grad()
def _check_head(causal: Any, head: Any) -> None:
    """The loss computes hidden·Wᵀ + b itself, so a model must do just that (Gemma's softcap, Cohere's scale do not)."""
    expected = "--model: expected logits that are the last hidden states times one matrix"
    if not isinstance(head, nn.Linear):
        raise UserError(f"{expected}, got a head of type {type(head).__name__}")
    causal.eval()
    tokens = torch.arange(2, device=head.weight.device)[None]
    logits = causal(input_ids=tokens, use_cache=False).logits
    ours = head(causal.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    if not torch.allclose(logits, ours, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
        raise UserError(f"{expected}, got {type(causal).__name__}, which transforms them further")
