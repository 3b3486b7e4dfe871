"""Tables from key ranges alone: every calibrated kind has some that its codec takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.errors import UserError
from kvquant.formats.allocated_layer import AllocatedLayer
from kvquant.formats.layer_quantizer import LayerQuantizer
from kvquant.quantization.nuq import fit
from kvquant.quantization.quantizer_file import load_quantizer
from kvquant.quantization.ranged_tables import ranged_tables
from kvquant.schemes.registry import build_codecs
from kvquant.study.dotted import load
from kvquant.study.scheme_kinds import SCHEME_KINDS, CalibratedScheme
from kvquant.study.schemes import AllocatedScheme, Fp16Scheme, KiviScheme, NuqScheme
from tests.support.quantizers import save_made_quantizer

CALIBRATED = [kind for kind in SCHEME_KINDS.values() if kind.calibrated]


def ranges(heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dim)
    return (
        torch.randn(heads, dim, generator=generator),
        torch.rand(heads, dim, generator=generator) + 0.1,
    )


def allocated(bits: float, heads: int, dim: int) -> AllocatedLayer:
    found = ranged_tables(AllocatedScheme(kind="allocated", bits=bits), *ranges(heads, dim))
    assert isinstance(found, AllocatedLayer)
    return found


@pytest.mark.parametrize("kind", CALIBRATED, ids=lambda kind: kind.name)
def test_every_calibrated_kind_has_tables_that_its_quantizer_file_could_hold(kind: Any) -> None:
    required: dict[str, Any] = {"kind": kind.name}
    if kind.options.model_fields["bits"].is_required():
        required["bits"] = 3
    spec = kind.options(**required)
    assert isinstance(spec, CalibratedScheme)
    zero, scale = ranges(2, 64)
    found = ranged_tables(spec, zero, scale)
    assert type(found) is load(kind.tables)
    assert found.problem() is None
    shapes = type(found).shapes(spec.table_bits, 2, 64)
    assert {name: tuple(getattr(found, name).shape) for name in found.FIELDS} == shapes
    for name in found.FIELDS:
        assert getattr(found, name).dtype is torch.float32
        assert getattr(found, name).isfinite().all()
    for name, given in (("key_zero", zero), ("key_scale", scale)):
        if name in found.FIELDS:  # other kinds scale keys while they pack them
            assert torch.equal(getattr(found, name), given)
    if kind.codec is not None:
        codecs = build_codecs(spec, 1, [found])
        assert codecs is not None
        codecs[0].check_model(2, 64)


@pytest.mark.parametrize(
    "spec",
    [NuqScheme(kind="nuq", bits=3), AllocatedScheme(kind="allocated")],
    ids=lambda spec: spec.kind,
)
def test_they_can_be_saved(spec: Any, tmp_path: Path) -> None:
    """A file of tensors holds none that share memory."""
    layers = [ranged_tables(spec, *ranges(2, 16)) for _ in range(2)]
    path = save_made_quantizer(tmp_path / "q.json", spec, "a" * 64, layers)
    _, found = load_quantizer(path, weights_sha256=None)
    for mine, theirs in zip(layers, found, strict=True):
        assert all(torch.equal(getattr(mine, x), getattr(theirs, x)) for x in mine.FIELDS)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_are_computed(bits: Any) -> None:
    found = ranged_tables(NuqScheme(kind="nuq", bits=bits), *ranges(2, 16))
    assert isinstance(found, LayerQuantizer)
    assert torch.equal(found.key_levels, fit("nf", bits))
    assert torch.equal(found.value_levels, fit("nf", bits))
    layer = allocated(bits, 2, 64)
    for table, fitted in (
        (layer.key_levels, (2, 3)),
        (layer.value_levels, (2, 3, 4) if bits >= 4 else (2, 3)),
    ):
        for width in range(1, 7):
            levels = fit("nf" if width in fitted else "uniform", width)
            assert torch.equal(table[width - 1, : 2**width], levels)
            assert torch.all(table[width - 1, 2**width :] == levels[-1])


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.3, 3.3, 4.3, 5.0, 6.0])
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (2, 64), (3, 80), (8, 128), (2, 256)])
def test_widths_cycle_around_their_mean(bits: float, heads: int, dim: int) -> None:
    layer = allocated(bits, heads, dim)
    assert layer.problem() is None
    mean = min(max(round(bits), 2), 5)
    widths = layer.key_widths.view(-1)
    for start in range(0, len(widths) - 3, 4):
        assert sorted((widths[start : start + 4] - mean).tolist()) == [-1.0, 0.0, 0.0, 1.0]
    assert torch.all((widths - mean).abs() <= 1)
    assert set((layer.value_widths - mean).tolist()) == ({0.0, 1.0} if heads > 1 else {0.0})


def test_heads_differ_in_the_order_of_their_pairs() -> None:
    layer = allocated(3.3, 4, 64)
    rows = [tuple(row) for row in layer.key_pairs.tolist()]
    assert len(set(rows)) == 4
    assert all(sorted(row) == list(map(float, range(32))) for row in rows)


@pytest.mark.parametrize("dim", [8, 24, 72, 100])
def test_heads_that_do_not_fill_tiles_are_refused(dim: int) -> None:
    with pytest.raises(UserError, match=f"head_dim: {dim} is not a multiple of 16") as error:
        allocated(3.3, 2, dim)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "spec",
    [KiviScheme(kind="kivi", bits=2), Fp16Scheme(kind="fp16")],
    ids=lambda spec: spec.kind,
)
def test_other_kinds_are_refused_by_name(spec: Any) -> None:
    with pytest.raises(UserError, match=f"scheme: kind '{spec.kind}' has no tables") as error:
        ranged_tables(spec, *ranges(2, 64))
    assert len(str(error.value).splitlines()) == 1
