"""Decode steps as CUDA graphs: the hundreds of small kernels of a step are launched at once, not one by one from Python.

A graph holds addresses, so it lives for one `generate`: weights that are changed or moved between two of them do no harm.
Written for torch 2.11 and later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from srppo.rollout.slots import Places

COLUMNS = 256  # the columns seen come in multiples of this: more graphs to capture against more masked columns to read


def bucket(seen: int, capacity: int) -> int:
    """The columns a graph of this many reads: the next multiple of COLUMNS, at most the capacity."""
    return min(-(-seen // COLUMNS) * COLUMNS, capacity)


class Replay:
    """Calls `advance`, whose shapes depend on places.rows and places.seen alone: as a graph from each pair's second call on.

    The first call of a pair is plain: it is what warms up libraries and, under autocast, converts the weights once, outside the graph.
    A capture that fails is said once, and all calls are plain from then on. Off CUDA they always are.
    """

    def __init__(self, advance: Callable[[], None], places: Places, device: torch.device):
        self.advance, self.places = advance, places
        self.capturing = device.type == "cuda"
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.capturing else None  # graphs replayed one at a time share memory

    def __call__(self) -> None:
        key = (self.places.rows, self.places.seen)
        if not self.capturing or key not in self.graphs:
            self.graphs[key] = None
            self.advance()
            return
        if self.graphs[key] is None:
            self.graphs[key] = self._captured()
        graph = self.graphs[key]
        if graph is None:
            self.advance()
        else:
            graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The step recorded, not executed; None where it cannot be."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do on the device meanwhile (loaders, monitors) is no error
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.advance()
        except RuntimeError as error:
            self.capturing = False
            warnings.warn(
                f"decoding goes on without CUDA graphs, as this model's step could not be captured: {' '.join(str(error).split())[:300]}. "
                "rollout.cuda_graphs: false avoids the attempt",
                stacklevel=2,
            )
            return None
        return graph
