"""Gradient steps that are recorded once, as a CUDA graph, and then replayed for every minibatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .policies import Batch

Results = tuple[Tensor, ...]
Step = Callable[[Batch, Tensor], Results]  # (rollout, index of a minibatch)


class Graphs(Protocol):
    """How a step is recorded. Tests on a CPU record nothing: their replay calls again."""

    def warm_up(self, call: Callable[[], Results]) -> Results:
        """Runs `call` in the surroundings that it will be captured in."""

    def capture(self, call: Callable[[], Results]) -> Callable[[], Results]:
        """Records `call` without running it; what replays it returns its results, the same memory every time."""


class CudaGraphs:
    """CUDA graphs, on a stream of their own, as torch demands of a capture and of what warms up for it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, call: Callable[[], Results]) -> Results:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = call()
        current.wait_stream(self.stream)
        return results

    def capture(self, call: Callable[[], Results]) -> Callable[[], Results]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            results = call()

        def replay() -> Results:
            graph.replay()
            return results

        return replay


class Minibatches:
    """Runs `step` on minibatches of a rollout, each as it is.

    `begin` comes first and names the rollout, calls with the index of a minibatch follow.
    """

    def __init__(self, step: Step) -> None:
        self.step = step

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, index: Tensor) -> Results:
        return self.step(self.batch, index)

    def reset(self) -> None:
        """Forgets what was recorded: tensors that the step uses have been replaced."""


class Replay(Minibatches):
    """The same from recordings, one for each length of an index; there should be few.

    A recording holds addresses, so the first rollout's tensors stay and later ones are copied into them. Steps change
    parameters: the runs that warm up for a recording are the first steps of the training, no additional ones.
    """

    WARM_UP = 3

    def __init__(self, step: Step, graphs: Graphs) -> None:
        super().__init__(step)
        self.graphs = graphs
        self.reset()

    def reset(self) -> None:
        self.kept: Batch | None = None
        self.runs: Counter[int] = Counter()
        self.recorded: dict[int, tuple[Tensor, Callable[[], Results]]] = {}

    def begin(self, batch: Batch) -> None:
        if self.kept is None:
            self.kept = batch
        self.kept.take(batch)
        super().begin(self.kept)

    def __call__(self, index: Tensor) -> Results:
        length = len(index)
        if self.runs[length] < self.WARM_UP:
            self.runs[length] += 1
            return self.graphs.warm_up(lambda: self.step(self.batch, index))
        if length not in self.recorded:
            held = index.clone()
            self.recorded[length] = held, self.graphs.capture(lambda: self.step(self.batch, held))
        held, replay = self.recorded[length]
        held.copy_(index)
        return tuple(x.clone() for x in replay())  # the next replay writes over them
