"""A real Slurm of one host for tests: munged, slurmctld and two slurmd with counted GPUs.

It installs nothing, needs root, keeps all its state in one folder and ends every daemon by its own
process id. With `accounting`, slurmdbd and MariaDB run too and `sacct` answers; without, `squeue`
and `scontrol` answer and `sacct` fails.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr")
PARTITION = "plgrid-gpu-a100"
ACCOUNT = "grant-gpu-a100"
NODES = ("gpu001", "gpu002")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
# linuxproc loses a process whose parent ends first, so a cancelled Snakemake would stay behind
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp
# believe the sizes below, not those of this machine
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
EnforcePartLimits=ALL
ReturnToService=2
# long enough for a busy test to look at every job at its end
MinJobAge=3600
# jobs of `urgent` push those of `spare-*` aside, which end or go back into the queue
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=3
SlurmdTimeout=30
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0
"""
PARTITIONS = f"""\
PartitionName={PARTITION} Nodes=ALL Default=YES State=UP MaxTime=2-00:00:00 DefMemPerCPU=8000 \
PreemptMode=OFF
PartitionName=spare-cancel Nodes=ALL PreemptMode=CANCEL
PartitionName=spare-requeue Nodes=ALL PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none\n"
# AccountingStoragePass is no password: it names the munge socket, which AuthInfo does not do here.
WITH_ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageEnforce=associations
AccountingStorageTRES=gres/gpu,gres/gpu:a100
AccountingStoreFlags=job_comment
"""
SLURMDBD = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""


def reason_to_skip() -> str | None:
    """Why no Slurm can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)}"
    return None if os.geteuid() == 0 else "a local Slurm needs root"


def no_accounting() -> str | None:
    """Why no slurmdbd can be started here, or None."""
    missing = [name for name in ACCOUNTING if shutil.which(name, path=SEARCH) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def until(what: str, test: Callable[[], bool], seconds: float = 240) -> float:
    """Waits until `test` holds; returns the seconds it took."""
    start = time.monotonic()
    while not test():
        if time.monotonic() - start > seconds:
            raise TimeoutError(f"waited {seconds:.0f} s for: {what}")
        time.sleep(0.2)
    return time.monotonic() - start


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports below the ephemeral range that nobody uses.

    Each worker of pytest-xdist looks from a place of its own: a free port is not yet taken.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for first in range(21000 + 1000 * (worker % 8), 30000, 50):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


class LocalSlurm:
    """Starts in the constructor, ends with :meth:`stop`."""

    def __init__(self, folder: Path, accounting: bool = False) -> None:
        self.folder = folder
        self.accounting = accounting
        self.clients: list[subprocess.Popen[str]] = []  # whoever submits; ended with it
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        # The executor's job step strips SLURM_CONF from srun's environment: give it back.
        wrapper = folder / "bin/srun"
        wrapper.parent.mkdir(parents=True)
        real = shutil.which("srun", path=SEARCH)
        wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {real} "$@"\n')
        wrapper.chmod(0o755)
        self.env["PATH"] = f"{wrapper.parent}:{SEARCH}"
        self._configure()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        folder, host = self.folder, platform.node().split(".")[0]
        for name in ("munge", "state", *(f"spool-{n}" for n in NODES)):
            (folder / name).mkdir()
        key = folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        port = _free_ports(2 + len(NODES))
        conf, gres = CONF.format(folder=folder, host=host, port=port), ""
        for index, node in enumerate(NODES, start=1):
            # counted GPUs need device files; their numbers become CUDA_VISIBLE_DEVICES
            (folder / f"dev-{node}").mkdir()
            for gpu in range(8):
                (folder / f"dev-{node}/nvidia{gpu}").symlink_to("/dev/null")
            gres += f"NodeName={node} Name=gpu Type=a100 Flags=nvidia_gpu_env "
            gres += f"File={folder}/dev-{node}/nvidia[0-7]\n"
            conf += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + index} "
            conf += "CPUs=128 RealMemory=1048576 Gres=gpu:a100:8\n"
        conf += PARTITIONS
        last = port + 1 + len(NODES)
        if self.accounting:
            conf += WITH_ACCOUNTING.format(folder=folder, port=last)
            file = folder / "slurmdbd.conf"
            file.write_text(SLURMDBD.format(folder=folder, host=host, port=last))
            file.chmod(0o600)  # slurmdbd insists
        else:
            conf += NO_ACCOUNTING
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text(gres)

    def _daemon(self, *words: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            subprocess.run(words, env=self.env, stdout=log, stderr=log, check=True)

    def _start(self) -> None:
        munge = self.folder / "munge"
        self._daemon(
            *("munged", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket"),
            *(f"--pid-file={self.folder}/munged.pid", f"--log-file={munge}/log"),
            *(f"--seed-file={munge}/seed", "--origin=127.0.0.1"),
        )
        until("munge", lambda: (munge / "socket").exists())
        if self.accounting:
            self._start_accounting()
        self.start_controller()
        for node in NODES:
            self._daemon("slurmd", "-N", node)
        until("idle nodes", lambda: set(self("sinfo", "-hN", "-o", "%T").split()) == {"idle"})

    def _start_accounting(self) -> None:
        data, socket_file = self.folder / "database", self.folder / "mariadbd.sock"
        self._daemon(
            *("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}"),
            *("--auth-root-authentication-method=normal", "--skip-test-db"),
        )
        with (self.folder / "daemons.log").open("a") as log:
            # no network, and the socket lies in a folder of ours: root needs no password
            subprocess.Popen(
                [
                    *("mariadbd", "--no-defaults", "--user=root", f"--datadir={data}"),
                    *(f"--socket={socket_file}", f"--pid-file={self.folder}/mariadbd.pid"),
                    *("--skip-networking", "--innodb-flush-log-at-trx-commit=0"),
                ],
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until("the database", socket_file.exists)
        self.start_slurmdbd()
        for words in (
            ("add", "cluster", "test"),
            ("add", "account", ACCOUNT, "cluster=test"),
            ("add", "user", "root", f"account={ACCOUNT}", "cluster=test"),
            ("modify", "user", "root", "set", f"defaultaccount={ACCOUNT}"),
        ):
            self("sacctmgr", "--quiet", "--immediate", *words)
        assert ACCOUNT in self("sacctmgr", "-nP", "list", "associations"), "accounts were not made"

    def start_slurmdbd(self) -> None:
        """Starts slurmdbd and waits for its answer."""
        # it has no setting for the database's socket; its client library reads this variable
        self._daemon("env", f"MYSQL_UNIX_PORT={self.folder}/mariadbd.sock", "slurmdbd")
        until("slurmdbd", lambda: self.works("sacctmgr", "-n", "list", "cluster"))

    def start_controller(self) -> None:
        """Starts slurmctld and waits for its answer."""
        self._daemon("slurmctld")
        until("slurmctld", lambda: self.works("scontrol", "ping"))

    def kill(self, daemon: str) -> None:
        """SIGKILL to one daemon."""
        pid = int((self.folder / f"{daemon}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        until(f"end of {daemon}", lambda: not _alive(pid), 20)

    def works(self, *words: str) -> bool:
        """Whether a Slurm command succeeds."""
        return subprocess.run(words, env=self.env, capture_output=True, check=False).returncode == 0

    def __call__(self, *words: str) -> str:
        """Output of a Slurm command; empty when it fails."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else ""

    def jobs(self) -> dict[str, dict[str, str]]:
        """{job id: its fields as `scontrol show job` prints them}."""
        found: dict[str, dict[str, str]] = {}
        for line in self("scontrol", "-o", "show", "job").splitlines():
            fields = dict(w.split("=", 1) for w in line.split() if "=" in w)
            found[fields["JobId"]] = fields
        return found

    def active(self) -> list[str]:
        """Ids of jobs that have not ended."""
        return self("squeue", "-h", "-o", "%i").split()

    def stop(self) -> None:
        """Ends the clients, cancels the jobs, then ends each daemon by its process id."""
        for client in self.clients:
            if client.poll() is None:
                client.kill()
                client.wait()
        if jobs := self.active():
            self("scancel", *jobs)
            until("cancelled jobs", lambda: not self.active(), 30)
        for name in (*NODES, "slurmctld", "slurmdbd", "mariadbd", "munged"):
            file = self.folder / f"{name}.pid"
            if not file.is_file():
                continue
            pid = int(file.read_text())
            try:
                os.kill(pid, signal.SIGTERM)
                until(f"end of {name}", lambda pid=pid: not _alive(pid), 20)  # type: ignore[misc]
            except ProcessLookupError:
                pass
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    """Runs and is no zombie (the first process of a container may not reap)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
