"""Starts the processes that share a model, one for each GPU of this machine, and waits for them.

They are started by torch's elastic launcher, as `torchrun` does it, and talk by NCCL on GPUs and by
gloo on a CPU. When one of them fails, the launcher ends the others, which would wait for it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kvquant.benchmarks.team import ProcessTeam
from kvquant.errors import UserError, printable

Work = Callable[..., None]
LATER = 3.0  # seconds in which the launcher notices a process that failed before


@contextmanager
def _environment(changed: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of the environment, which processes inherit, while a block runs."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _seen_by_processes(devices: Sequence[torch.device]) -> str:
    """Returns the variable CUDA_VISIBLE_DEVICES with which a process sees these devices alone."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    words = None if shown is None else [word.strip() for word in shown.split(",")]
    numbers = [int(device.index or 0) for device in devices if device.type == "cuda"]
    return ",".join(str(n) if words is None else words[n] for n in numbers)


def _works(work: Work, args: tuple[Any, ...], cores: int) -> None:
    """Prepares a process, does its work, and waits for the others."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(cores)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo", device_id=device if on_gpu else None
    )
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stderr(nowhere) if rank else nullcontext(),  # progress is the same in all
    ):
        work(device, ProcessTeam(), *args)
    distributed.destroy_process_group()


def _lost_another(error: BaseException) -> bool:
    """Returns whether an error means that another process is gone."""
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _process(work: Work, args: tuple[Any, ...], cores: int, folder: Path) -> None:
    """Runs one process, as the launcher calls it, and writes why it failed, if it does.

    A process that lost another one fails later, so that the launcher sees the cause first.
    """
    logging.disable(logging.NOTSET)  # which a forked process has from its parent
    for stop in (signal.SIGTERM, signal.SIGINT):  # the launcher's own way prints a traceback
        signal.signal(stop, signal.SIG_DFL)
    try:
        _works(work, args, cores)
    except Exception as error:
        if _lost_another(error):
            time.sleep(LATER)
        told = str(error)
        if not isinstance(error, UserError):
            traceback.print_exc()
            told = f"failed: {type(error).__name__}: {told}"
        (folder / os.environ["LOCAL_RANK"]).write_text(told, encoding="utf-8")
        sys.exit(1)


def _told(error: ChildFailedError, folder: Path, count: int) -> str:
    """Returns the line for a failure of processes: what the first one that failed wrote.

    Args:
        error: The launcher's error.
        folder: Where processes write why they failed.
        count: Number of processes.
    """
    rank, failure = error.get_first_failure()
    file = folder / str(rank)
    if not file.exists():
        code = failure.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"process {rank} of {count} {how}"
    line = printable(file.read_text(encoding="utf-8").partition("\n")[0])
    return f"process {rank} of {count} {line}" if line.startswith("failed: ") else line


def run_processes(
    work: Work, args: tuple[Any, ...], devices: Sequence[torch.device], name: str
) -> None:
    """Runs the same work in one process per device and waits until all are done.

    Args:
        work: A function of a module, called with the process's device, the team and `args`.
        args: What it gets.
        devices: Different GPUs of this machine, or the CPU as often as there are processes.
        name: The case of whole jobs, for messages.

    Raises:
        UserError: A process failed.
        KeyboardInterrupt: The run was interrupted, and the processes were ended.
        SystemExit: The same by another signal.
    """
    count, on_gpus = len(devices), devices[0].type == "cuda"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        max_restarts=0,
        monitor_interval=0.1,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1",
        run_id=f"kvquant-{os.getpid()}",
        # A forked process need not import anything, but cannot use GPUs after its parent has.
        start_method="spawn" if on_gpus else "fork",
    )
    cores = max(1, len(os.sched_getaffinity(0)) // count)
    changed = {"CUDA_VISIBLE_DEVICES": _seen_by_processes(devices)}
    changed["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")  # of one machine
    told = None
    logging.disable(logging.CRITICAL)  # the failure is told below, in one line
    try:
        with _environment(changed), tempfile.TemporaryDirectory() as folder:
            try:
                elastic_launch(config, _process)(work, args, cores, Path(folder))
            except ChildFailedError as error:
                told = _told(error, Path(folder), count)
            except SignalException as stop:
                if stop.sigval == signal.SIGINT:
                    raise KeyboardInterrupt from stop
                raise SystemExit(128 + stop.sigval) from stop
    finally:
        logging.disable(logging.NOTSET)
    if told is not None:
        raise UserError(f"jobs.cases.{name}: {told}")
