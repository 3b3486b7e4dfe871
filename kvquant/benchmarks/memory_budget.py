"""A limit on the memory that torch may allocate, which emulates a smaller GPU on a larger one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from kvquant.errors import UserError

GB = 10**9


@contextmanager
def memory_budget(device: torch.device, gigabytes: float | None) -> Iterator[int]:
    """Limits the memory of a GPU that this process may use while the block runs.

    What the process holds beside torch's allocator (the driver's context, loaded kernels, other
    processes) counts as used. Torch raises its usual error where a real card would have no more
    memory, so that out of memory is found as on such a card.

    Args:
        device: The GPU.
        gigabytes: Memory of the emulated card in 10^9 bytes; None sets no limit.

    Yields:
        The bytes that torch may allocate.

    Raises:
        UserError: The device is no GPU, has less memory, or the limit leaves none.
    """
    if device.type != "cuda":
        raise UserError("memory_gb: a limit needs a GPU; leave it out on a CPU")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    if gigabytes is None:
        yield total - beside
        return
    wanted = int(gigabytes * GB)
    if wanted > total:
        raise UserError(
            f"memory_gb: {gigabytes:g} GB asked for, but the GPU has {total / GB:.1f} GB; lower it"
        )
    if wanted <= beside:
        raise UserError(
            f"memory_gb: {gigabytes:g} GB asked for, but {beside / GB:.1f} GB are in use beside "
            "torch; raise it, or free the GPU"
        )
    torch.cuda.set_per_process_memory_fraction((wanted - beside) / total, device)
    try:
        yield wanted - beside
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextmanager
def memory_budgets(
    devices: Sequence[torch.device], gigabytes: float | None
) -> Iterator[dict[torch.device, int]]:
    """Limits the memory of several GPUs, of each to the same; see :func:`memory_budget`.

    Yields:
        The bytes that torch may allocate on each.
    """
    with ExitStack() as limits:
        yield {d: limits.enter_context(memory_budget(d, gigabytes)) for d in devices}


@contextmanager
def lowered_budget(devices: Sequence[torch.device], room: int) -> Iterator[None]:
    """Leaves some of the memory that torch may allocate on GPUs free while the block runs.

    Args:
        devices: The devices; nothing is done for a CPU.
        room: Bytes to leave free on each; 0 leaves the limits as they are.
    """
    gpus = [device for device in devices if device.type == "cuda"] if room else []
    before = [torch.cuda.get_per_process_memory_fraction(device) for device in gpus]
    for device, share in zip(gpus, before, strict=True):
        free, total = torch.cuda.mem_get_info(device)
        # Without a limit, what is beside torch's memory cannot be allocated either.
        reachable = min(share, (free + torch.cuda.memory_reserved(device)) / total)
        torch.cuda.set_per_process_memory_fraction(max(0.0, reachable - room / total), device)
    try:
        yield
    finally:
        for device, share in zip(gpus, before, strict=True):
            torch.cuda.set_per_process_memory_fraction(share, device)
