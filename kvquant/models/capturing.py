"""Captures work on the device as a CUDA graph, and mends what a failed capture leaves behind.

A capture fails where the work waits for the device. torch.cuda.graph then leaves three things as
they were during the capture: the current stream, torch's random generator, which refuses to draw
outside of a capture from then on, and the allocator, which waits for the capture's end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch


def capture(
    work: Callable[[], torch.Tensor], undo: Callable[[], None]
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Captures work as a graph, after running it once on a stream of its own to warm up.

    Args:
        work: Launches the work on the current device and returns its output.
        undo: Takes back on the device what `work` counted; it is called after the warm-up and,
            unless it failed, after the capture, whose work does not run.

    Returns:
        The graph, and the output that each of its replays writes.

    Raises:
        RuntimeError: The work cannot be captured, or memory ran out. The stream, the generator and
            the allocator are as before.
    """
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        work()
        undo()
    current.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    device = torch.cuda.current_device()
    drawn = torch.cuda.get_rng_state(device)
    try:
        # The stream that torch takes by itself is of the GPU on which it captured first.
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            output = work()
    except BaseException:
        torch.cuda.set_stream(current)
        _end_capture(device, pool, drawn)
        raise
    undo()
    return graph, output


def _end_capture(device: int, pool: tuple[int, int], drawn: torch.Tensor) -> None:
    """Lets the generator and the allocator forget a capture that did not end.

    Args:
        device: Index of the device.
        pool: The capture's memory pool.
        drawn: The generator's state before the capture.
    """
    fresh = torch.Generator(device=f"cuda:{device}")
    fresh.set_state(drawn)
    # The state that believes in a capture is replaced; setting its numbers would not change that.
    torch.cuda.default_generators[device].graphsafe_set_state(fresh.graphsafe_get_state())
    with suppress(RuntimeError):  # the capture failed before the allocator knew of it
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
