"""A training step as CUDA graphs, one for each width of its batches: replayed, no kernel waits for its launch by the CPU.

An adapter's call is a function of tensors that stay where they are, so that a graph of it holds for all steps of a training.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

WARMUP = 2
"""Calls before the first capture, in which libraries choose their kernels and lay out their memory."""
WIDTHS = 64
"""Widths that have a graph are multiples of this, in tokens."""

Rows = Mapping[str, Tensor]


class Captured:
    """A function of `(params, rows)` that is captured at the first rows of a shape and replayed at others of that shape.

    Params must be the same tensors in each call; their values may change. Results are overwritten by the next call. A function that cannot
    be captured, one that waits for the GPU, is called as it is from then on, and `failed` says why.

    Args:
        step: the function.
    """

    def __init__(self, step: Callable[[Any, Rows], Any]) -> None:
        self.step, self.failed = step, ""
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Rows, Any]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, params: Any, rows: Rows) -> Any:
        """Return `step(params, rows)`."""
        shapes = tuple((name, t.shape) for name, t in rows.items())
        if not self.failed and shapes not in self._graphs:
            random = torch.cuda.default_generators[torch.cuda.current_device()]
            before = random.clone_state()
            try:
                self._graphs[shapes] = self._capture(params, rows)
            except RuntimeError as e:  # CUDA's errors, of which an operation that may not be captured is one
                self.failed = str(e).splitlines()[0]
                random.graphsafe_set_state(before)  # its own still waits for the end of the capture, and would draw nothing
                torch.cuda.synchronize()
        if self.failed:
            return self.step(params, rows)
        graph, inputs, results = self._graphs[shapes]
        for name, t in inputs.items():
            t.copy_(rows[name])
        graph.replay()
        return results

    def _capture(self, params: Any, rows: Rows) -> tuple[torch.cuda.CUDAGraph, Rows, Any]:
        inputs, graph, beside = {name: t.clone() for name, t in rows.items()}, torch.cuda.CUDAGraph(), torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(0 if self._graphs else WARMUP):
                self.step(params, inputs)
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(graph, pool=self._pool):
            results = self.step(params, inputs)
        return graph, inputs, results
