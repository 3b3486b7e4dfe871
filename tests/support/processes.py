"""Starts processes that share a model, as `torchrun` does, and collects what they find."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Work = Callable[..., Any]
SECONDS = 300


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _run(rank: int, ranks: int, port: int, folder: Path, work: Work, args: tuple[Any, ...]) -> None:
    """Does the work of a process and writes its result, or the traceback of its failure."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        torch.save(work(*args), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def in_processes(ranks: int, folder: Path, work: Work, *args: Any, gpus: bool = False) -> list[Any]:
    """Results of the same work in each of several processes, in the order of their ranks.

    Args:
        ranks: Their number.
        folder: For their results; it is made.
        work: A function of a module, which is called with `args`.
        args: What it gets.
        gpus: Whether the processes see GPUs; else they compute on the CPU with gloo.
    """
    folder.mkdir()
    # A forked process need not import anything, but cannot use a GPU that its parent has used.
    cuda = torch.cuda.is_available()
    context: Any = multiprocessing.get_context("spawn" if cuda else "fork")
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        if not gpus:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        started = [
            context.Process(target=_run, args=(rank, ranks, port, folder, work, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
    try:
        waiting = list(started)
        while waiting:
            multiprocessing.connection.wait([p.sentinel for p in waiting], SECONDS) or pytest.fail(
                f"{len(waiting)} of {ranks} processes did not end in {SECONDS} s"
            )
            waiting = [p for p in waiting if p.exitcode is None]
            if any(p.exitcode for p in started):
                break
    finally:
        for process in started:
            process.kill()
            process.join()
    told = "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
    assert all((folder / f"{rank}.pt").exists() for rank in range(ranks)), told
    # Whole objects, which the processes above saved just now.
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
