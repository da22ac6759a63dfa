"""Other people's trainers before and after: each module's `measure(enabled, seed, quick)` trains a small real task with the
trainer's own loop, without or with `ppo_fast.integrations`, and says how long each part took and what was learnt.

    python -m bench.trainers sb3 verl          # see `bench/trainers/__main__.py`
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def timed(owner: Any, method: str, seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds the time spent in `owner.method` to seconds[part]; looked up at each call, so that what an integration put there is
    what is timed."""
    theirs = getattr(owner, method)
    inherited = method not in vars(owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return theirs(*args, **kwargs)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - start

    setattr(owner, method, call)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, method)
        else:
            setattr(owner, method, theirs)
