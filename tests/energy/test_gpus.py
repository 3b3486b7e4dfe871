"""Which GPU is which: CUDA_VISIBLE_DEVICES by NVML, torch's devices by UUID."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.benchmarks import workload
from kvquant.energy.gpus import by_uuid, devices_of, short_name, visible_gpus
from kvquant.errors import UserError
from kvquant.models.graph_decoding import GraphedDecoder
from kvquant.models.loading import resolve_device
from kvquant.models.prefill_quant import _attend
from kvquant.runtime import devices, provenance
from kvquant.runtime.provenance import device_name, environment
from tests.support.nvml import Board, FakeHost, torch_sees

RTX, A100, H100 = "NVIDIA GeForce RTX 3090", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3"
SLICES = [("MIG-1a", f"{A100} MIG 3g.20gb"), ("MIG-2b", f"{A100} MIG 1g.5gb")]


def mixed() -> FakeHost:
    return FakeHost([Board("GPU-aa11", RTX), Board("GPU-ab22", A100), Board("GPU-cc33", H100)])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a host in place of the machine's NVML."""

    def put(found: FakeHost) -> FakeHost:
        monkeypatch.setitem(sys.modules, "pynvml", found)
        return found

    held: dict[Path, Any] = {}
    monkeypatch.setattr(devices, "_held", held)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield put
    for handle in held.values():
        handle.close()


@pytest.mark.fault(
    "devices",
    "CUDA_VISIBLE_DEVICES as indices, UUIDs, empty, -1, reordered, doubled, unknown",
    "resolved as the driver does",
)
@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        (None, ["GPU-aa11", "GPU-ab22", "GPU-cc33"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("1", ["GPU-ab22"]),
        ("2,0", ["GPU-cc33", "GPU-aa11"]),
        (" 2 , 1 ", ["GPU-cc33", "GPU-ab22"]),
        ("1,-1,0", ["GPU-ab22"]),  # ends at the first that names nothing
        ("0,7,1", ["GPU-aa11"]),
        ("1,1", []),  # the driver shows none when one is named twice
        ("1gpu", ["GPU-ab22"]),
        ("GPU-cc33,GPU-aa11", ["GPU-cc33", "GPU-aa11"]),
        ("GPU-cc", ["GPU-cc33"]),  # cut short
        ("GPU-a", []),  # two begin so
        ("GPU-cc,GPU-xx,GPU-aa", ["GPU-cc33"]),
        ("GPU-cc33,1", ["GPU-cc33"]),  # kinds are not mixed
        ("0,GPU-cc33", ["GPU-aa11"]),
        ("GPU-cc,GPU-cc33", []),
    ],
)
def test_what_cuda_will_see(asked: str | None, seen: list[str]) -> None:
    variables = {} if asked is None else {"CUDA_VISIBLE_DEVICES": asked}
    assert [gpu.uuid for gpu in visible_gpus(mixed(), variables)] == seen


def test_boards_that_a_job_may_not_open_are_not_numbered() -> None:
    """NVML counts them, CUDA does not (a cluster's job on the third GPU of a node)."""
    found = mixed()
    found.boards["GPU-aa11"].allowed = found.boards["GPU-ab22"].allowed = False
    assert [g.name for g in visible_gpus(found, {"CUDA_VISIBLE_DEVICES": "0"})] == [H100]


@pytest.mark.fault(
    "devices",
    "CUDA_VISIBLE_DEVICES with MIG slices",
    "resolved; the name holds the profile",
)
@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        (None, ["MIG-1a", "GPU-ff"]),
        ("0", ["MIG-1a"]),
        ("1", ["GPU-ff"]),
        ("GPU-ee", ["MIG-1a"]),
        ("MIG-2b", ["MIG-2b"]),
        ("MIG-2", ["MIG-2b"]),
        ("MIG-GPU-ee/2/0", ["MIG-2b"]),
        ("MIG-GPU-ee/9/0", []),
        ("MIG-GPU-ff/1/0", []),
    ],
)
def test_mig_slices(asked: str | None, seen: list[str]) -> None:
    found = FakeHost([Board("GPU-ee", A100, SLICES), Board("GPU-ff", A100)])
    variables = {} if asked is None else {"CUDA_VISIBLE_DEVICES": asked}
    assert [gpu.uuid for gpu in visible_gpus(found, variables)] == seen


def test_a_board_in_mig_mode_without_slices_is_no_device() -> None:
    found = FakeHost([Board("GPU-ee", A100, []), Board("GPU-ff", H100)])
    assert [gpu.uuid for gpu in visible_gpus(found, {})] == ["GPU-ff"]


def test_a_slice_has_its_profile_in_the_name(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = host(FakeHost([Board("GPU-ee", A100, [("MIG-1a", A100), SLICES[1]])]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a")
    assert device_name() == "a100-sxm4-40gb-mig-3g-20gb"  # an older driver: from its attributes
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2b")
    assert device_name() == "a100-sxm4-40gb-mig-1g-5gb"
    assert by_uuid(found, "2b").mig  # as torch tells a slice's own UUID
    assert by_uuid(found, "ee").uuid == "MIG-2b"  # or that of its board
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1a,MIG-2b")
    with pytest.raises(LookupError, match="the MIG slice that the process"):
        by_uuid(found, "ee")


@pytest.mark.parametrize(
    ("asked", "device", "torchs", "name"),
    [
        ("1", "cuda", ["ab22"], "a100-sxm4-40gb"),
        ("2,1", "cuda", ["cc33", "ab22"], "h100-80gb-hbm3"),
        ("GPU-ab22", "auto", ["ab22"], "a100-sxm4-40gb"),
    ],
)
def test_planned_name_is_that_of_the_gpu_that_works(
    host: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    asked: str,
    device: str,
    torchs: list[str],
    name: str,
) -> None:
    host(mixed())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    monkeypatch.setattr(devices, "_folder", lambda: tmp_path)
    assert device_name() == name
    torch_sees(monkeypatch, torchs)
    workload.check_device(Namespace(device=device, device_name=name))


@pytest.mark.fault(
    "devices",
    "a job on the second GPU of a mixed host",
    "recorded under the name of that GPU",
)
def test_a_job_on_the_second_gpu_is_recorded_as_that(
    host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host(mixed())
    monkeypatch.setattr(devices, "_folder", lambda: tmp_path)
    torch_sees(monkeypatch, ["aa11", "ab22", "cc33"], current=0)
    with pytest.raises(UserError, match="this is 'a100-sxm4-40gb', not 'geforce-rtx-3090'"):
        workload.check_device(Namespace(device="cuda:1", device_name="geforce-rtx-3090"))
    where = workload.check_device(Namespace(device="cuda:1", device_name="a100-sxm4-40gb"))
    assert [gpu["name"] for gpu in environment([where])["gpus"]] == [A100]
    assert environment([torch.device("cpu")])["gpus"] == []
    assert [f.name.split(".")[0] for f in tmp_path.glob("*.alone")] == ["ab22"]


@pytest.mark.fault(
    "devices",
    "CUDA orders different GPUs fastest first",
    "the job refuses and names CUDA_DEVICE_ORDER",
)
def test_fastest_first_is_refused_by_the_job(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA may put the fastest GPU first, which NVML cannot know: the job finds out."""
    host(mixed())
    torch_sees(monkeypatch, ["cc33", "ab22", "aa11"], current=0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    planned = device_name()
    assert planned == "geforce-rtx-3090"
    with pytest.raises(UserError, match=r"this is 'h100-80gb-hbm3'.*CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        workload.check_device(Namespace(device="cuda", device_name=planned))


def test_a_model_on_gpus_of_two_kinds_has_no_one_name(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host(mixed())
    torch_sees(monkeypatch, ["ab22", "cc33"], current=0)
    with pytest.raises(UserError, match="this is 'h100-80gb-hbm3', not 'a100-sxm4-40gb'"):
        workload.check_name([torch.device("cuda:0"), torch.device("cuda:1")], "a100-sxm4-40gb")


def test_without_nvml_torch_names_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    torch_sees(monkeypatch, ["x", "y"], current=1)
    assert device_name(torch.device("cuda")) == "torch-y"
    assert [gpu["name"] for gpu in environment([torch.device("cuda:0")])["gpus"]] == ["torch x"]


def test_planning_starts_neither_torch_nor_cuda(root: Path) -> None:
    code = (
        "import sys, kvquant.runtime.provenance as p; p.device_name(); p.environment();"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def test_names_are_kebab_case() -> None:
    assert short_name(H100) == "h100-80gb-hbm3"
    assert short_name(f"{A100} MIG 1c.3g.20gb") == "a100-sxm4-40gb-mig-1c-3g-20gb"


def test_a_place_is_taken_on_a_named_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A timed job then sees an evaluation that was told its device."""
    torch_sees(monkeypatch, ["aa", "bb"], current=0)
    monkeypatch.setattr(devices, "_folder", lambda: tmp_path)
    monkeypatch.setattr(devices, "_held", {})
    assert devices.claim("cuda:1") == ["cuda:1"]
    assert [file.name.split(".")[0] for file in tmp_path.glob("*.shared")] == ["bb"]
    for handle in devices._held.values():
        handle.close()


def test_gpus_without_a_uuid_of_torch_are_named_by_nvml(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host(mixed())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")
    torch_sees(monkeypatch, ["", ""], current=0)
    assert devices.visible_devices() == ["GPU-cc33", "GPU-ab22"]
    assert provenance.visible_uuids() is None


@pytest.mark.fault(
    "devices",
    "a device that is missing or misspelt",
    "one line",
)
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:2", r"torch sees 2 GPU\(s\), numbered from 0"),
        ("cuda:x", "is none of auto, cpu, cuda and cuda:N"),
        ("gpu", "is none of auto, cpu, cuda and cuda:N"),
        ("meta", "is none of auto, cpu, cuda and cuda:N"),
        ("mps", "is none of auto, cpu, cuda and cuda:N"),
        ("xpu:1", "is none of auto, cpu, cuda and cuda:N"),
        ("", "is none of auto, cpu, cuda and cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    torch_sees(monkeypatch, ["aa", "bb"], current=0)
    with pytest.raises(UserError, match=f"--device: '{device}' .*{message}"):
        resolve_device(device)


def test_kernels_are_launched_on_the_layers_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one: a model on cuda:1, or over several, is where its tensors are."""
    entered: list[Any] = []
    plain = torch.cuda.device_of

    def of(tensor: torch.Tensor) -> Any:
        entered.append(tensor.device)
        return plain(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", of)

    def attend(layer: int, queries: torch.Tensor, *args: Any) -> torch.Tensor:
        return queries + len(entered)

    cache = Namespace(attend=attend, protocol="A", get_seq_length=lambda: 0)
    found = _attend(Namespace(layer_idx=0), cache, torch.zeros(1), 0)
    assert float(found) == 1.0  # inside
    assert entered == [torch.device("cpu")]


def test_a_graph_is_of_one_gpu() -> None:
    parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")]
    assert devices_of(p for m in parts for p in m.parameters()) == [torch.device("cpu")]
    fake = Namespace(parameters=lambda: [Namespace(device=torch.device("cuda", i)) for i in (0, 1)])
    with pytest.raises(ValueError, match="one GPU"):
        GraphedDecoder(fake, Namespace())  # type: ignore[arg-type]
