"""The same evaluations on one GPU and on several, by processes that claim their GPUs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvquant.benchmarks import scaling
from kvquant.cli import main
from kvquant.errors import UserError
from kvquant.runtime import devices
from kvquant.study.config import load_study
from kvquant.study.digests import prompts_name
from tests.support.forks import ForkedPopen
from tests.support.nvml import Board, FakeHost
from tests.support.pipeline import measured_folder

# Claims a GPU of those that it sees, as an evaluation, and works until no place is left.
WORKER = """
import os, sys, time
from pathlib import Path
from kvquant.runtime import devices
seen = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
found = devices.claim_shared(seen, folder=Path(sys.argv[1]))
if len(seen) > 1:
    print(f"on GPU {found[0]} of {len(seen)}", file=sys.stderr)
time.sleep(float(sys.argv[2]))
if "fail" in sys.argv:
    sys.exit("kvquant: error: no memory is left")
"""


class Host(FakeHost):
    """NVML of GPUs that are busy half of the time."""

    asked = 0

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self.asked += 1
        return type("Rates", (), {"gpu": 80 * (self.asked % 2)})


@pytest.fixture()
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """Two GPUs that nobody uses."""
    found = Host([Board(f"GPU-{n}", "NVIDIA H100 80GB HBM3") for n in ("aa", "bb")])
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_folder", lambda: tmp_path / "locks")
    yield found


def worker(folder: Path, seconds: float, *more: str) -> list[str]:
    """The command of a stand-in for an evaluation."""
    return [sys.executable, "-c", WORKER, str(folder / "locks"), str(seconds), *more]


def test_processes_started_at_once_spread_over_the_gpus(
    root: Path, host: Host, tmp_path: Path
) -> None:
    nvml, gpus = scaling._gpus()
    commands = [worker(tmp_path, 2.0)] * 4

    def use(some: Any) -> scaling.GpuUse:
        return scaling.GpuUse(nvml, [gpu.handle for gpu in some], 0.05)

    both = scaling.measure(commands, gpus, 2, use)
    assert (both.gpus, both.evaluations, both.per_gpu) == (2, 4, [2, 2])
    alone = scaling.measure(commands, gpus[:1], 2, use)
    assert (alone.gpus, alone.per_gpu) == (1, [4])
    assert alone.seconds > both.seconds + 1.5  # two waves, not one
    assert scaling.ratio([alone, both]) == alone.seconds / both.seconds
    assert both.idle_share == [pytest.approx(0.5, abs=0.1)] * 2 or len(set(both.idle_share)) == 2


def test_no_more_run_at_a_time_than_there_are_places(tmp_path: Path) -> None:
    record = "import sys, time; from pathlib import Path; at = time.monotonic(); time.sleep(0.5);"
    record += "Path(sys.argv[-1]).write_text(f'{at} {time.monotonic()}')"
    scaling.run_all([[sys.executable, "-c", record]] * 5, 2, tmp_path, dict(os.environ))
    times = [tuple(map(float, (tmp_path / str(n)).read_text().split())) for n in range(5)]
    for begin, _ in times:
        assert sum(b <= begin < e for b, e in times) <= 2


def test_a_process_that_fails_ends_the_others(root: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "GPU-aa"}
    commands = [worker(tmp_path, 600), worker(tmp_path, 0, "fail")]
    with pytest.raises(UserError, match="ended with status 1: kvquant: error: no memory is left"):
        scaling.run_all(commands, 2, tmp_path, environ)
    assert time.monotonic() - start < 60


def test_models_over_several_gpus_count_on_each() -> None:
    assert scaling.per_gpu(["on GPUs 0, 2 of 4\n", "x\non GPU 2 of 4\ny", "nothing"], 4) == [
        1,
        0,
        2,
        0,
    ]
    assert scaling.per_gpu(["", ""], 1) == [2]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folders as the workflow makes them."""
    folder = measured_folder(tmp_path_factory.mktemp("scaling"))
    raw = json.loads((folder / "study.json").read_text())
    raw["pathvars"] |= {"cache": str(folder / "resources")}
    raw["models"]["tiny"] |= {"gpus": 1}
    (folder / "study.json").write_text(json.dumps(raw))
    study = load_study(folder / "study.json")
    name = prompts_name(study, "tiny", "passkey")
    for source, place in (
        ("model.json", "models/tiny/manifest.json"),
        ("data.json", "data/essays/manifest.json"),
        ("text.txt", "data/essays/text.txt"),
        ("passkey.jsonl.gz", f"prompts/tiny/passkey/{name}.jsonl.gz"),
    ):
        target = folder / "resources" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if (folder / source).exists():
            shutil.copy(folder / source, target)
    quantizer = folder / "r/models/tiny/nuq3-1pct"
    shutil.copytree(folder / "r/models/nuq3-1pct", quantizer)
    return folder


def test_the_command_is_the_workflows(laid_out: Path) -> None:
    study = load_study(laid_out / "study.json")
    words = scaling.command(
        study, laid_out / "x.json", "tiny", "nuq3-1pct", "passkey", [0, 1], "cuda"
    )
    assert words[:4] == [sys.executable, "-m", "kvquant", "evaluate"]
    given = dict(zip(words[4::2], words[5::2], strict=False))
    assert given["--study"].endswith("x.json") and given["--model"] == "tiny"
    assert words[words.index("--seeds") + 1 : words.index("--seeds") + 3] == ["0", "1"]
    for option in ("--prompts", "--quantizer", "--model-manifest"):
        assert Path(words[words.index(option) + 1]).is_file()
    assert "--data-manifest" not in words
    read = scaling.command(study, laid_out / "x.json", "tiny", "fp16", "ppl", [0], "cuda")
    assert "--prompts" not in read and "--quantizer" not in read
    assert Path(read[read.index("--data-manifest") + 1]).is_file()
    with pytest.raises(UserError, match=r"nuq4-1pct/quantizer\.json: is missing: let the workflow"):
        scaling.command(study, laid_out / "x.json", "tiny", "nuq4-1pct", "ppl", [0], "cuda")


def words(laid_out: Path, out: Path, *more: str) -> list[str]:
    """The verb's command line."""
    study = ["--study", str(laid_out / "study.json"), "--schemes", "fp16", "--tasks", "ppl"]
    study += ["--seeds", "0", "--processes-per-gpu", "1", "--waves", "1", "--device", "cpu"]
    return ["bench", "scaling", *study, "--out", str(out), *more]


def test_evaluations_of_the_study(
    laid_out: Path, host: Host, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real evaluations, on the CPU, by processes that need not import torch again."""
    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(Popen=ForkedPopen))
    out = tmp_path / "scaling.json"
    assert main(words(laid_out, out)) == 0
    record = json.loads(out.read_text())
    assert record["devices"] == ["h100-80gb-hbm3"] and record["evaluations"] == 2
    one, two = record["turns"]
    assert (one["gpus"], two["gpus"], one["evaluations"], two["evaluations"]) == (1, 2, 2, 2)
    assert record["throughput_ratio"] == one["seconds"] / two["seconds"]
    assert "evaluation throughput of 2 GPUs over 1:" in capsys.readouterr().out
    assert main(words(laid_out, out)) == 2
    assert "exists: delete it by name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--waves", "0"), "--waves: must be at least 1"),
        (("--processes-per-gpu", "-1"), "--processes-per-gpu: must be at least 1"),
        (("--schemes", "fp17"), "did you mean fp16"),
        (("--model", "tony"), "did you mean tiny"),
        (("--tasks", "pql"), "did you mean ppl"),
    ],
)
def test_options_are_checked(
    more: tuple[str, ...], message: str, laid_out: Path, host: Host, tmp_path: Path, capsys: Any
) -> None:
    assert main(words(laid_out, tmp_path / "out.json", *more)) == 2
    assert message in capsys.readouterr().err


def test_one_gpu_cannot_be_compared_with_several(
    laid_out: Path, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert main(words(laid_out, tmp_path / "out.json")) == 2
    assert (
        "--device: 1 GPU(s) can be seen, and scaling needs two or more" in capsys.readouterr().err
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert main(words(laid_out, tmp_path / "out.json")) == 2
    assert "NVML does not tell of any GPU" in capsys.readouterr().err


def test_gpus_in_use_are_refused(
    laid_out: Path, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    locks = tmp_path / "locks"
    with devices.one_at_a_time(locks):
        devices._hold(locks, "bb", ".shared")  # as torch tells the UUID
    (file,) = [file for file in devices._held if file.parent == locks]
    handle = devices._held.pop(file)  # as if another process held it
    assert main(words(laid_out, tmp_path / "out.json")) == 2
    assert "1 other process(es) of kvquant use these GPUs" in capsys.readouterr().err
    handle.close()
    assert devices.used_by_others(["GPU-bb"], locks) == 0
    assert devices.used_by_others(["GPU-bb"], tmp_path / "none" / "deeper" / "x") == 0
