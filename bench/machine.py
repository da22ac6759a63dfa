"""Where and on what a number was measured: it belongs beside every number."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from ppo_fast import _backend

from . import peers


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug() -> str:
    """Folder name of this machine's results, e.g. "cpu-amd-epyc-2c"."""
    model = re.sub(r"\((?:r|tm)\)|\bcpu\b|@.*|\d+-core|processor", " ", cpu_model().lower())
    return f"cpu-{re.sub(r'[^a-z0-9]+', '-', model).strip('-')}-{cores()}c"


def _git(*args: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """The commit measured; "+" where files that git knows differ from it; "unknown" outside a checkout."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return (head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")) if head else "unknown"


def facts() -> dict[str, str]:
    """Columns that every row of the CSV repeats."""
    c = None if _backend._cpu is None else _backend._cpu.ops
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": str(cores()),
        "isa": c.isa() if c is not None else "reference",
        "python": platform.python_version(),
        **{package: torch.__version__ if package == "torch" else peers.version(package) for package in peers.PACKAGES},
    }
