"""Jobs that a killed run left in Slurm, with a stand-in for squeue.

Also covers: runtime.slurm_client.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.runtime import slurm, slurm_client


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A `squeue` first in PATH that runs `body`."""
    file = folder / "squeue"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_jobs_of_this_folder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = f"7|RUNNING|rule_evaluate_a|{tmp_path}\n8|PENDING|rule_energy_b|/elsewhere\n"
    rows += f"9|RUNNING|(null)|{tmp_path}"
    squeue(tmp_path, monkeypatch, f"printf '%s\\n' '{rows}'")
    assert slurm.leftovers(tmp_path) == [("7", "RUNNING", "evaluate_a")]
    with pytest.raises(UserError, match="scancel 7;") as caught:
        slurm.refuse_leftovers(tmp_path)
    assert "7 RUNNING evaluate_a" in str(caught.value)
    slurm.refuse_leftovers(tmp_path / "other")


def test_a_silent_controller_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "asked"
    squeue(tmp_path, monkeypatch, f"[ -e {flag} ] || {{ : >{flag}; exit 1; }}")
    assert slurm.leftovers(tmp_path, pause=0.01) == []
    squeue(tmp_path, monkeypatch, "echo unable to contact >&2; exit 1")
    with pytest.raises(UserError, match="no answer in 3 attempts: unable to contact"):
        slurm.leftovers(tmp_path, attempts=3, pause=0.01)


def stand_in(file: Path, body: str) -> str:
    """A stand-in for one of Slurm's commands."""
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return str(file)


def test_only_an_unreachable_daemon_is_asked_again(tmp_path: Path) -> None:
    refused = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"
    command = stand_in(
        tmp_path / "sbatch",
        f"echo >>{tmp_path}/n; [ $(wc -l <{tmp_path}/n) -gt 2 ] || {{ {refused}; }}; echo 7",
    )
    stand_in(tmp_path / "squeue", ":")
    done = slurm_client.patient([command], pause=0.01)
    assert (done.returncode, done.stdout) == (0, "7\n")
    command = stand_in(tmp_path / "sbatch", "echo 'invalid account' >&2; exit 1")
    assert "invalid account" in slurm_client.patient([command], pause=60).stderr
    command = stand_in(tmp_path / "sacctmgr", "echo 'Connection refused' >&2; exit 1")
    assert slurm_client.patient([command], attempts=3, pause=0.01).returncode == 1


def test_a_submission_without_an_answer_is_looked_for(tmp_path: Path) -> None:
    command = stand_in(
        tmp_path / "sbatch",
        f"echo x >>{tmp_path}/n; echo 'Socket timed out on send/recv' >&2; exit 1",
    )
    words = [command, "--parsable", "--job-name", "run", "--comment", "rule_b", "--wrap=true"]
    stand_in(tmp_path / "squeue", "printf '11|rule_a\\n12|rule_b\\n'")
    done = slurm_client.patient(words, pause=0.01)
    assert (done.returncode, done.stdout) == (0, "12\n")
    assert (tmp_path / "n").read_text() == "x\n"
    stand_in(tmp_path / "squeue", ":")
    assert slurm_client.patient(words, attempts=2, pause=0.01).returncode == 1


@pytest.mark.fault(
    "workflow",
    "passing errors of a busy Slurm controller",
    "asked again for about 20 minutes",
)
@pytest.mark.parametrize(
    "error",
    [
        "Batch job submission failed: Unexpected message received",
        "Batch job submission failed: Zero Bytes were transmitted or received",
        "slurm_receive_msg: Transport endpoint is not connected",
        "Batch job submission failed: Resource temporarily unavailable",
        "Unable to contact slurm controller (receive failure)",
        "slurm_send_node_msg: Connection reset by peer",
        "Socket timed out on send/recv operation",
    ],
)
def test_passing_errors_of_a_busy_controller_are_asked_again(tmp_path: Path, error: str) -> None:
    count = f"echo >>{tmp_path}/n; [ $(wc -l <{tmp_path}/n) -gt 2 ] ||"
    fail = f"{{ echo 'sbatch: error: {error}' >&2; exit 1; }}"
    command = stand_in(tmp_path / "sbatch", f"{count} {fail}; echo 7")
    stand_in(tmp_path / "squeue", ":")
    words = [command, "--job-name", "run", "--comment", "rule_b"]
    done = slurm_client.patient(words, pause=0.01)
    assert (done.returncode, done.stdout) == (0, "7\n")


@pytest.mark.fault(
    "workflow",
    "a submission whose answer is lost while squeue is silent",
    "nothing is submitted twice",
)
def test_nothing_is_submitted_again_while_nobody_knows(tmp_path: Path) -> None:
    lost = f"echo x >>{tmp_path}/n; echo 'Zero Bytes were transmitted or received' >&2; exit 1"
    command = stand_in(tmp_path / "sbatch", lost)
    # accepted, but the controller answers nobody for a while
    silent = f"echo >>{tmp_path}/q; [ $(wc -l <{tmp_path}/q) -gt 3 ] || exit 1"
    stand_in(tmp_path / "squeue", f"{silent}; printf '12|rule_b\\n'")
    words = [command, "--job-name", "run", "--comment", "rule_b"]
    done = slurm_client.patient(words, pause=0.01)
    assert (done.returncode, done.stdout) == (0, "12\n")
    assert (tmp_path / "n").read_text() == "x\n"


def test_a_preempted_job_has_ended() -> None:
    listing = "1|RUNNING\n2|PREEMPTED\n3|PENDING\n"
    assert slurm_client.ended(listing) == "1|RUNNING\n2|CANCELLED\n3|PENDING\n"


def test_commands_of_this_process_are_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stand_in(tmp_path / "squeue", "echo '5|PREEMPTED'")
    stand_in(tmp_path / "scontrol", "echo \"asked $*\"; echo 'MinJobAge = 300'")
    slurm.patient_commands()
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$*"; exit 1\n')

    def output(*words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout

    assert output("squeue", "--states=all") == "5|CANCELLED\n"
    assert output("scontrol", "show", "config") == "asked show config\nMinJobAge = 300\n"
    assert output("scontrol", "show", "job") == "show job\n"
