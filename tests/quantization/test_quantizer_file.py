"""A quantizer or its statistics that were altered, exchanged or cut short are refused by name.

Also covers: formats.layer_quantizer, formats.tensor_file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvquant.calibration.build import build_layer
from kvquant.calibration.collect import calibrate
from kvquant.calibration.statistics import load_statistics, save_statistics
from kvquant.errors import UserError
from kvquant.fetch.file_hashes import FileHashes
from kvquant.formats.sealing import seal_of
from kvquant.models.loading import load_quantized_model
from kvquant.quantization.quantizer_file import load_quantizer
from kvquant.study.calibration import CalibrationSpec
from kvquant.study.schemes import Fp16Scheme, KvquantRefScheme, NuqScheme
from tests.support.models import save_tiny, tiny_model
from tests.support.quantizers import save_made_quantizer

SCHEME = NuqScheme(kind="nuq", bits=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its statistics, and quantizers of two schemes."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny(folder / "model")
    weights = FileHashes(model, "model").of("model.safetensors")
    spec = CalibrationSpec(windows=1, window=64)
    found = calibrate(tiny_model(), [torch.randint(0, 97, (64,)).tolist()], spec)
    info = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}
    save_statistics(folder / "stats.safetensors", found, info)
    for bits in (3, 4):
        scheme = NuqScheme(kind="nuq", bits=bits)
        layers = [build_layer(s, scheme, spec.outlier_fractions, 2)[0] for s in found]
        save_made_quantizer(folder / f"q{bits}.json", scheme, weights, layers)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "work"))


def one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert len(str(error.value).splitlines()) == 1


def test_scheme_comes_from_the_file(work: Path) -> None:
    qm = load_quantized_model(work / "model", quantizer=work / "q3.json", device="cpu")
    assert qm.scheme == SCHEME and qm.quantizes
    assert qm.inputs == {"quantizer": FileHashes(work, "x").of("q3.safetensors")}
    qm = load_quantized_model(work / "model", SCHEME, quantizer=work / "q3.json", device="cpu")
    assert qm.scheme == SCHEME
    # Tables do not depend on the attention.
    eight = SCHEME.model_copy(update={"prompt_attention": "8-bit"})
    qm = load_quantized_model(work / "model", eight, quantizer=work / "q3.json", device="cpu")
    assert qm.scheme == eight


@pytest.mark.fault(
    "custody",
    "a scheme of other bits, outliers, sinks, block size or datatype than the quantizer",
    "refused by field",
)
@pytest.mark.parametrize(
    ("scheme", "field"),
    [
        (NuqScheme(kind="nuq", bits=4), "bits: 3"),
        (NuqScheme(kind="nuq", bits=3, outliers=0.02), "outliers: 0.01"),
        (NuqScheme(kind="nuq", bits=3, sinks=4), "sinks: 1"),
        (NuqScheme(kind="nuq", bits=3, block_size=128), "block_size: 64"),
        (NuqScheme(kind="nuq", bits=3, datatype="nf"), "datatype: nuq"),
        (NuqScheme(kind="nuq", bits=3, weighting="none"), "weighting"),
        (NuqScheme(kind="nuq", bits=3, q_norm=True), "q_norm: False"),
        (
            NuqScheme(kind="nuq", bits=3, keys="after-rope"),
            "keys: before-rope, not for keys: after-rope: build",
        ),
        (KvquantRefScheme(kind="kvquant-ref", bits=3), "kind: nuq"),
        (Fp16Scheme(kind="fp16"), "kind: nuq"),
    ],
)
def test_another_scheme_is_refused(work: Path, scheme: Any, field: str) -> None:
    with pytest.raises(UserError, match=f"was built for scheme 'nuq3' with {field}") as error:
        load_quantized_model(work / "model", scheme, quantizer=work / "q3.json", device="cpu")
    one_line(error)


@pytest.mark.fault(
    "custody",
    "the quantizer of another model",
    "refused",
)
def test_another_model_is_refused_without_a_manifest(work: Path) -> None:
    other = save_tiny(work / "other", positions=1024)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="was built for model 'tiny'"):
        load_quantized_model(other, quantizer=work / "q3.json", device="cpu")


def forge(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes tensors and makes every hash fit again."""
    file = path.with_suffix(".safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    raw = json.loads(path.read_text())
    raw["tensors_sha256"] = FileHashes(file.parent, "x").of(file.name)
    raw["seal"] = seal_of(raw)
    path.write_text(json.dumps(raw))


TENSORS: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = [
    ("lacks layers.1.key_zero", lambda t: t.pop("layers.1.key_zero")),
    ("has an unexpected tensor", lambda t: t.update({"layers.2.key_zero": torch.zeros(2, 16)})),
    ("not float32", lambda t: t.update({"layers.0.key_zero": t["layers.0.key_zero"].double()})),
    ("has shape", lambda t: t.update({"layers.0.key_levels": torch.arange(16.0)})),
    ("has shape", lambda t: t.update({"layers.0.key_scale": torch.ones(4, 16)})),
    ("not finite", lambda t: t["layers.0.key_zero"].view(-1)[0].fill_(float("nan"))),
    ("not finite", lambda t: t["layers.1.value_levels"][7:].fill_(float("inf"))),
    ("not sorted", lambda t: t["layers.1.key_levels"][:1].fill_(9.0)),
    ("negative", lambda t: t["layers.1.key_scale"].neg_()),
]


@pytest.mark.fault(
    "custody",
    "NaN, wrong shapes, types, order or counts, with hashes made to fit",
    "one line",
)
@pytest.mark.parametrize(("message", "change"), TENSORS)
def test_tables_that_cannot_be_are_refused(
    work: Path, message: str, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    forge(work / "q3.json", change)
    with pytest.raises(UserError, match=message) as error:
        load_quantizer(work / "q3.json", weights_sha256=None)
    one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 3},
        {"num_layers": 1},
        {"num_layers": 10**9},
        {"num_layers": "2"},
        {"num_kv_heads": 4, "head_dim": 8},
        {"head_dim": 32},
        {"spec": {"kind": "nuq", "bits": 4}},
        {"spec": {"kind": "nuq", "bits": 7}},
        {"spec": {"kind": "fp16"}},
        {"spec": 3},
        {"more": 1},
    ],
)
def test_json_that_does_not_fit_is_refused(work: Path, change: dict[str, Any]) -> None:
    raw = {**json.loads((work / "q3.json").read_text()), **change}
    raw["seal"] = seal_of(raw)
    (work / "q3.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="build it again") as error:
        load_quantizer(work / "q3.json", weights_sha256=None)
    one_line(error)


@pytest.mark.fault(
    "custody",
    "altered statistics of a calibration",
    "refused: calibrate again",
)
@pytest.mark.parametrize("kind", ["q3", "stats"])
def test_altered_files_are_refused(work: Path, kind: str) -> None:
    file, manifest = work / f"{kind}.safetensors", work / f"{kind}.json"
    tensors, text = file.read_bytes(), manifest.read_text()

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            if kind == "q3":
                load_quantizer(manifest, weights_sha256=None)
            else:
                load_statistics(file)
        one_line(error)

    for damaged in (tensors[:-1], bytes(len(tensors)), tensors[:-1] + bytes([tensors[-1] ^ 1])):
        file.write_bytes(damaged)
        refused("sha256 differs")
    file.unlink()
    refused("is missing")
    file.mkdir()
    refused("a folder")
    file.rmdir()
    file.write_bytes(tensors)
    raw = json.loads(text)
    for name in raw:
        if name != "seal":
            manifest.write_text(json.dumps({**raw, name: [raw[name]]}))
            refused("seal")
    for name in ("seal", "tensors_sha256"):
        manifest.write_text(json.dumps({k: v for k, v in raw.items() if k != name}))
        refused("older version")
    for bad in (b"\xff\xfe", b"", b"{", b"[]", b'{"seal": NaN}', b"[" * 10**5):
        manifest.write_bytes(bad)
        refused("again")


@pytest.mark.fault(
    "custody",
    "tables of another scheme",
    "refused by field",
)
def test_tables_of_another_scheme_are_refused(work: Path) -> None:
    shutil.copy(work / "q4.safetensors", work / "q3.safetensors")
    with pytest.raises(UserError, match="not the file of its JSON"):
        load_quantizer(work / "q3.json", weights_sha256=None)


def test_statistics_that_do_not_fit_together(work: Path) -> None:
    changes: list[Callable[[dict[str, torch.Tensor]], Any]] = [
        lambda t: t["layers.0.counts"].neg_(),
        lambda t: t["layers.1.width"].zero_(),
        lambda t: t.update({"layers.0.low": torch.zeros(5)}),
        lambda t: t.update({"layers.0.value_fisher": torch.zeros(9, 1024)}),
    ]
    for change in changes:
        folder = Path(shutil.copytree(work, work.parent / "again", dirs_exist_ok=True))
        forge(folder / "stats.json", change)
        with pytest.raises(UserError, match="do not fit"):
            load_statistics(folder / "stats.safetensors")


def test_files_have_the_mode_of_the_umask(made: Path, tmp_path: Path) -> None:
    layers = load_quantizer(made / "q3.json", weights_sha256=None)[1]
    statistics, info = load_statistics(made / "stats.safetensors")
    old = os.umask(0o027)
    try:
        save_made_quantizer(tmp_path / "q.json", SCHEME, "a" * 64, layers)
        save_statistics(tmp_path / "s.safetensors", statistics, info)
    finally:
        os.umask(old)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.fault(
    "custody",
    "any byte of a quantizer",
    "refused",
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_byte_of_a_quantizer_can_change(made: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Except the white space of its JSON."""
    suffix = data.draw(st.sampled_from([".json", ".safetensors"]))
    for name in (".json", ".safetensors"):
        shutil.copy(made / f"q3{name}", tmp_path / f"q{name}")
    raw = bytearray((tmp_path / f"q{suffix}").read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    before, raw[at] = raw[at], data.draw(st.integers(0, 255))
    (tmp_path / f"q{suffix}").write_bytes(raw)
    white = b" \n\t\r"
    if raw[at] == before or (suffix == ".json" and raw[at] in white and before in white):
        return
    with pytest.raises(UserError) as error:
        load_quantizer(tmp_path / "q.json", weights_sha256=None)
    one_line(error)
