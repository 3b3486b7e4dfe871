"""One scheme kind, one datatype and one model family are added in a copy, as CONTRIBUTING says.

Each takes at most one file and one registration. Every list, table and test finds it by itself.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.additions import RepositoryCopy

pytestmark = pytest.mark.slow

CODEC = '''
    """Signed 8-bit integers with one scale per token and head."""

    from __future__ import annotations

    import torch

    from kvquant.cache.codec import Codec, Packed
    from kvquant.formats.layer_quantizer import LayerQuantizer
    from kvquant.study.peer_schemes import Int8Scheme


    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns codes and 16-bit scales."""
        scale = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6).to(x.dtype)
        return (x.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


    class Int8Codec(Codec):
        """Packs one layer; needs no calibration."""

        rotated_keys = True

        def __init__(self, spec: Int8Scheme) -> None:
            self.sinks, self.block_size, self.residual = spec.sinks, spec.block_size, spec.residual

        def pack(self, keys: torch.Tensor, values: torch.Tensor) -> Packed:
            """See :meth:`Codec.pack`."""
            (k, k_scale), (v, v_scale) = encode(keys), encode(values)
            return Packed({"k": k, "k_scale": k_scale, "v": v, "v_scale": v_scale})

        def unpack(
            self, packed: Packed, shape: tuple[int, int, int, int]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """See :meth:`Codec.unpack`."""
            d = packed.dense
            keys, values = (d[n].float() * d[f"{n}_scale"].float() for n in ("k", "v"))
            return keys.view(shape), values.view(shape)

        def fake(
            self, keys: torch.Tensor, values: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """See :meth:`Codec.fake`."""
            (k, k_scale), (v, v_scale) = encode(keys), encode(values)
            return k.float() * k_scale.float(), v.float() * v_scale.float()


    def make_codec(spec: Int8Scheme, layer: int, tables: LayerQuantizer | None) -> Codec:
        """Returns the codec of a layer, which is the same for all layers."""
        return Int8Codec(spec)
'''
KIND = '''
    @scheme_kind(
        label="INT8",
        summary="INT8, one scale per token and head",
        codec="kvquant.schemes.int8:make_codec",
        nominal_bits=8,
    )
    class Int8Scheme(TokenScheme):
        """8-bit integers."""

        kind: Literal["int8"] = Field(description="kind of the scheme")


'''
CUBIC = '''
    """Levels that lie closer together around zero."""

    from __future__ import annotations

    import numpy as np


    def levels(bits: int, histogram: object = None) -> np.ndarray:
        """Returns cubes of evenly spaced numbers."""
        return np.linspace(-1.0, 1.0, 2**bits) ** 3
'''
DATATYPE = """
    Datatype("cubic", "kvquant.quantization.cubic:levels", "CUBIC", "cubes of even steps"),
"""
FAMILY = """
    ModelFamily("starcoder2", label="StarCoder2", attention="Starcoder2Attention"),
"""
ENTRIES = """
schemes:
  int8: {kind: int8, sinks: 1}
  cubic: {kind: nuq, bits: 3, datatype: cubic}
"""


@pytest.fixture(scope="module")
def copy(root: Path, tmp_path_factory: pytest.TempPathFactory) -> RepositoryCopy:
    """The repository with one of each added."""
    copy = RepositoryCopy(root, tmp_path_factory.mktemp("additions") / "copy")
    copy.add_file("kvquant/schemes/int8.py", CODEC)
    copy.insert_before("kvquant/study/peer_schemes.py", "# A new peer without", KIND)
    copy.add_file("kvquant/quantization/cubic.py", CUBIC)
    copy.insert_before("kvquant/study/datatypes.py", "# A new datatype goes above", DATATYPE)
    copy.insert_before("kvquant/study/model_families.py", "# A new family goes above", FAMILY)
    return copy


def test_each_addition_is_one_registration(copy: RepositoryCopy) -> None:
    registrations = {name: n for name, n in copy.edits.items() if name.startswith("kvquant/study/")}
    assert registrations == {
        "kvquant/study/peer_schemes.py": 10,
        "kvquant/study/datatypes.py": 1,
        "kvquant/study/model_families.py": 1,
    }
    others = set(copy.edits) - set(registrations)
    assert others == {"kvquant/schemes/int8.py", "kvquant/quantization/cubic.py"}


# What lists the additions, run in the copy, all in one process.
LISTS = """
import contextlib
import io
import runpy
import sys
from pathlib import Path
from kvquant.cli import main

more = Path("more.yaml").read_text()
Path("near.yaml").write_text(more.replace("datatype: cubic", "datatype: cubi"))
for name in ("more", "near"):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        main(["study", "--study", f"{name}.yaml"])
    Path(f"{name}.txt").write_text(said.getvalue())
assert main(["schema"]) == 0
sys.argv = ["docs/tables.py"]
runpy.run_path("docs/tables.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def listed(copy: RepositoryCopy) -> Path:
    """The copy's folder, in which the lists are renewed."""
    demo = (copy.root / "config/demo.yaml").read_text(encoding="utf-8")
    assert demo.count("\nschemes:\n") == 1
    more = demo.replace("\nschemes:\n", ENTRIES)
    (copy.root / "more.yaml").write_text(more, encoding="utf-8")
    copy.python("-c", LISTS)
    return copy.root


def test_studies_accept_them_and_refuse_what_is_near(listed: Path) -> None:
    written = json.loads((listed / "more.txt").read_text())
    assert written["schemes"]["int8"] == {
        "kind": "int8", "sinks": 1, "block_size": 64, "residual": 0,
    }  # fmt: skip
    assert written["schemes"]["cubic"]["datatype"] == "cubic"
    told = (listed / "near.txt").read_text()
    assert "schemes.cubic.datatype: unknown datatype 'cubi': did you mean cubic" in told


def test_schema_and_tables_list_them(listed: Path) -> None:
    schema = json.loads((listed / "config/schema.json").read_text(encoding="utf-8"))
    assert schema["$defs"]["Int8Scheme"]["properties"]["kind"]["const"] == "int8"
    page = (listed / "config/README.md").read_text(encoding="utf-8")
    assert "| `int8` | INT8, one scale per token and head | 8 | A, B |" in page
    assert "| `cubic` | cubes of even steps | key ranges only |" in page
    assert "| StarCoder2 | `starcoder2` | `Starcoder2Attention` |" in page


PASS = {
    "int8": ("tests/schemes/test_contract.py", 15),
    "cubic": ("tests/quantization/test_nuq.py", 1),
    "starcoder2": ("tests/models/test_families.py", 14),
}


WHOLE = ("tests/test_tables.py", "tests/study/test_config.py", "tests/test_layers.py")


@pytest.fixture(scope="module")
def told(copy: RepositoryCopy, listed: Path) -> str:
    """What pytest says of the tests that find the additions, all in one process."""
    files = [*WHOLE, *(file for file, _ in PASS.values()), "tests/cache/test_kvquant_cache.py"]
    chosen = " or ".join([*PASS, *(Path(file).name for file in WHOLE)])
    return copy.pytest(*files, "-v", "-v", "-k", chosen, "--all-combinations", check=False)


@pytest.mark.parametrize("name", PASS)
def test_each_passes_the_tests_of_its_like(told: str, name: str) -> None:
    file, least = PASS[name]
    outcomes = re.findall(rf"^{file}::.*{name}.* ([A-Z]+)", told, re.M)
    assert outcomes.count("PASSED") >= least, told[-2000:]
    assert not {"FAILED", "ERROR"} & set(outcomes), told[-2000:]


def test_no_test_of_an_addition_fails(told: str) -> None:
    for file in WHOLE:
        assert re.search(rf"^{file}::.* PASSED", told, re.M), told[-2000:]
    assert " passed" in told and not re.search(r"\d (failed|error)", told), told[-2000:]
