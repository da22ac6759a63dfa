"""Writes ppo_fast/_C.pyi from the built module: python tests/stubs.py. test_packaging.py holds the file to it.

Types come from the signatures that pybind11 wrote, names from the bindings in csrc/bind (they are positional).
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
STUB = ROOT / "ppo_fast" / "_C.pyi"
TYPES = {
    "object": "Array",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "collections.abc.Sequence": "Sequence[int]",
    "ppo_fast._C.LossParams": "LossParams",
}
HEAD = '''# Written by tests/stubs.py from the built module.
from collections.abc import Sequence
from typing import Any, TypeAlias

#: A tensor of any library that speaks DLPack, on the CPU; None where the op does without.
Array: TypeAlias = Any

{attributes}

class LossParams:
    """A LossConfig as C++ has it."""

    def __init__(self, numbers: tuple, choices: tuple) -> None: ...

'''


def names_in_csrc() -> dict[str, list[str]]:
    """Op -> the names of its arguments: those of the messages where there are any, else those of the bound lambda."""
    found = {}
    for file in sorted((ROOT / "csrc" / "bind").glob("*.h")):
        for chunk in file.read_text().split("m.def(")[1:]:
            head = re.match(r'\s*"(\w+)",\s*\[\]\((.*?)\)\s*\{', chunk, re.S)
            if head is None:
                continue
            arguments = [a.split()[-1].strip("&*") for a in head[2].split(",")]
            messages = {v: name for name, v in re.findall(r'\(op, "([\w ]+)", (\w+)\)', chunk)}
            names = [messages.get(a, a.rstrip("_")).replace(" of ", "_") for a in arguments]
            twice = {name for name in names if names.count(name) > 1}
            found[head[1]] = [a.rstrip("_") if n in twice else n for a, n in zip(arguments, names, strict=True)]
    return found


def stub(module) -> str:
    names, lines = names_in_csrc(), []
    public = sorted(x for x in dir(module) if not x.startswith("_"))
    kinds = {x: type(getattr(module, x)).__name__ for x in public if not callable(getattr(module, x))}
    attributes = [f"{x}: {'tuple[str, ...]' if kind == 'tuple' else kind}" for x, kind in kinds.items()]
    for op in (x for x in public if x not in kinds):
        if op == "LossParams":
            continue
        signature, *rest = getattr(module, op).__doc__.strip().splitlines()
        arguments, result = re.fullmatch(rf"{op}\((.*)\) -> (.*)", signature).groups()
        pairs = [a.split(": ", 1) for a in arguments.split(", ")] if arguments else []
        if pairs and all(re.fullmatch(r"arg\d+", name) for name, _ in pairs):
            if op in names:
                pairs = [[name, kind] for name, (_, kind) in zip(names[op], pairs, strict=True)]
            pairs.append(["/", ""])
        text = [name + (f": {TYPES.get(kind, kind)}" if kind else "") for name, kind in pairs]
        line = f"def {op}({', '.join(text)}) -> {TYPES.get(result, result)}:"
        if len(line) > 116:
            line = f"def {op}(\n    " + ",\n    ".join(text) + f",\n) -> {TYPES.get(result, result)}:"
        doc = [r for r in rest if r.strip()]
        lines.append(f'{line}\n    """{doc[0].strip()}"""\n' if doc else f"{line} ...")
    return HEAD.replace("{attributes}", "\n".join(attributes)) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    import torch  # noqa: F401  (first, so that both share one OpenMP pool)

    from ppo_fast import _C

    STUB.write_text(stub(_C))
