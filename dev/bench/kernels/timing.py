"""How long a call takes: replayed in a CUDA graph, and launched by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Call = Callable[[], object]

REPEATS = 15
_ENOUGH_REPEATS = 3  # after which a second is enough
_ENOUGH_SECONDS = 1.0


def seconds_by_graph(calls: Sequence[Call]) -> float:
    """Median seconds of a call when a graph of all of them is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compile before capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # so that no two write to the same memory

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    replay()
    return _repeated(lambda _: replay()) / len(kept)


def seconds_by_call(calls: Sequence[Call], device: torch.device) -> float:
    """Median seconds of a call launched by itself, the device idle before."""
    on_gpu = device.type == "cuda"

    def launch(repeat: int) -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        calls[repeat % len(calls)]()
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    launch(0)
    return _repeated(launch)


def _repeated(timed: Callable[[int], float]) -> float:
    """Median of what ``timed`` returns for repeat 0, 1, ...; fewer where that takes long."""
    times: list[float] = []
    while len(times) < REPEATS and (
        len(times) < _ENOUGH_REPEATS or sum(times) < _ENOUGH_SECONDS
    ):
        times.append(timed(len(times)))
    return median(times)
