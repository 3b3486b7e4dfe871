"""Tables of allocated codes: what cannot be is named, in memory and in the files of a quantizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvquant.errors import UserError
from kvquant.formats.allocated_layer import AllocatedLayer, padded_levels
from kvquant.quantization.quantizer_file import load_quantizer, read_quantizer, save_quantizer
from kvquant.schemes.registry import build_codecs
from kvquant.study.schemes import AllocatedScheme
from tests.support.quantizers import random_allocated, save_made_quantizer

SPEC = AllocatedScheme(kind="allocated")
HEADS, DIM = 2, 64

Damage = Callable[[dict[str, torch.Tensor]], Any]


def put(name: str, place: tuple[int, ...], value: float) -> Damage:
    return lambda t: t[name].__setitem__(place, value)


def swap(name: str, row: int, one: int, other: int) -> Damage:
    def damage(t: dict[str, torch.Tensor]) -> None:
        t[name][row, [one, other]] = t[name][row, [other, one]].clone()

    return damage


def without_codebook(name: str, width: int) -> Damage:
    return lambda t: t[name][width - 1].zero_()


def uneven(name: str, width: int) -> Damage:
    """A level in the middle moves by a tenth of a step."""

    def damage(t: dict[str, torch.Tensor]) -> None:
        row = t[name][width - 1]
        row[2 ** (width - 1)] += (row[1] - row[0]) * 0.1

    return damage


def far_levels(t: dict[str, torch.Tensor]) -> None:
    t["key_levels"][3, :16] = torch.linspace(-1.0, 1.2, 16)
    t["key_levels"][3, 16:] = 1.2


def one_level(t: dict[str, torch.Tensor]) -> None:
    t["key_levels"][0] = 0.25


def pair_twice(t: dict[str, torch.Tensor]) -> None:
    t["key_pairs"][1, 0] = t["key_pairs"][1, 1]


def half_a_pair(t: dict[str, torch.Tensor]) -> None:
    t["key_pairs"][0, 3] += 0.5


def pair_beyond(step: float) -> Damage:
    """The first or the last pair becomes the one before it or behind it."""

    def damage(t: dict[str, torch.Tensor]) -> None:
        row = t["key_pairs"][0]
        row[row.argmin() if step < 0 else row.argmax()] += step

    return damage


PAIRS = "key_pairs is not a permutation of each head's pairs"
DAMAGES: dict[str, tuple[str, Damage]] = {
    "range": ("key_scale has a negative range", put("key_scale", (1, 5), -1e-6)),
    "pair twice": (PAIRS, pair_twice),
    "pair below": (PAIRS, pair_beyond(-1.0)),
    "pair above": (PAIRS, pair_beyond(1.0)),
    "half a pair": (PAIRS, half_a_pair),
    "pairs of the other head": (PAIRS, lambda t: t["key_pairs"][1].add_(32)),
    **{
        f"{name} {width}": (f"{name} holds other numbers than 1 to 6", put(name, place, width))
        for name, place in (("key_widths", (1, 1)), ("value_widths", (1,)))
        for width in (2.5, 0.0, 7.0, -1.0, 0.5, 6.5)
    },
    **{
        f"{name} of width {row + 1}": (f"{name} is not sorted", swap(name, row, one, one + 1))
        for name in ("key_levels", "value_levels")
        for row, one in ((0, 0), (2, 3), (4, 30), (5, 62))
    },
    "scale below 1": ("value_scale has a number below 1", put("value_scale", (1,), 0.999)),
    **{
        f"{name} of width {width}, uneven": (
            f"{name} of width {width} are not evenly spaced",
            uneven(name, width),
        )
        for name, width in (("key_levels", 4), ("key_levels", 6), ("value_levels", 5))
    },
    "far levels": ("key_levels of width 4 reach too far beyond [-1, 1]", far_levels),
    "one level": ("key_levels of width 1 are not evenly spaced", one_level),
    **{
        f"no {name}": (f"{name} has no codebook of width 3", without_codebook(name, 3))
        for name in ("key_levels", "value_levels")
    },
}


def good(seed: int = 0, dim: int = DIM) -> AllocatedLayer:
    """Tables in which every width is in use."""
    layer = random_allocated(HEADS, dim, seed=seed)
    layer.key_widths.view(-1)[:] = torch.arange(layer.key_widths.numel()) % 6 + 1
    layer.value_widths[:] = torch.tensor([3.0, 5.0])
    return layer


def damaged(layer: AllocatedLayer, change: Damage) -> AllocatedLayer:
    tables = {name: getattr(layer, name).clone() for name in layer.FIELDS}
    change(tables)
    return AllocatedLayer(**tables)


@pytest.mark.parametrize("dim", [16, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("seed", [0, 1])
def test_good_tables_have_no_problem_and_the_stated_shapes(dim: int, seed: int) -> None:
    layer = random_allocated(3, dim, seed=seed)
    assert layer.problem() is None
    shapes = AllocatedLayer.shapes(3.3, 3, dim)
    assert {name: tuple(getattr(layer, name).shape) for name in layer.FIELDS} == shapes
    assert shapes["key_pairs"] == (3, dim // 2) and shapes["key_widths"] == (3, dim // 16)
    assert shapes["key_levels"] == shapes["value_levels"] == (6, 64)
    assert layer.nbytes == 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str) -> None:
    message, change = DAMAGES[name]
    layer = good()
    assert layer.problem() is None
    assert damaged(layer, change).problem() == message


def test_a_width_that_no_code_has_needs_no_codebook() -> None:
    layer = replace(good(), value_widths=torch.tensor([2.0, 5.0]))
    layer.value_levels[[0, 2, 3, 5]] = 0.0
    assert layer.problem() is None
    layer.value_widths[0] = 3.0
    assert layer.problem() == "value_levels has no codebook of width 3"


def test_heads_that_do_not_fill_tiles() -> None:
    layer = good()
    pairs = torch.arange(12.0).expand(HEADS, -1)
    widths = torch.full((HEADS, 1), 3.0)
    ranges = torch.ones(HEADS, 24)
    layer = replace(layer, key_zero=ranges, key_scale=ranges, key_pairs=pairs, key_widths=widths)
    assert layer.problem() == "key_pairs: head_dim 24 is not a multiple of 16"


def test_tables_move_as_a_whole() -> None:
    layer = good()
    moved = layer.to("meta")
    for name in layer.FIELDS:
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(layer, name).shape
        assert getattr(layer, name).device.type == "cpu"
    same = layer.to("cpu")
    assert all(torch.equal(getattr(same, name), getattr(layer, name)) for name in layer.FIELDS)


def test_layouts_follow_the_tables() -> None:
    layer = good()
    keys, values = layer.key_rows(), layer.value_rows()
    assert keys.planes == layer.key_widths.sum(1).int().tolist()
    assert values.planes == [3 * DIM // 16, 5 * DIM // 16]
    x = torch.arange(HEADS * DIM).view(1, HEADS, 1, DIM)
    first = layer.key_pairs[0, :8].long()
    assert torch.equal(keys.to_tiles(x)[0, 0, 0], torch.cat([first, first + DIM // 2]))
    # values have no RoPE, but tiles of the same form
    eight = torch.arange(8)
    assert torch.equal(values.to_tiles(x)[0, 0, 1], torch.cat([eight + 8, eight + 8 + DIM // 2]))


def test_codebooks_are_padded_by_their_last_level() -> None:
    found = padded_levels({1: torch.tensor([-1.0, 0.5]), 3: torch.arange(8.0)})
    assert found.dtype is torch.float32 and found.shape == (6, 64)
    assert found[0].tolist() == [-1.0] + [0.5] * 63
    assert found[2].tolist() == [*map(float, range(8)), *[7.0] * 56]
    assert not found[[1, 3, 4, 5]].any()
    assert torch.equal(padded_levels({6: torch.arange(64.0)})[5], torch.arange(64.0))


# Files: `save_made_quantizer` writes two layers of two heads of 16 channels.


def saved(path: Path, layers: list[AllocatedLayer], heads: int = 2, dim: int = 16) -> Path:
    """Files whose hashes and JSON fit the given tables, whatever these hold."""
    save_made_quantizer(path, SPEC, "a" * 64, layers)
    shape = {"num_kv_heads": heads, "head_dim": dim, "num_layers": len(layers)}
    save_quantizer(path, read_quantizer(path).model_copy(update=shape), layers)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_quantizer(path, weights_sha256=None)
    text = str(error.value)
    assert message in text and text.startswith("quantizer: ") and "build it again" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(("heads", "dim"), [(2, 16), (3, 80), (1, 256)])
def test_files_come_back(tmp_path: Path, heads: int, dim: int) -> None:
    layers = [random_allocated(heads, dim, seed=seed) for seed in range(2)]
    path = saved(tmp_path / "q.json", layers, heads, dim)
    manifest, found = load_quantizer(path, weights_sha256="a" * 64)
    assert manifest.spec == SPEC.model_dump(mode="json")
    assert len(found) == 2
    for mine, theirs in zip(layers, found, strict=True):
        assert isinstance(theirs, AllocatedLayer)
        for name in mine.FIELDS:
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
    codecs = build_codecs(SPEC, 2, found)
    assert codecs is not None
    codecs[1].check_model(heads, 16 * (dim // 16))
    with pytest.raises(UserError, match="built for model 'tiny'"):
        load_quantizer(path, weights_sha256="b" * 64)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_in_a_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    message, change = DAMAGES[name]
    layers = [good(0), damaged(good(1), change)]
    refused(saved(tmp_path / "q.json", layers, HEADS, DIM), f"layers.1.{message}")


@pytest.mark.parametrize("field", AllocatedLayer.FIELDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, field: str, bad: float) -> None:
    def change(tables: dict[str, torch.Tensor]) -> None:
        tables[field].view(-1)[-1] = bad

    layers = [damaged(good(), change), good(1)]
    path = saved(tmp_path / "q.json", layers, HEADS, DIM)
    refused(path, f"layers.0.{field} holds values that are not finite")


@pytest.mark.parametrize("field", AllocatedLayer.FIELDS)
def test_other_shapes_and_dtypes_are_refused(tmp_path: Path, field: str) -> None:
    kept = getattr(good(), field)
    for changed, message in (
        (kept[:-1], "has shape"),
        (torch.cat([kept, kept]), "has shape"),
        (kept[..., None], "has shape"),
        (kept.double(), "is torch.float64, not float32"),
        (kept.half(), "is torch.float16, not float32"),
    ):
        layers = [good(), replace(good(1), **{field: changed})]
        refused(saved(tmp_path / "q.json", layers, HEADS, DIM), f"layers.1.{field} {message}")


def test_tables_for_another_shape_or_scheme_are_refused(tmp_path: Path) -> None:
    layers = [good(), good(1)]
    path = saved(tmp_path / "q.json", layers, HEADS, DIM)
    load_quantizer(path, weights_sha256=None)
    refused(saved(path, layers, HEADS, 2 * DIM), "layers.0.key_zero has shape [2, 64]")
    refused(saved(path, layers, 2 * HEADS, DIM), "layers.0.key_zero has shape [2, 64]")
    manifest = read_quantizer(saved(path, layers, HEADS, DIM))
    nuq = {"kind": "nuq", "bits": 3}
    save_quantizer(path, manifest.model_copy(update={"spec": nuq}), layers)
    refused(path, "has an unexpected tensor layers.0.key_pairs")
    save_quantizer(
        path, manifest.model_copy(update={"spec": {**SPEC.model_dump(), "bits": 9}}), layers
    )
    refused(path, "allocated.bits")
