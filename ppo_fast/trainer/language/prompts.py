"""Prompts with their columns: from JSON lines, or the additions that ship as a first task."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import UserError, one_line

Record = dict[str, Any]


@dataclass
class Prompts:
    """Prompts as text, columns and tokens. `take` makes the batch of some of them."""

    records: list[Record]
    tokens: list[list[int]]

    def __len__(self) -> int:
        return len(self.records)

    def take(self, index: list[int]) -> tuple[list[str], dict[str, list]]:
        """Texts, and the other columns; None where a record lacks one."""
        records = [self.records[i] for i in index]
        names = dict.fromkeys(name for record in self.records for name in record if name != "prompt")
        return [r["prompt"] for r in records], {name: [r.get(name) for r in records] for name in names}


def additions(held_out: int = 512) -> tuple[list[Record], list[Record]]:
    """All 10,000 sums of two numbers below 100, "a+b=" and the answer: those to train on, and those that are held out."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(pairs)  # the same split for every seed of a run
    records = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs]
    return records[held_out:], records[:held_out]


def read(path: str, flag: str) -> list[Record]:
    """The objects of a file of JSON lines."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag}: expected a readable file of JSON lines, got {path} ({one_line(error)})") from None
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{flag}: {path}, line {number}: expected JSON, got {one_line(error)}") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{flag}: {path}, line {number}: expected an object with text "prompt", got {line[:80]}')
        if {"prompts", "completions"} & record.keys():
            raise UserError(
                f'{flag}: {path}, line {number}: "prompts" and "completions" cannot be columns; rename them'
            )
        records.append(record)
    if not records:
        raise UserError(f'{flag}: expected at least one line {{"prompt": "..."}}, got {path}, which is empty')
    return records


def tokenize(records: list[Record], tokenizer: PreTrainedTokenizerBase, longest: int, source: str) -> Prompts:
    tokens: list[list[int]] = tokenizer([r["prompt"] for r in records], return_attention_mask=False)["input_ids"]
    for i, ids in enumerate(tokens):
        if not 0 < len(ids) <= longest:
            raise UserError(
                f"{source}: expected prompts of 1 to {longest} tokens (--max-prompt-tokens), got {len(ids)} in prompt {i}, "
                f"{records[i]['prompt'][:60]!r}"
            )
    return Prompts(records, tokens)
