"""`--cuda-graph`: a step is captured once and then replayed by one call of the host.

A CUDA graph repeats its launches with the arguments of the capture, addresses and numbers. So what is
captured reads all that changes – batch, rates, dead latents – from tensors that stay where they are, has the
same shapes each time, and never waits for the device.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Graphs:
    """Captured pieces of work on one device, which share their memory: nothing in it outlives a replay.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self._device = device
        self._stream = cuda.Stream(device)
        self._pool = cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do `work` once: the first time under its key as it is, later by replaying it.

        The first time compiles kernels and makes what libraries need; both would break a capture. It is
        real work all the same, and so is every replay: a capture alone does nothing.

        Args:
            key: of all work that makes the same launches with the same arguments.
        """
        if key not in self._graphs:
            self._graphs[key] = None
            self._warm_up(work)
            return
        graph = self._graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # What other threads do meanwhile, as one that watches the other processes, is no part of it.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                work()
            self._graphs[key] = graph
        graph.replay()

    def _warm_up(self, work: Callable[[], None]) -> None:
        """On the stream on which it will be captured."""
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            work()
        now.wait_stream(self._stream)
